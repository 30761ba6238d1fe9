"""Reads a file of many notes, an upload of the page."""

import io
from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from clinora.tables import TableError, as_text, open_table

MOST_ROWS = 2_000

T = TypeVar("T")


class FileError(ValueError):
    """The page cannot read the file; the message quotes no note from it."""


def check_table(content: bytes) -> None:
    """Check that a file is a table, before it is known which of its columns is wanted.

    Raises:
        FileError: The file is not a table, or has no rows or more than ``MOST_ROWS``.
    """
    try:
        _at_most(open_table(io.BytesIO(content)).select())
    except TableError as error:
        raise FileError(f"The file {error}.") from None


def read_column(content: bytes, column: str) -> list[tuple[str, str | None]]:
    """Read one column of a file.

    Returns:
        The cell of each row; and None, or what is wrong with the row, which then has an empty cell.

    Raises:
        FileError: As ``check_table``; or the column is missing or occurs twice.
    """
    rows = []
    try:
        for row in _at_most(open_table(io.BytesIO(content), [column]).select()):
            if row.wrong is None:
                rows.append((as_text(row.cells[0]), None))
            else:
                rows.append(("", f"The row {row.wrong}."))
    except TableError as error:
        raise FileError(f"The file {error}.") from None
    return rows


def _at_most(rows: Iterable[T]) -> list[T]:
    """List the rows, if they are neither none nor too many."""
    read = list(islice(rows, MOST_ROWS + 1))
    if not read:
        raise FileError("The file has no rows below its header.")
    if len(read) > MOST_ROWS:
        raise FileError(f"The file has more than {MOST_ROWS:,} rows: choose a part of it.")
    return read
