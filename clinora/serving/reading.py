"""Reads an uploaded file in a process of its own, with limits of time and memory.

A file of some kB may unpack to gigabytes, or keep its parser busy for hours. In a process of its
own it is given up, and the service goes on. No line of the file reaches a log.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import clinora
from clinora.serving.files import Columns, FileError, FileRow, check_table, read_rows

try:
    import resource
except ImportError:  # on Windows, the time alone is limited
    resource = None

MOST_CPU_SECONDS = 5
MOST_SECONDS = 15  # on a machine that is busy with other work
MOST_MEMORY_BYTES = 1_000_000_000  # of addresses; pyarrow alone takes half of them
# Threads take address space: as many as the machine has processors would exceed the limit.
ONE_THREAD = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def check_apart(content: bytes) -> Columns:
    """Do what ``check_table`` does, in another process.

    Raises:
        FileError: As ``check_table``; or the file takes too much time or memory.
    """
    return Columns(*_ask(content, None, ()))


def read_apart(content: bytes, column: str, kept: Sequence[str]) -> list[FileRow]:
    """Do what ``read_rows`` does, in another process.

    Raises:
        FileError: As ``read_rows``; or the file takes too much time or memory.
    """
    return [FileRow(*row) for row in _ask(content, column, kept)]


def _ask(content: bytes, column: str | None, kept: Sequence[str]) -> Any:
    paths = [str(Path(clinora.__file__).parents[1])]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    request = json.dumps({"column": column, "kept": list(kept)}).encode()
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "clinora.serving.reading"],
            input=request + b"\n" + content,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # an error's message may quote a note
            env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(paths)},
            timeout=MOST_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise FileError(
            "The file takes too much time or memory to read: choose a part of it, or save it as "
            "CSV (UTF-8)."
        ) from None
    answer = json.loads(process.stdout)
    if "error" in answer:
        raise FileError(answer["error"])
    return answer["result"]


def _answer(request: bytes, content: bytes) -> dict[str, Any]:
    wanted = json.loads(request)
    try:
        if wanted["column"] is None:
            return {"result": check_table(content)}
        return {"result": read_rows(content, wanted["column"], wanted["kept"])}
    except FileError as error:
        return {"error": str(error)}


def _limit_this_process() -> None:
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold notes
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS))
    with suppress(ValueError):  # macOS knows this limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))


if __name__ == "__main__":
    _limit_this_process()
    request_line = sys.stdin.buffer.readline()
    answer_text = json.dumps(_answer(request_line, sys.stdin.buffer.read()))
    sys.stdout.buffer.write(answer_text.encode())
