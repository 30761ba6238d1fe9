"""Files as people have them: recognise what a file is, and read tables from CSV files.

No error quotes a file's content, because that may be a note.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
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

# With Excel, the first line may say which delimiter it is.
DELIMITER_LINE = re.compile(rb"(?i)(?:\xef\xbb\xbf)*sep=([,;\t])(?=[\r\n]|$)")

BYTE_ORDER_MARK = "\ufeff"
CONTROL_Z = "\x1a"  # ends the text files of some old programs
LONGEST_CELL = 2**31 - 1  # characters; the csv module's default is 131,072
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
        header: The cells of the first row, without white space around them; none if the file is
            empty.
        rows: The line in which each further row begins, from 1, and the row's cells. Rows may have
            different numbers of cells. Iteration raises ``TableError`` where the file is not CSV.
        delimiter: What separates cells: a comma, a semicolon or a tab.
        columns: The wanted columns.
    """

    header: list[str]
    rows: Iterable[tuple[int, list[str]]]
    delimiter: str
    columns: list[str]

    def select(self) -> Iterator[tuple[int, list[str], str | None]]:
        """Give the wanted columns of each row.

        Yields:
            The line in which the row begins; its cells in the wanted columns; and None, or what is
            wrong with the row, such as "has 1 field, the header has 3". Then it has no cells.

        Raises:
            TableError: A wanted column is missing or occurs twice, or the rest is not CSV.
        """
        positions = [self.position(column) for column in self.columns]
        for line, row in self.rows:
            wrong = self._wrong_width(row)
            if wrong is None:
                cells = [row[position] for position in positions]
                # A second file that was appended may begin with a byte-order mark.
                if [cell.lstrip(BYTE_ORDER_MARK).strip() for cell in cells] == self.columns:
                    wrong = "repeats the header: remove that row"
            if wrong is None:
                yield line, cells, None
            else:
                yield line, [], wrong

    def position(self, column: str) -> int:
        """Find the position of a column that must occur once.

        Raises:
            TableError: There is no such column, or several. Of the first row, which may be a note,
                the message shows only cells that are similar to a wanted column.
        """
        times = self.header.count(column)
        if times == 1:
            return self.header.index(column)
        found = f"{times} columns" if times else "no column"
        similar = [
            repr(cell)
            for cell in self.header
            if any(is_similar(cell, wanted) for wanted in self.columns)
        ]
        if similar:
            hint = f"similar to the wanted columns: {', '.join(similar)[:500]}"
        else:
            hint = "none is similar to a wanted column"
        raise TableError(
            f"has {found} {column!r}, expected one; its first row has "
            f"{_count(len(self.header), 'cell')}, {hint}; correct the columns' names"
        )

    def _wrong_width(self, row: list[str]) -> str | None:
        width = len(self.header)
        if len(row) == width:
            return None
        wrong = f"has {_count(len(row), 'field')}, the header has {width}"
        if len(row) > width:
            wrong += f": put texts with {DELIMITERS[self.delimiter]} into quotes"
        return wrong


def read_table(file: BinaryIO, columns: Sequence[str] = ()) -> Table:
    """Read a table from a CSV file in UTF-8, with or without a byte-order mark.

    Cells are separated by commas, semicolons or tabs. Empty lines are left out, except between the
    rows of a table with one column, where an empty line is an empty cell. The csv module's limit
    for the length of a cell, which is the process's, is raised.

    Args:
        file: A file that is open for reading in binary mode; the table's rows are read from it.
        columns: The wanted columns; white space around their names does not matter.

    Raises:
        TableError: The file is of another kind, is not UTF-8, or has no header in its first line.
    """
    csv.field_size_limit(LONGEST_CELL)
    start = file.read(START_BYTES)
    kind = recognise(start, TABLE_KINDS)
    if kind is not None:
        raise TableError(kind)
    _check_encoding(file)
    # Some programs write a second byte-order mark.
    begin = re.match(rb"(\xef\xbb\xbf)*", start).end()
    # The csv module itself must see the line ends, since those inside quotes belong to the cell.
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    wanted = [column.strip() for column in columns]
    delimiter_line = DELIMITER_LINE.match(start)
    if delimiter_line is None:
        delimiter = _find_delimiter(text, begin, wanted)
        reader = _reader(text, begin, delimiter)
    else:
        delimiter = delimiter_line[1].decode()
        reader = _reader(text, begin, delimiter)
        next(reader)
    header = _next_row(reader)
    if header is None:
        return Table([], (), delimiter, wanted)
    header = _stripped(header)
    if not any(header):
        raise TableError("begins with an empty line: expected the header in the first line")
    return Table(header, _rows(reader, len(header)), delimiter, wanted)


def is_similar(one: str, other: str) -> bool:
    """Tell whether two names are almost equal; case, spaces and punctuation do not matter."""
    letters = [re.sub(r"[\W_]", "", name.casefold()) for name in (one, other)]
    shorter, longer = sorted(map(len, letters))
    if 2 * shorter < LEAST_SIMILARITY * (shorter + longer):  # one of the names may be a long note
        return False
    return SequenceMatcher(None, *letters).ratio() >= LEAST_SIMILARITY


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


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

    The cells of a single column may have delimiters without quotes: then it is one that would
    divide none of them. If no columns are wanted, or they are not found, it is one with which the
    file is CSV, if possible with as many cells in each row as in the header, and with the most.
    """
    headers = {}
    for delimiter in DELIMITERS:
        headers[delimiter] = _header_or_nothing(_reader(text, begin, delimiter))
    if all(len(header) == 1 for header in headers.values()):
        for delimiter in DELIMITERS:
            widths = _widths(_reader(text, begin, delimiter))
            if widths is not None and widths <= {1}:
                return delimiter
        return ","
    several = []
    for delimiter, header in headers.items():
        if columns and all(column in header for column in columns):
            return delimiter
        if len(header) > 1:
            several.append(delimiter)

    def quality(delimiter: str) -> tuple[bool, bool, int]:
        widths = _widths(_reader(text, begin, delimiter))
        width = len(headers[delimiter])
        return widths is not None, widths == {width}, width

    return max(several, key=quality, default=",")


def _reader(text: io.TextIOWrapper, begin: int, delimiter: str) -> Any:
    """Give a reader of the text from its beginning."""
    text.seek(begin)
    return csv.reader(text, delimiter=delimiter, strict=True)


def _header_or_nothing(reader: Any) -> list[str]:
    """Read the first row; give [] if there is none, or if it is not CSV with this delimiter."""
    try:
        return _stripped(_next_row(reader) or [])
    except TableError:
        return []


def _stripped(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _widths(reader: Any) -> set[int] | None:
    """Give the numbers of cells that the rows below the first have; None if it is not CSV."""
    try:
        header = _next_row(reader)
        return {len(row) for _line, row in _rows(reader, len(header))}
    except TableError:
        return None


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
        if width > 1 and len(row) == 1 and not row[0].replace(CONTROL_Z, "").strip():
            continue  # a line of spaces, or the mark of the file's end
        yield line, row


def _next_row(reader: Any) -> list[str] | None:
    """Read the next row; None at the end of the file."""
    line = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            wrong = "has a quote that is never closed"
        else:
            wrong = "has text after a closing quote (a quote inside a text must be doubled)"
        raise TableError(f"is not a CSV file: the row that begins in line {line} {wrong}") from None
