"""Read Parquet files in parts, through pyarrow."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from clinora.tables.table import (
    MOST_ROWS,
    Row,
    Table,
    TableError,
    check_unpacked,
    size_of,
)

if TYPE_CHECKING:
    import pyarrow

ROWS_TOGETHER = 32  # few, because each may be as long as a cell can be
BUFFER_BYTES = 2**20  # read at a time of a column, so that large row groups need little memory


def read_parquet(file: BinaryIO, columns: Sequence[str]) -> Table:
    """Read a table from a Parquet file.

    Raises:
        TableError: The file is damaged, unpacks to far more than its size or has more than
            ``MOST_ROWS`` rows, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise TableError(
            "is a Parquet file, for which pyarrow is needed: pip install 'clinora[files]'"
        ) from None
    try:
        parquet = ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
    except MemoryError:  # ArrowMemoryError is an ArrowException, too
        raise
    except (pyarrow.ArrowException, OSError):
        raise TableError("is a damaged Parquet file: copy it again") from None
    total = parquet.metadata.num_rows
    if total > MOST_ROWS:
        raise TableError(f"has more than {MOST_ROWS:,} rows: divide it")
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    check_unpacked(sum(group.total_byte_size for group in groups), size_of(file))
    name_of = {name.strip(): name for name in schema.names}
    rows_read = 0

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        nonlocal rows_read
        names = [name_of[column] for column in wanted]
        try:
            for batch in parquet.iter_batches(ROWS_TOGETHER, columns=names):
                for i in range(batch.num_rows):
                    yield _row_of(batch, i, names)
                rows_read += batch.num_rows
        except MemoryError:  # as above
            raise
        except (pyarrow.ArrowException, OSError):
            raise TableError(f"is damaged after row {rows_read}: copy it again") from None

    return Table(
        header=[name.strip() for name in schema.names],
        columns=list(columns),
        rows=rows,
        share_read=lambda: rows_read / max(1, total),
        has_names=True,
        types={field.name.strip(): field.type for field in schema},
    )


def _row_of(batch: "pyarrow.RecordBatch", i: int, names: Sequence[str]) -> Row:
    """Give a row of a batch; it is wrong if Python cannot hold a value, such as a far date."""
    cells = []
    wrong = None
    for name in names:
        try:
            cells.append(batch.column(name)[i].as_py())
        except (ValueError, OverflowError, KeyError):
            cells.append(None)
            wrong = f"has a value in the column {name!r} that cannot be read"
    return Row(None, cells, wrong)
