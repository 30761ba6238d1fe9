"""A table, its rows and its errors, whatever file it comes from."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, BinaryIO, NamedTuple

LONGEST_CELL = 20_000_000  # characters
MOST_ROWS = 100_000_000
# A file may be unpacked to this many bytes, and beyond that to this many times its own size.
UNPACKED_BYTES = 100_000_000
UNPACKED_TIMES = 200
LEAST_SIMILARITY = 0.85  # of almost equal names; equal names have 1

# A spreadsheet takes a cell that begins like this for a formula, unless it is a number.
FORMULA = re.compile(r"\s*[=+\-@]|[\t\r]")
NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]+)*|[.,][0-9]+)([eE][+-]?[0-9]+)?")


class TableError(ValueError):
    """A file is not a table; the message says why, without a subject, such as "is empty"."""


class MissingColumnError(TableError):
    """A wanted column is missing or occurs more than once.

    Attributes:
        column: Name of the column.
    """

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message, column)  # both, so that it can be pickled
        self.column = column

    def __str__(self) -> str:
        message, _ = self.args
        return message


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        line: The line of the file in which it begins, from 1; None if the file has no lines.
        cells: The cells of the wanted columns: text, numbers, dates or None. A row that is wrong
            has None for the cells that cannot be read, or no cells.
        wrong: None, or what is wrong with the row, such as "has 1 field, the header has 3".
    """

    line: int | None
    cells: Sequence[Any]
    wrong: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table in a file; its rows are read one after the other.

    Attributes:
        header: Names of the columns, without white space around them.
        columns: The wanted columns.
        rows: Gives the rows with the cells of some columns, which the header has once.
        share_read: Gives the share of the file that has been read, from 0 to 1.
        has_names: Whether the header surely holds names of columns. In CSV and Excel files the
            first row may be a note.
        types: Parquet's type of each column, by name; empty for other files.
    """

    header: list[str]
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterable[Row]]
    share_read: Callable[[], float]
    has_names: bool = False
    types: dict[str, Any] = field(default_factory=dict)

    def select(self) -> Iterator[Row]:
        """Give the rows, each with the cells of the wanted columns.

        Raises:
            TableError: A wanted column is missing or occurs twice, a later part of the file is not
                a table, or there are more than ``MOST_ROWS`` rows.
        """
        for column in self.columns:
            self.check(column)
        for number, row in enumerate(self.rows(self.columns), 1):
            if number > MOST_ROWS:
                raise TableError(f"has more than {MOST_ROWS:,} rows: divide it")
            yield self._checked(row)

    def _checked(self, row: Row) -> Row:
        """Mark a row as wrong if a cell is neither text, number nor date; the cell is left out."""
        if row.wrong is not None:
            return row
        cells = list(row.cells)
        wrong = None
        for i, (column, cell) in enumerate(zip(self.columns, row.cells, strict=True)):
            if isinstance(cell, (dict, list, tuple, bytes)):
                cells[i] = None
                wrong = f"has a list, object or bytes in the column {column!r}, expected text"
            elif isinstance(cell, str) and len(cell) > LONGEST_CELL:
                cells[i] = None
                wrong = f"has {len(cell):,} characters in the column {column!r}, expected at most "
                wrong += f"{LONGEST_CELL:,}"
        return Row(row.line, cells, wrong)

    def check(self, column: str) -> None:
        """Check that a column occurs once.

        Raises:
            MissingColumnError: There is no such column, or several. Of a first row that may be a
                note, the message shows only cells that are similar to a wanted column.
        """
        times = self.header.count(column)
        if times == 1:
            return
        found = f"{times} columns" if times else "no column"
        if self.has_names:
            there = f"its columns are {_quoted(self.header)}"
        else:
            similar = [
                cell
                for cell in self.header
                if any(is_similar(cell, wanted) for wanted in self.columns)
            ]
            there = f"its first row has {count(len(self.header), 'cell')}, "
            if similar:
                there += f"similar to the wanted columns: {_quoted(similar)}"
            else:
                there += "none similar to a wanted column"
        raise MissingColumnError(f"has {found} {column!r}, expected one; {there}", column)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))[:500]


def is_similar(one: str, other: str) -> bool:
    """Tell whether two names are almost equal; case, spaces and punctuation do not matter."""
    letters = [re.sub(r"[\W_]", "", name.casefold()) for name in (one, other)]
    shorter, longer = sorted(map(len, letters))
    if 2 * shorter < LEAST_SIMILARITY * (shorter + longer):  # one of the names may be a long note
        return False
    return SequenceMatcher(None, *letters).ratio() >= LEAST_SIMILARITY


def as_text(cell: object) -> str:
    """Give a cell as text: nothing for a missing value, and whole numbers without a decimal point.

    A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD.

    >>> as_text(None), as_text(17.0), as_text(2.5), as_text(True), as_text(" a ")
    ('', '17', '2.5', 'true', ' a ')
    """
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, str):
        return cell.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(cell, float):
        if math.isnan(cell):
            return ""
        if cell.is_integer():
            return str(int(cell))
    return str(cell)


def spreadsheet_safe(text: str) -> str:
    """Quote a text that a spreadsheet would take for a formula; numbers stay as they are.

    >>> spreadsheet_safe("=1+1"), spreadsheet_safe("-3"), spreadsheet_safe("plain")
    ("'=1+1", '-3', 'plain')
    """
    if FORMULA.match(text) and not NUMBER.fullmatch(text):
        return f"'{text}"
    return text


def count(number: int, thing: str) -> str:
    """Give a number with its noun, such as "1 cell" or "2 cells"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def size_of(file: BinaryIO) -> int:
    """Give the size of a file in bytes; its position stays."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def share_of_bytes(file: BinaryIO) -> Callable[[], float]:
    """Give a function that says which share of a file's bytes has been read."""
    size = max(1, size_of(file))
    return lambda: file.tell() / size


def check_unpacked(unpacked: int, packed: int) -> None:
    """Check that a compressed file does not unpack to far more than texts do.

    Args:
        unpacked: Size of the content, or of the part that has been read, in bytes.
        packed: Size of the file, in bytes.

    Raises:
        TableError: It does.
    """
    if unpacked > max(UNPACKED_BYTES, UNPACKED_TIMES * packed):
        raise TableError(
            f"has {packed:,} bytes but unpacks to more than {UNPACKED_TIMES} times as many, which "
            "is more than notes compress"
        )
