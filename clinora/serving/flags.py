"""Flagged predictions, stored as JSON lines in a file that only its owner can read."""

import json
import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

FLAGS_FILE = "flags.jsonl"


class FlagsFullError(Exception):
    """The file has reached its size limit; nothing was added."""


class Flags:
    """The file that flagged predictions are appended to.

    Attributes:
        path: The file. The first flag creates it and its folder (mode 0700).
        most_bytes: The size limit of the file.
    """

    def __init__(self, folder: str | Path, most_bytes: int = 10_000_000) -> None:
        self.path = Path(folder) / FLAGS_FILE
        self.most_bytes = most_bytes
        self._lock = threading.Lock()

    def add(self, record: dict) -> None:
        """Append a record with the time (UTC).

        Raises:
            FlagsFullError: The file would grow beyond ``most_bytes``.
            OSError: The file cannot be written, is a link, or is not a regular file.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds")} | record
        line = (json.dumps(record) + "\n").encode()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.path.parent, 0o700)  # the folder may have existed with other permissions
        how_to_open = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        # Following a link could write the text into any file of this user. Opening a pipe would
        # wait for a reader. Windows has neither flag.
        how_to_open |= getattr(os, "O_NOFOLLOW", 0)
        how_to_open |= getattr(os, "O_NONBLOCK", 0)
        with self._lock:
            descriptor = os.open(self.path, how_to_open, 0o600)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(f"{self.path} is not a regular file")
                if status.st_size + len(line) > self.most_bytes:
                    raise FlagsFullError(f"{self.path} has reached {self.most_bytes} bytes")
                os.chmod(self.path, 0o600)
                if file.write(line) < len(line):
                    file.truncate(status.st_size)  # a partial line would corrupt the next record
                    raise OSError(f"{self.path}: the record could not be written completely")
