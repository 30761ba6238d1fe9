"""Reads a file with many notes: a CSV file in UTF-8 with a header."""

import csv
import io
from dataclasses import dataclass

MOST_ROWS = 2_000


class FileError(ValueError):
    """The page cannot read the file; the message says why and quotes none of it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A file's header and its rows, each with as many fields as it has."""

    header: list[str]
    rows: list[list[str]]


def read_table(content: bytes) -> Table:
    """Read a file.

    Raises:
        FileError: It is not UTF-8 or not CSV, or it has no rows or more than ``MOST_ROWS``.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileError("The file is not UTF-8: save it as a CSV file in UTF-8.") from None
    csv.field_size_limit(2**31 - 1)  # a row that is too long has an error of its own
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
