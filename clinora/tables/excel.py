"""Read Excel workbooks row by row, through openpyxl."""

import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from clinora.tables.table import Row, Table, TableError, as_text, check_unpacked, count, size_of

MOST_UNPACKED_BYTES = 1_000_000_000  # openpyxl keeps the texts of a workbook in memory


def read_excel(file: BinaryIO, columns: Sequence[str]) -> Table:
    """Read a table from the only sheet of an Excel workbook (xlsx) that has cells.

    Raises:
        TableError: The file is another zip file or a damaged workbook, unpacks to too much, has no
            sheet or several with cells, or openpyxl is not installed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        raise TableError("is a damaged Excel workbook or zip file: copy it again") from None
    if "xl/workbook.xml" not in names:
        raise TableError("is a zip file, not an Excel workbook (xlsx): unpack it first")
    check_unpacked(unpacked, size_of(file))
    if unpacked > MOST_UNPACKED_BYTES:
        raise TableError(
            f"unpacks to more than {MOST_UNPACKED_BYTES:,} bytes: save it as CSV (UTF-8)"
        )
    try:
        import openpyxl
    except ImportError:
        raise TableError(
            "is an Excel workbook, for which openpyxl is needed: pip install 'clinora[files]'"
        ) from None
    file.seek(0)
    try:
        workbook = openpyxl.load_workbook(file, read_only=True, data_only=True)
        rows_of = {sheet.title: sheet.max_row or 1 for sheet in workbook.worksheets}
        for sheet in workbook.worksheets:
            sheet.reset_dimensions()  # some programs write wrong ones, and rows would be lost
        sheets = [sheet for sheet in workbook.worksheets if _has_cells(sheet)]
    except MemoryError:
        raise
    except Exception:  # openpyxl lets the errors of zipfile, XML and its own checks through
        raise TableError("is a damaged Excel workbook: save it again") from None
    if len(sheets) != 1:
        raise TableError(
            f"has {count(len(sheets), 'sheet')} with cells, expected one: save the wanted sheet "
            "as a workbook or CSV file of its own"
        )
    (sheet,) = sheets
    content = _rows(sheet)
    _, first = next(content)
    header = [as_text(cell).strip() for cell in first]
    line_read = 1

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        nonlocal line_read
        positions = [header.index(column) for column in wanted]
        for line_read, cells in content:
            if len(cells) > len(header):
                wrong = f"has {count(len(cells), 'cell')}, the header has {len(header)}"
                yield Row(line_read, [], wrong)
                continue
            cells += [None] * (len(header) - len(cells))
            yield Row(line_read, [cells[position] for position in positions])

    return Table(header, list(columns), rows, lambda: min(1.0, line_read / rows_of[sheet.title]))


def _has_cells(sheet: Any) -> bool:
    return any(True for _ in _rows(sheet))


def _rows(sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """Give the number and cells of each row, up to its last cell that is not empty."""
    try:
        for line, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            used = list(cells)
            while used and used[-1] is None:
                used.pop()
            if used:
                yield line, used
    except MemoryError:
        raise
    except Exception:  # openpyxl lets the errors of zipfile, XML and its own checks through
        raise TableError("is a damaged Excel workbook: save it again") from None
