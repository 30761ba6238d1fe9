"""Reads a file of many notes, an upload of the page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from clinora import files

MOST_ROWS = 2_000


class FileError(ValueError):
    """The page cannot read the file; the message says why and quotes nothing from the file."""


@dataclass(frozen=True, slots=True)
class Table:
    """The header and the rows of a file; rows may have different numbers of fields."""

    header: list[str]
    rows: list[list[str]]


def read_table(content: bytes, columns: Sequence[str] = ()) -> Table:
    """Parse a file's content as ``clinora.files.read_table`` does.

    Args:
        content: The file's content.
        columns: The wanted columns, if they are known.

    Raises:
        FileError: The file is not UTF-8 or not CSV, or has no rows or more than ``MOST_ROWS``.
    """
    # The limit is the process's, and several threads read files: they must not restore it for each
    # other. A note that is too long gets its own error later.
    csv.field_size_limit(2**31 - 1)
    rows = []
    try:
        table = files.read_table(io.BytesIO(content), columns)
        for _line, row in table.rows:
            rows.append(row)
            if len(rows) > MOST_ROWS:
                raise FileError(f"The file has more than {MOST_ROWS:,} rows: choose a part of it.")
    except files.TableError as error:
        raise FileError(f"The file {error}.") from None
    if not rows:
        raise FileError("The file has no rows below its header.")
    return Table(table.header, rows)
