"""The files of the page: what a visit uploaded, and what was made for it.

They lie in one temporary folder that belongs to this process alone. Nothing else is given out: a
path that was not put here, or belongs to another visit, does not exist.
"""

import atexit
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "clinora-service-"  # of the temporary folder, and of its lock beside it
MOST_BYTES_OF_A_VISIT = 20_000_000
MOST_BYTES = 200_000_000
KEPT_SECONDS = 1800
# A file takes at least this much of them: many tiny files would fill the file system's table.
LEAST_BYTES_OF_A_FILE = 50_000
MOST_NAME_BYTES = 200  # in UTF-8; file systems refuse more than 255


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a file is.

    Attributes:
        visit: The visit that may read it.
        address: Where that visit comes from, or "".
    """

    visit: str
    address: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a visit; ``size`` is in bytes, ``added`` in seconds of ``time.monotonic``."""

    path: Path
    owner: Owner
    size: int
    added: float


class Storage:
    """Keeps files for a while, each for the visit that owns it.

    A visit that stores more than ``MOST_BYTES_OF_A_VISIT`` loses its oldest files. When more than
    ``MOST_BYTES`` are stored in all, the address that stores most loses its oldest files, so that
    one client cannot crowd out the others.

    Attributes:
        folder: The temporary folder, readable by its owner alone.
    """

    def __init__(self) -> None:
        _remove_abandoned_folders()
        self.folder = Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}"
        self._in_use = _lock_of(self.folder)
        self._in_use.acquire()  # first: a folder whose lock is free counts as abandoned
        self.folder.mkdir(mode=0o700)
        self._files: dict[str, StoredFile] = {}  # by path, the oldest first
        self._lock = threading.Lock()
        atexit.register(self.close)

    def add(self, owner: Owner, name: str, content: bytes) -> StoredFile:
        """Store a file for a visit.

        Args:
            owner: The visit.
            name: What a person calls the file; characters that a file system may refuse become _.
            content: What it holds.

        Raises:
            OSError: It cannot be written.
        """
        folder = self.folder / secrets.token_hex(16)
        file = StoredFile(folder / _safe_name(name), owner, len(content), time.monotonic())
        with self._lock:
            folder.mkdir()
            try:
                file.path.write_bytes(content)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._files[str(file.path)] = file
            self._make_room()
        return file

    def find(self, path: object, visit: str) -> StoredFile | None:
        """Give the file at ``path`` if this visit owns it."""
        file = self._files.get(path) if isinstance(path, str) else None
        return file if file and file.owner.visit == visit else None

    def take(self, path: str) -> tuple[Owner, bytes]:
        """Remove a file, and give whose it was and what it held.

        Raises:
            FileNotFoundError: There is no such file, or no longer.
        """
        with self._lock:
            file = self._files.get(path)
            if file is None:
                raise FileNotFoundError(path)
            content = file.path.read_bytes()
            self._remove(file)
        return file.owner, content

    def remove_old(self) -> None:
        """Remove files that were stored ``KEPT_SECONDS`` ago or longer."""
        with self._lock:
            for file in list(self._files.values()):
                if time.monotonic() - file.added > KEPT_SECONDS:
                    self._remove(file)

    def close(self) -> None:
        """Remove the folder with everything in it."""
        with self._lock:
            self._files.clear()
            shutil.rmtree(self.folder, ignore_errors=True)
            atexit.unregister(self.close)
            self._in_use.release()
            _lock_path(self.folder).unlink(missing_ok=True)

    def _remove(self, file: StoredFile) -> None:
        del self._files[str(file.path)]
        shutil.rmtree(file.path.parent, ignore_errors=True)

    def _make_room(self) -> None:
        """Remove the oldest files of whoever stores too much, until all is within the bounds."""
        while True:
            of_visits: Counter[str] = Counter()
            of_addresses: Counter[str] = Counter()
            for file in self._files.values():
                size = max(file.size, LEAST_BYTES_OF_A_FILE)
                of_visits[file.owner.visit] += size
                of_addresses[file.owner.address] += size
            visit, most_of_a_visit = of_visits.most_common(1)[0]
            address, _ = of_addresses.most_common(1)[0]
            if most_of_a_visit > MOST_BYTES_OF_A_VISIT:
                self._remove(next(f for f in self._files.values() if f.owner.visit == visit))
            elif of_addresses.total() > MOST_BYTES:
                self._remove(next(f for f in self._files.values() if f.owner.address == address))
            else:
                return


def _safe_name(name: str) -> str:
    """Keep of a file's name what is a plain name on every system."""
    plain = re.sub(r"[^\w .()-]", "_", name)
    end = plain.encode()[-MOST_NAME_BYTES:].decode(errors="ignore")  # a cut character is left out
    return end.strip(" .") or "file"


def _remove_abandoned_folders() -> None:
    """Remove the temporary folders of this user's processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):  # it may vanish meanwhile
            if not _is_own_folder(folder):
                continue
            with _lock_of(folder):  # its process is gone, or it would hold this
                shutil.rmtree(folder, ignore_errors=True)
            _lock_path(folder).unlink()


def _is_own_folder(path: Path) -> bool:
    about = path.lstat()
    user = os.getuid() if hasattr(os, "getuid") else about.st_uid  # Windows has a folder per user
    return stat.S_ISDIR(about.st_mode) and about.st_uid == user


def _lock_of(folder: Path) -> FileLock:
    return FileLock(_lock_path(folder), timeout=0)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
