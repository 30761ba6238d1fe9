"""Read a CSV file strictly, row by row: the encoding, the delimiter, the header, the rows.

The csv module's limit for the length of a cell, which is the process's, is set.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from clinora.tables.table import LONGEST_CELL, Row, Table, TableError, count, share_of_bytes

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}

# With Excel, the first line may say which delimiter it is.
DELIMITER_LINE = re.compile(rb"(?i)(?:\xef\xbb\xbf)*sep=([,;\t])(?=[\r\n]|$)")

BYTE_ORDER_MARK = "\ufeff"
CONTROL_Z = "\x1a"  # ends the text files of some old programs
CHECKED_BYTES = 2**20  # decoded at a time to check the encoding


def read_csv(file: BinaryIO, start: bytes, columns: Sequence[str], packed: BinaryIO) -> Table:
    """Read a table from a CSV file in UTF-8, with or without a byte-order mark.

    Cells are separated by commas, semicolons or tabs. Empty lines are left out, except between the
    rows of a table with one column, where an empty line is an empty cell.

    Args:
        file: The file, from which the table's rows are read later.
        start: Its first bytes.
        columns: The wanted columns, which decide the delimiter.
        packed: The file as it is on disk, which may be compressed.

    Raises:
        TableError: The file is not UTF-8, or has no header in its first line.
    """
    csv.field_size_limit(LONGEST_CELL)
    _check_encoding(file)
    # Some programs write a second byte-order mark.
    begin = re.match(rb"(\xef\xbb\xbf)*", start).end()
    # The csv module itself must see the line ends, since those inside quotes belong to the cell.
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    delimiter_line = DELIMITER_LINE.match(start)
    if delimiter_line is None:
        delimiter = _find_delimiter(text, begin, columns)
        reader = _reader(text, begin, delimiter)
    else:
        delimiter = delimiter_line[1].decode()
        reader = _reader(text, begin, delimiter)
        next(reader)
    header = _next_row(reader)
    if header is None:
        raise TableError("is empty: expected a header and rows")
    header = _stripped(header)
    if not any(header):
        raise TableError("begins with an empty line: expected the header in the first line")

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        positions = [header.index(column) for column in wanted]
        for line, row in _rows(reader, len(header)):
            wrong = _wrong_width(row, header, delimiter)
            cells = []
            if wrong is None:
                cells = [row[position] for position in positions]
                # A second file that was appended may begin with a byte-order mark.
                if cells and [cell.lstrip(BYTE_ORDER_MARK).strip() for cell in cells] == wanted:
                    wrong = "repeats the header: remove that row"
            yield Row(line, cells, wrong)

    return Table(header, list(columns), rows, share_of_bytes(packed))


def _wrong_width(row: list[str], header: list[str], delimiter: str) -> str | None:
    width = len(header)
    if len(row) == width:
        return None
    wrong = f"has {count(len(row), 'field')}, the header has {width}"
    if len(row) > width:
        wrong += f": put texts with {DELIMITERS[delimiter]} into quotes"
    return wrong


def _check_encoding(file: BinaryIO) -> None:
    """Check that a file is UTF-8 text; errors give the line."""
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    is_last = False
    while not is_last:
        part = file.read(CHECKED_BYTES)
        is_last = not part
        if b"\0" in part:
            before, _, _ = part.partition(b"\0")
            line += before.count(b"\n")
            raise TableError(
                f"has a NUL byte in line {line}: it is not text, or UTF-16; save it as CSV (UTF-8)"
            )
        try:
            decoder.decode(part, final=is_last)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise TableError(
                f"is not UTF-8 (in line {line}), perhaps Windows-1252, as Excel's plain CSV is: "
                "save it as CSV (UTF-8)"
            ) from None
        line += part.count(b"\n")


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
        elif str(error).startswith("field larger than"):
            wrong = (
                f"has a cell of more than {LONGEST_CELL:,} characters, or a quote that is never "
            )
            wrong += "closed"
        else:
            wrong = "has text after a closing quote (a quote inside a text must be doubled)"
        raise TableError(f"is not a CSV file: the row that begins in line {line} {wrong}") from None
