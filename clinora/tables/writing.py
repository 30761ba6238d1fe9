"""Write tables as CSV, JSON lines or Parquet, and merge files of the same kind.

A table is a dictionary: by column, the list of its cells, where None is a missing value.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clinora.checkpoint import open_atomically, write_atomically
from clinora.tables.table import as_text, spreadsheet_safe

FORMATS = ("csv", "jsonl", "parquet")
COPIED_BYTES = 2**20  # at a time


def check_format(name: str) -> None:
    """Check that a format can be written.

    Raises:
        ValueError: It is unknown, or needs a package that is not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r}: expected {', '.join(FORMATS)}")
    if name == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(
                "Parquet needs pyarrow: pip install 'clinora[files]', or choose another --format"
            ) from None


def write_table(path: Path, columns: dict[str, list], types: dict[str, Any]) -> None:
    """Write a table; the suffix of the path says in which format.

    Args:
        path: Ends with .csv, .jsonl or .parquet. An existing file is replaced.
        columns: The cells of each column.
        types: For Parquet, pyarrow's type of each column; a column without one is text.

    Raises:
        OSError: The file cannot be written.
    """
    if path.suffix == ".csv":
        content = _csv(columns)
    elif path.suffix == ".jsonl":
        content = _json_lines(columns)
    else:
        content = _parquet(columns, types)
    write_atomically(path, content)


def merge_files(parts: Sequence[Path], path: Path) -> None:
    """Write one file with the rows of several files of the same format and columns.

    Raises:
        OSError: A file cannot be read or written.
    """
    with open_atomically(path) as merged:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetWriter, read_schema, read_table

            with ParquetWriter(merged, read_schema(parts[0])) as writer:
                for part in parts:
                    writer.write_table(read_table(part))
            return
        header_bytes = _header_bytes(parts[0]) if path.suffix == ".csv" else 0
        for part in parts:
            with part.open("rb") as file:
                if part != parts[0]:
                    file.seek(header_bytes)
                while content := file.read(COPIED_BYTES):
                    merged.write(content)


def _header_bytes(path: Path) -> int:
    """Give the size of a CSV file's header, whose names may have line ends."""
    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
    return len(_csv({name: [] for name in names}))


def _csv(columns: dict[str, list]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([spreadsheet_safe(name) for name in columns])
    for row in zip(*columns.values(), strict=True):
        writer.writerow([spreadsheet_safe(as_text(cell)) for cell in row])
    return text.getvalue().encode()


def _json_lines(columns: dict[str, list]) -> bytes:
    lines = []
    for row in zip(*columns.values(), strict=True):
        cells = map(_json_cell, row)
        lines.append(json.dumps(dict(zip(columns, cells, strict=True)), ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _json_cell(cell: object) -> object:
    """Give a cell as JSON has it: dates and decimal numbers are texts, NaN is missing."""
    if cell is None or isinstance(cell, (bool, int)):
        return cell
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    return as_text(cell)


def _parquet(columns: dict[str, list], types: dict[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    arrays = {}
    for name, cells in columns.items():
        kind = types.get(name)
        if kind is None:
            kind = pyarrow.string()
            cells = _texts(cells)
        arrays[name] = pyarrow.array(cells, kind)
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), stream)
    return stream.getvalue()


def _texts(cells: Iterable[object]) -> list[str | None]:
    return [None if cell is None else as_text(cell) for cell in cells]
