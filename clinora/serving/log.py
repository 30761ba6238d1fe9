"""The access log: one JSON line for each request and each event of the page, without note text.

A thread of its own writes the lines, so that a slow disk does not delay a response.
"""

import json
import logging
import os
import queue
import stat
import threading
from pathlib import Path
from typing import BinaryIO

from clinora.serving import type_and_place

MOST_BYTES = 10_000_000  # in a file; the next line starts a new one
OLDER_FILES = 5  # that are kept: FILE.1, the newest of them, to FILE.5
MOST_WAITING_LINES = 10_000  # while the disk is slow; further ones are lost

_log = logging.getLogger(__name__)


class AccessLog:
    """A file of JSON lines that only its owner can read (mode 0600), rotated by size.

    A line that cannot be written, for example because the disk is full, is lost and counted. The
    service continues. If the file cannot be renamed, for example because its folder is not
    writable, lines are added to it up to twice its size; further ones are lost and counted.

    Attributes:
        path: The file.
        lost_lines: Number of lines that could not be written.

    Raises:
        OSError: The file cannot be opened, is a link, or is not a regular file.
    """

    def __init__(
        self, path: str | Path, most_bytes: int = MOST_BYTES, older_files: int = OLDER_FILES
    ) -> None:
        self.path = Path(path)
        self.most_bytes = most_bytes
        self.older_files = older_files
        self.lost_lines = 0
        self._lock = threading.Lock()  # of lost_lines
        self._is_failing = False
        self._file: BinaryIO | None = _open(self.path)
        self._waiting: queue.Queue[dict | None] = queue.Queue(MOST_WAITING_LINES)
        self._thread = threading.Thread(target=self._write_lines, name="access log", daemon=True)
        self._thread.start()

    def add(self, entry: dict) -> None:
        """Add a line, without waiting for the disk."""
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self._lose_line()

    def close(self) -> None:
        """Write the lines that wait, and close the file."""
        self._waiting.put(None)
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _write_lines(self) -> None:
        while (entry := self._waiting.get()) is not None:
            try:
                self._write((json.dumps(entry) + "\n").encode())
            except Exception as error:  # the thread has to survive for the next lines
                self._lose_line()
                self._report("written", error)

    def _write(self, line: bytes) -> None:
        """Append a line completely or not at all."""
        if self._file is None:  # an earlier rotation failed
            self._file = _open(self.path)
        size = os.fstat(self._file.fileno()).st_size
        if size > 0 and size + len(line) > self.most_bytes:
            self._rotate()
            size = os.fstat(self._file.fileno()).st_size  # not 0 if the rotation failed
        if size > 0 and size + len(line) > 2 * self.most_bytes:
            raise OSError(f"{self.path} has twice its size and cannot be renamed")
        if self._file.write(line) < len(line):
            self._file.truncate(size)  # a partial line would corrupt the next one
            raise OSError(f"{self.path}: a line could not be written completely")
        if size == 0 or size + len(line) <= self.most_bytes:
            self._is_failing = False

    def _rotate(self) -> None:
        """Start a new file; if the files cannot be renamed, open the full one again."""
        self._file.close()  # Windows renames no open file
        self._file = None
        try:
            for number in range(self.older_files, 0, -1):
                newer = self._older_file(number - 1)
                if newer.exists():
                    os.replace(newer, self._older_file(number))
        except OSError as error:
            self._report("renamed", error)
        self._file = _open(self.path)

    def _older_file(self, number: int) -> Path:
        """Return the path of an older file; number 0 is the file itself."""
        if number == 0:
            return self.path
        return self.path.with_name(f"{self.path.name}.{number}")

    def _report(self, failed: str, error: Exception) -> None:
        """Log an error once, not for each line, until lines can be written as usual."""
        if not self._is_failing:
            _log.error("the access log cannot be %s: %s", failed, type_and_place(error))
        self._is_failing = True

    def _lose_line(self) -> None:
        with self._lock:
            self.lost_lines += 1


def _open(path: Path) -> BinaryIO:
    """Open a file to append lines to it. It is not buffered, so that each line is whole."""
    how_to_open = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    # Following a link could write into any file of this user. Opening a pipe would wait for a
    # reader. Windows has neither flag.
    how_to_open |= getattr(os, "O_NOFOLLOW", 0)
    how_to_open |= getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, how_to_open, 0o600)
    file = os.fdopen(descriptor, "ab", buffering=0)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        if hasattr(os, "fchmod"):  # not on Windows, whose files have no such mode
            os.fchmod(descriptor, 0o600)  # the file may have existed with other permissions
    except OSError:
        file.close()
        raise
    return file
