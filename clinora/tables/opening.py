"""Recognise what kind of table a file is, unpack gzip, and give the file to its reader."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from clinora.files import KINDS, START_BYTES, recognise
from clinora.tables.csv_file import read_csv
from clinora.tables.excel import read_excel
from clinora.tables.json_lines import read_json_lines
from clinora.tables.parquet import read_parquet
from clinora.tables.table import Table, TableError, check_unpacked, size_of

GZIP = rb"\x1f\x8b\x08"
PARQUET = rb"PAR1\x15"
ZIP = rb"PK\x03\x04"
JSON_LINES = rb'(\xef\xbb\xbf)?\s*\{\s*["}]'

# What may stand in the place of a table.
WRONG_KINDS = (
    *KINDS,
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "is an old or an encrypted Excel workbook: save it as CSV (UTF-8)",
    ),
    (
        rb'(\xef\xbb\xbf)?\s*\[\s*[\[{"\]]',
        "is JSON in one piece: write one object in each line (JSON lines)",
    ),
    (
        rb"\xff\xfe|\xfe\xff",
        'is not UTF-8 but UTF-16, as Excel\'s "Unicode Text" is: save it as CSV (UTF-8)',
    ),
)
WRONG_IN_GZIP = (
    (ZIP, "is a zip file inside gzip: unpack it first"),
    (PARQUET, "is a Parquet file inside gzip: unpack it first"),
    *WRONG_KINDS,
)


def open_table(file: BinaryIO, columns: Sequence[str] = ()) -> Table:
    """Open a table in a CSV, JSON lines (both may be gzipped), Parquet or Excel file.

    Args:
        file: A file that is open for reading in binary mode; the table's rows are read from it.
        columns: The wanted columns; white space around their names does not matter.

    Raises:
        TableError: The file is of another kind, is damaged, or begins with no header; or a package
            is needed that is not installed.
    """
    wanted = [column.strip() for column in columns]
    start = _start_of(file)
    if re.match(PARQUET, start):
        return read_parquet(file, wanted)
    if re.match(ZIP, start):
        return read_excel(file, wanted)
    packed = file
    wrong_kinds = WRONG_KINDS
    if re.match(GZIP, start):
        file = io.BufferedReader(Unpacked(packed))
        start = _start_of(file)
        wrong_kinds = WRONG_IN_GZIP
    kind = recognise(start, wrong_kinds)
    if kind is not None:
        raise TableError(kind)
    if re.match(JSON_LINES, start):
        return read_json_lines(file, wanted, packed)
    return read_csv(file, start, wanted, packed)


def _start_of(file: BinaryIO) -> bytes:
    start = file.read(START_BYTES)
    file.seek(0)
    return start


class Unpacked(io.RawIOBase):
    """The content of a gzip file, for reading.

    Reading raises ``TableError`` if the file is damaged or unpacks to far more than its size.
    """

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__()
        self._packed_size = size_of(packed)
        self._content = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: going back starts again at the beginning."""
        return True

    def readinto(self, buffer: bytearray) -> int:
        """Read into a buffer, and give the number of bytes."""
        with gzip_errors():
            size = self._content.readinto(buffer)
        check_unpacked(self._content.tell(), self._packed_size)
        return size

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        with gzip_errors():
            return self._content.seek(position, whence)

    def tell(self) -> int:
        """Give the position."""
        return self._content.tell()


@contextmanager
def gzip_errors() -> Iterator[None]:
    """Turn the errors of a damaged gzip file into ``TableError``."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise TableError("is a damaged or incomplete gzip file: copy it again") from None
