"""Tables as people have them: CSV, JSON lines, Parquet and Excel, read row by row.

``open_table`` recognises the kind of a file. Whatever the kind, each row is read, or has an error
that says what is wrong with it; memory does not grow with the file. No error quotes a cell, which
may be a note.
"""

from clinora.tables.opening import open_table
from clinora.tables.table import (
    MissingColumnError,
    Row,
    Table,
    TableError,
    as_text,
    spreadsheet_safe,
)

__all__ = [
    "MissingColumnError",
    "Row",
    "Table",
    "TableError",
    "as_text",
    "open_table",
    "spreadsheet_safe",
]
