"""Reads a file of many notes, an upload of the page: its columns, and its rows."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

from clinora.tables import Table, TableError, as_text, open_table

MOST_ROWS = 2_000
MOST_COLUMNS = 200
MOST_NAME_CHARACTERS = 200  # in the name of a column
MOST_HEADER_CHARACTERS = 10_000  # in the names together, which stay in memory
MOST_NOTES_CHARACTERS = 20_000_000  # in the notes together, since compressed files repeat texts
MOST_KEPT_CHARACTERS = 2_000_000  # in the kept columns together, which the result repeats
USUAL_COLUMN = "transcription"
ROWS_TO_JUDGE = 20  # from which the column of the notes is guessed

T = TypeVar("T")


class FileError(ValueError):
    """The page cannot read the file; the message quotes no note from it."""


class Columns(NamedTuple):
    """The columns that can be chosen: their names, and the one that probably contains the notes."""

    names: list[str]
    suggested: str


class FileRow(NamedTuple):
    """A row: its note, the cells of the kept columns, and the error of the row, or None."""

    note: str
    kept: list[str]
    wrong: str | None


def check_table(content: bytes) -> Columns:
    """Check that a file is a table, and give its columns.

    Raises:
        FileError: The file is not a table, has no rows or too many, or no header that can be used.
    """
    try:
        table = _open(content)
        names = _check_header(table.header)
        rows = _at_most(table.rows(names))
    except TableError as error:
        raise FileError(f"The file {error}.") from None
    if USUAL_COLUMN in names:
        return Columns(names, USUAL_COLUMN)
    lengths = dict.fromkeys(names, 0)
    for row in rows[:ROWS_TO_JUDGE]:
        for name, cell in zip(names, row.cells, strict=False):  # a wrong row has no cells
            if isinstance(cell, str):
                lengths[name] += len(cell)
    return Columns(names, max(names, key=lengths.__getitem__))


def read_rows(content: bytes, column: str, kept: Sequence[str] = ()) -> list[FileRow]:
    """Read the notes of a file.

    Args:
        content: The file.
        column: The column of the notes.
        kept: The columns whose cells are wanted besides.

    Raises:
        FileError: As ``check_table``; or a column is missing or occurs twice, or there is too much
            text.
    """
    columns = [name.strip() for name in (column, *kept)]
    rows = []
    notes_characters = 0
    kept_characters = 0
    try:
        table = replace(_open(content), columns=columns)
        for row in _at_most(table.select()):
            if row.wrong is not None:
                rows.append(FileRow("", ["" for _ in kept], f"The row {row.wrong}."))
                continue
            note, *cells = map(as_text, row.cells)
            notes_characters += len(note)
            kept_characters += sum(map(len, cells))
            if notes_characters > MOST_NOTES_CHARACTERS:
                raise FileError(
                    f"The notes have more than {MOST_NOTES_CHARACTERS:,} characters together: "
                    "choose a part of the file."
                )
            if kept_characters > MOST_KEPT_CHARACTERS:
                raise FileError(
                    f"The columns to keep have more than {MOST_KEPT_CHARACTERS:,} characters "
                    "together: keep fewer."
                )
            rows.append(FileRow(note, cells, None))
    except TableError as error:
        raise FileError(f"The file {error}.") from None
    return rows


def _open(content: bytes) -> Table:
    # The usual column decides the delimiter. The same columns are then found every time.
    return open_table(io.BytesIO(content), [USUAL_COLUMN])


def _check_header(header: Sequence[str]) -> list[str]:
    """Give the names that can be chosen: those that occur once and are not empty."""
    if len(header) > MOST_COLUMNS:
        raise FileError(
            f"The file has {len(header):,} columns, more than {MOST_COLUMNS}: choose a part of it."
        )
    if any(len(name) > MOST_NAME_CHARACTERS for name in header):
        raise FileError(
            f"The first row has a cell of more than {MOST_NAME_CHARACTERS} characters: expected a "
            "header, the names of the columns."
        )
    characters = sum(map(len, header))
    if characters > MOST_HEADER_CHARACTERS:
        raise FileError(
            f"The names of the columns have {characters:,} characters together, more than "
            f"{MOST_HEADER_CHARACTERS:,}: choose a part of the file."
        )
    names = [name for name in header if name and header.count(name) == 1]
    if not names:
        raise FileError("The file has no column whose name is in the header once.")
    return names


def _at_most(rows: Iterable[T]) -> list[T]:
    """List the rows, if they are neither none nor too many."""
    read = list(islice(rows, MOST_ROWS + 1))
    if not read:
        raise FileError("The file has no rows below its header.")
    if len(read) > MOST_ROWS:
        raise FileError(f"The file has more than {MOST_ROWS:,} rows: choose a part of it.")
    return read
