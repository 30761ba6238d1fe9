"""Reads an uploaded file in a process of its own, with limits of time and memory.

A file of some kB may unpack to gigabytes, or keep its parser busy for hours. The file is read in a
separate process, which can be stopped without affecting the service. No line of the file reaches a
log.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import clinora
from clinora.serving import type_and_place
from clinora.serving.files import Columns, FileError, FileRow, check_table, read_rows

try:
    import resource
except ImportError:  # on Windows, the time alone is limited
    resource = None

_log = logging.getLogger(__name__)

MOST_CPU_SECONDS = 5
MOST_SECONDS = 15  # on a machine that is busy with other work
MOST_MEMORY_BYTES = 1_000_000_000  # of address space; pyarrow alone takes half of it
TOO_MUCH = 3  # exit status of a process that reached a limit by itself
# Threads take address space: as many as the machine has processors would exceed the limit.
ONE_THREAD = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
FUNCTIONS = {"check_table": check_table, "read_rows": read_rows}


class ReadingError(Exception):
    """The process that reads a file failed for an unexpected reason, which was logged."""


def check_in_subprocess(content: bytes) -> Columns:
    """Do what ``check_table`` does, in another process.

    Raises:
        FileError: As ``check_table``; or the file takes too much time or memory.
        ReadingError: The process failed.
    """
    return Columns(*_ask("check_table", content))


def read_in_subprocess(content: bytes, column: str, kept: Sequence[str]) -> list[FileRow]:
    """Do what ``read_rows`` does, in another process.

    Raises:
        FileError: As ``read_rows``; or the file takes too much time or memory.
        ReadingError: The process failed.
    """
    return [FileRow(*row) for row in _ask("read_rows", content, column, list(kept))]


def environment_of_process() -> dict[str, str]:
    """Give the environment of another process that imports this package and has one thread."""
    paths = [str(Path(clinora.__file__).parents[1])]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(paths)}


def _ask(function: str, content: bytes, *arguments: object) -> Any:
    """Call a function of ``FUNCTIONS`` in another process."""
    request = json.dumps({"function": function, "arguments": arguments}).encode()
    too_much = FileError(
        "The file takes too much time or memory to read: choose a part of it, or save it as "
        "CSV (UTF-8)."
    )
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "clinora.serving.reading"],
            input=request + b"\n" + content,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # an error's message may quote a note
            env=environment_of_process(),
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise too_much from None
    status = process.returncode
    if status == TOO_MUCH or status < 0:  # a signal ended it: the processor time, or the memory
        raise too_much
    if status != 0:
        _log.error("the process that reads a file ended with status %d", status)
        raise ReadingError
    answer = json.loads(process.stdout)
    if "failure" in answer:
        _log.error("a file could not be read: %s", answer["failure"])
        raise ReadingError
    if "error" in answer:
        raise FileError(answer["error"])
    return answer["result"]


def _answer(request: bytes, content: bytes) -> dict[str, Any]:
    call = json.loads(request)
    try:
        return {"result": FUNCTIONS[call["function"]](content, *call["arguments"])}
    except FileError as error:
        return {"error": str(error)}
    except MemoryError:
        raise
    except Exception as error:
        return {"failure": type_and_place(error)}


def _limit_this_process() -> None:
    # A process that outlives the service ends, too.
    timer = threading.Timer(MOST_SECONDS, os._exit, [TOO_MUCH])
    timer.daemon = True
    timer.start()
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold notes
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS))
    with suppress(ValueError):  # macOS defines this limit but does not let it be set
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))


def _main() -> None:
    _limit_this_process()
    request = sys.stdin.buffer.readline()
    try:
        answer = json.dumps(_answer(request, sys.stdin.buffer.read()), ensure_ascii=False)
        # The name of a column in JSON lines may hold half a surrogate pair.
        sys.stdout.buffer.write(answer.encode(errors="surrogatepass"))
    except MemoryError:
        sys.exit(TOO_MUCH)


if __name__ == "__main__":
    _main()
