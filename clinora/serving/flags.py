"""Flagged predictions: JSON lines that only their owner can read, without the notes' text."""

import json
import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

FLAGS_FILE = "flags.jsonl"


class FlagsFullError(Exception):
    """The file has its largest size; nothing was added."""


class Flags:
    """The file that flagged predictions are appended to.

    Attributes:
        path: The file. It and its folder (0700) are made at the first flag.
        most_bytes: The largest size that the file may grow to.
    """

    def __init__(self, folder: str | Path, most_bytes: int = 10_000_000) -> None:
        self.path, self.most_bytes = Path(folder) / FLAGS_FILE, most_bytes
        self._lock = threading.Lock()

    def add(self, record: dict) -> None:
        """Append a record with the time (UTC).

        Raises:
            FlagsFullError: The file would grow beyond ``most_bytes``.
            OSError: The file cannot be written, or is a link or no file.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds")} | record
        line = (json.dumps(record) + "\n").encode()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.path.parent, 0o700)  # it may have been there, open to others
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK"):  # Windows has neither
            # A link could lead the text to any file of this user; a pipe would wait for a reader.
            how |= getattr(os, name, 0)
        with self._lock, os.fdopen(os.open(self.path, how, 0o600), "ab", buffering=0) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OSError(f"{self.path} is no file")
            if about.st_size + len(line) > self.most_bytes:
                raise FlagsFullError(f"{self.path} has its largest size, {self.most_bytes} bytes")
            os.chmod(self.path, 0o600)
            if file.write(line) < len(line):
                file.truncate(about.st_size)  # half a line would spoil the next
                raise OSError(f"{self.path} could not be written whole")
