"""Reads a file of many notes: CSV in UTF-8 with a header."""

import csv
import io
from dataclasses import dataclass

MOST_ROWS = 2_000


class FileError(ValueError):
    """The page cannot read the file; the message says why and quotes nothing from the file."""


@dataclass(frozen=True, slots=True)
class Table:
    """The header and the rows of a file; rows may have different numbers of fields."""

    header: list[str]
    rows: list[list[str]]


def read_table(content: bytes) -> Table:
    """Parse a file's content, without its empty lines.

    Raises:
        FileError: The file is not UTF-8 or not CSV, or has no rows or more than ``MOST_ROWS``.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileError("The file is not UTF-8: save it as a CSV file in UTF-8.") from None
    csv.field_size_limit(2**31 - 1)  # a note that is too long gets its own error later
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = []
    try:
        header = next(reader, [])
        for row in reader:
            if row:
                rows.append(row)
            if len(rows) > MOST_ROWS:
                raise FileError(f"The file has more than {MOST_ROWS:,} rows: choose a part of it.")
    except csv.Error:
        raise FileError("The file is not a CSV file.") from None
    if not rows:
        raise FileError("The file has no rows below its header.")
    return Table(header, rows)
