"""Read JSON lines: an object in each line, whose keys are the columns.

The standard library reads one line at a time, so that a wrong line is one wrong row and the types
of a column may differ from row to row.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from clinora.tables.table import Row, Table, TableError, as_text, share_of_bytes

LONGEST_LINE = 100_000_000  # bytes


def read_json_lines(file: BinaryIO, columns: Sequence[str], packed: BinaryIO) -> Table:
    """Read a table from JSON lines in UTF-8; the first object's keys are the header.

    Args:
        file: The file, from which the table's rows are read later.
        columns: The wanted columns.
        packed: The file as it is on disk, which may be compressed.

    Raises:
        TableError: The first line is not a JSON object.
    """
    for _line, content in _lines(file):
        first, wrong = _parse(content)
        if wrong is not None:
            raise TableError(
                f"begins like JSON, but its first line {wrong}: write one object in each line "
                "(JSON lines)"
            )
        break
    # Names are compared without white space around them, as in other tables.
    key_of = {as_text(key).strip(): key for key in first}

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        file.seek(0)
        for line, content in _lines(file):
            value, wrong = _parse(content)
            missing = [column for column in wanted if key_of[column] not in value]
            if wrong is None and missing:
                wrong = f"has no {missing[0]!r}"
            yield Row(line, [value.get(key_of[column]) for column in wanted], wrong)

    return Table(list(key_of), list(columns), rows, share_of_bytes(packed), has_names=True)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Give the number and content of each line that is not blank."""
    line = 0
    while content := file.readline(LONGEST_LINE + 1):
        line += 1
        if len(content) > LONGEST_LINE:
            raise TableError(f"has more than {LONGEST_LINE:,} bytes in line {line}")
        content = content.removeprefix(b"\xef\xbb\xbf").strip()
        if content:
            yield line, content


def _parse(content: bytes) -> tuple[dict[str, Any], str | None]:
    """Give the object of a line; and None, or what is wrong with the line."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError:
        return {}, "is not UTF-8"
    except (ValueError, RecursionError):
        return {}, "is not JSON"
    if not isinstance(value, dict):
        return {}, "is not a JSON object"
    return value, None
