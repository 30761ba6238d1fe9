"""Files as people have them: recognise what a file is, and read tables from CSV files.

No error quotes a file's content, because that may be a note.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, BinaryIO

START_BYTES = 512  # enough to recognise a file

# What may stand in the place of any file: a pattern of its beginning, what it is, what to do.
KINDS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "is a Git LFS pointer, not the file itself: run git lfs pull, or download the file",
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html)",
        "is a web page, not the file itself: download the file",
    ),
    # gzip, bzip2, xz and zstd. A safetensors file may have gzip's first bytes but not its ninth.
    (
        rb"(?s)\x1f\x8b\x08.{5}[\0\2\4]|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd",
        "is compressed: unpack it first",
    ),
)

# What may stand in the place of a CSV file.
TABLE_KINDS = (
    *KINDS,
    (
        rb"PK\x03\x04",
        "is an Excel workbook (xlsx) or another zip file: save it as CSV (UTF-8), or unpack it",
    ),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "is an old or an encrypted Excel workbook: save it as CSV (UTF-8)",
    ),
    (rb"PAR1\x15", "is a Parquet file: save it as CSV (UTF-8)"),
    (
        rb'(\xef\xbb\xbf)?\s*(\{\s*["}]|\[\s*[\[{"\]])',
        "is JSON: save it as CSV (UTF-8)",
    ),
    (
        rb"\xff\xfe|\xfe\xff",
        'is not UTF-8 but UTF-16, as Excel\'s "Unicode Text" is: save it as CSV (UTF-8)',
    ),
)

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}

# A longer column name, in characters or in words, is a note in a file without a header.
LONGEST_COLUMN_NAME = 40
MOST_WORDS_IN_A_COLUMN_NAME = 4
LEAST_SIMILARITY = 0.85  # of almost equal names; equal names have 1


def recognise(start: bytes, kinds: Sequence[tuple[bytes, str]] = KINDS) -> str | None:
    """Say what a file is and what to do with it, such as "is compressed: unpack it first".

    Args:
        start: The first ``START_BYTES`` of the file, or more.
        kinds: The kinds that would be wrong; a file of none of them gives None.
    """
    for pattern, kind in kinds:
        if re.match(pattern, start):
            return kind
    return None


class TableError(ValueError):
    """A file is not a table; the message says why, without a subject, such as "is empty"."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table in a CSV file.

    Attributes:
        header: The cells of the first row; none if the file is empty.
        rows: The line in which each further row begins, from 1, and the row's cells. Rows may have
            different numbers of cells. Iteration raises ``TableError`` where the file is not CSV.
        delimiter: What separates cells: a comma, a semicolon or a tab.
    """

    header: list[str]
    rows: Iterator[tuple[int, list[str]]]
    delimiter: str

    def position(self, name: str, columns: Sequence[str]) -> int:
        """Find the position of a column that must occur once.

        Args:
            name: The column.
            columns: All columns that are wanted, to judge whether the first row is a header.

        Raises:
            TableError: There is no such column, or several. The message lists the columns only if
                the first row looks like a header, because else it may be a note.
        """
        times = self.header.count(name)
        if times == 1:
            return self.header.index(name)
        found = f"{times} columns" if times else "no column"
        if looks_like_header(self.header, columns):
            hint = f"its columns are: {', '.join(map(repr, self.header))[:500]}"
        else:
            hint = (
                f"its first row (number of cells: {len(self.header)}) does not look like a header "
                "with these columns: check the file's first row and the columns' names"
            )
        raise TableError(f"has {found} {name!r}, expected one; {hint}")


def read_table(file: BinaryIO, columns: Sequence[str] = ()) -> Table:
    """Read a table from a CSV file in UTF-8, with or without a byte-order mark.

    Cells are separated by commas, semicolons or tabs. Empty lines are left out, except between the
    rows of a table with one column, where an empty line is an empty cell.

    Args:
        file: A file that is open for reading in binary mode; the table's rows are read from it.
        columns: The wanted columns.

    Raises:
        TableError: The file is of another kind, is not UTF-8, or has no header in its first line.
    """
    start = file.read(START_BYTES)
    kind = recognise(start, TABLE_KINDS)
    if kind is not None:
        raise TableError(kind)
    _check_encoding(file)
    # Some programs write a second byte-order mark.
    begin = re.match(rb"(\xef\xbb\xbf)*", start).end()
    # The csv module itself must see the line ends, since those inside quotes belong to the cell.
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    delimiter = _find_delimiter(text, begin, columns)
    text.seek(begin)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = _next_row(reader)
    if header is None:
        return Table([], iter(()), delimiter)
    if not header:
        raise TableError("begins with an empty line: expected the header in the first line")
    return Table(header, _rows(reader, len(header)), delimiter)


def looks_like_header(row: Sequence[str], columns: Sequence[str]) -> bool:
    """Tell whether a file's first row is a header with a wanted column or a near miss, not a note.

    A header's cells are different short names with letters, or empty.
    """
    names = [cell for cell in row if cell]
    if len(set(names)) < len(names) or not all(map(_is_column_name, names)):
        return False
    return any(is_similar(name, column) for name in names for column in columns)


def is_similar(one: str, other: str) -> bool:
    """Tell whether two names are almost equal; case, spaces and punctuation do not matter."""
    letters = [re.sub(r"[\W_]", "", name.casefold()) for name in (one, other)]
    return SequenceMatcher(None, *letters).ratio() >= LEAST_SIMILARITY


def _is_column_name(cell: str) -> bool:
    is_short = len(cell) <= LONGEST_COLUMN_NAME
    has_few_words = len(cell.split()) <= MOST_WORDS_IN_A_COLUMN_NAME
    return is_short and has_few_words and any(character.isalpha() for character in cell)


def _check_encoding(file: BinaryIO) -> None:
    """Check line by line that a file is UTF-8 text; errors name the line."""
    file.seek(0)
    for line, content in enumerate(file, 1):
        if b"\0" in content:
            raise TableError(
                f"has a NUL byte in line {line}: it is not text, or UTF-16; save it as CSV (UTF-8)"
            )
        try:
            content.decode()
        except UnicodeDecodeError:
            raise TableError(
                f"is not UTF-8 (in line {line}), perhaps Windows-1252, as Excel's plain CSV is: "
                "save it as CSV (UTF-8)"
            ) from None


def _find_delimiter(text: io.TextIOWrapper, begin: int, columns: Sequence[str]) -> str:
    """Find the delimiter with which the header has the wanted columns.

    If there is none, or no columns are wanted, it is the one with which the header has the most
    cells, if possible as many as the next row.
    """
    widths = {}
    fitting = []
    for delimiter in DELIMITERS:
        text.seek(begin)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = _row_or_nothing(reader)
        if columns and all(column in header for column in columns):
            return delimiter
        widths[delimiter] = max(1, len(header))
        if len(header) > 1 and len(header) == len(_row_or_nothing(reader)):
            fitting.append(delimiter)
    return max(fitting or DELIMITERS, key=widths.__getitem__)


def _row_or_nothing(reader: Any) -> list[str]:
    """Read the next row; if it is not CSV, as with another delimiter, or there is none, give []."""
    try:
        return _next_row(reader) or []
    except TableError:
        return []


def _rows(reader: Any, width: int) -> Iterator[tuple[int, list[str]]]:
    empty_lines = []
    while True:
        line = reader.line_num + 1
        row = _next_row(reader)
        if row is None:
            return
        if not row:
            empty_lines.append(line)
            continue
        if width == 1:  # spreadsheets write an empty cell as an empty line
            for empty_line in empty_lines:
                yield empty_line, [""]
        empty_lines.clear()
        yield line, row


def _next_row(reader: Any) -> list[str] | None:
    """Read the next row, however long its cells are; None at the end of the file."""
    line = reader.line_num + 1
    limit = csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
    try:
        return next(reader, None)
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            wrong = "has a quote that is never closed"
        else:
            wrong = "has text after a closing quote (a quote inside a text must be doubled)"
        raise TableError(f"is not a CSV file: the row that begins in line {line} {wrong}") from None
    finally:
        csv.field_size_limit(limit)
