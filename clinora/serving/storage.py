"""Temporary storage for the page's files: the uploads of each visit and its results.

The files are in a temporary folder of this process. No other file is given out: a path that was not
stored here, or that belongs to another visit, is treated as missing.
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

from clinora.serving.files import Columns

PREFIX = "clinora-service-"  # starts the name of the temporary folder, and of its lock file
MOST_BYTES_OF_A_VISIT = 20_000_000
MOST_BYTES = 200_000_000
KEPT_SECONDS = 1800
# A smaller file counts as this size, since many tiny files would use up the file system's inodes.
LEAST_BYTES_OF_A_FILE = 50_000
MOST_NAME_BYTES = 200  # in UTF-8; file systems refuse more than 255


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a file.

    Attributes:
        visit: The visit that may read the file.
        address: The client's network address, or "".
    """

    visit: str
    address: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a visit.

    Attributes:
        path: Where it is stored.
        owner: Who may read it.
        size: Its size in bytes.
        added: When it was stored, in seconds of ``time.monotonic``.
        columns: The columns of an uploaded table; None for a result.
    """

    path: Path
    owner: Owner
    size: int
    added: float
    columns: Columns | None


class Storage:
    """Keeps files for a limited time, each for the visit that owns it.

    If a visit stores more than ``MOST_BYTES_OF_A_VISIT``, its oldest files are removed. If all
    visits together store more than ``MOST_BYTES``, the oldest files of the address that stores most
    are removed, so that one client cannot displace the files of others.

    Attributes:
        folder: The temporary folder. Only the user of this process can read it.
    """

    def __init__(self) -> None:
        _remove_abandoned_folders()
        self.folder = Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}"
        self._in_use = _lock_of(self.folder)
        self._in_use.acquire()  # before the folder exists: without a held lock it is abandoned
        self.folder.mkdir(mode=0o700)
        self._files: dict[str, StoredFile] = {}  # by path, the oldest first
        self._lock = threading.Lock()
        atexit.register(self.close)

    def add(
        self, owner: Owner, name: str, content: bytes, columns: Columns | None = None
    ) -> StoredFile:
        """Store a file for a visit.

        Args:
            owner: The owner of the file.
            name: The file's name; characters that a file system may refuse are replaced by _.
            content: The file's content.
            columns: The columns of an uploaded table.

        Raises:
            OSError: The file cannot be written.
        """
        folder = self.folder / secrets.token_hex(16)
        path = folder / _safe_name(name)
        file = StoredFile(path, owner, len(content), time.monotonic(), columns)
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
        """Return the file at ``path`` if this visit owns it, otherwise None."""
        if not isinstance(path, str):
            return None
        file = self._files.get(path)
        if file is None or file.owner.visit != visit:
            return None
        return file

    def get(self, path: str) -> StoredFile:
        """Return a file of any visit.

        Raises:
            FileNotFoundError: The file does not exist, or no longer.
        """
        file = self._files.get(path)
        if file is None:
            raise FileNotFoundError(path)
        return file

    def remove(self, file: StoredFile) -> None:
        """Remove a file, unless it was removed before."""
        with self._lock:
            if str(file.path) in self._files:
                self._remove(file)

    def remove_old(self) -> None:
        """Remove files that were stored ``KEPT_SECONDS`` ago or longer."""
        with self._lock:
            for file in list(self._files.values()):
                if time.monotonic() - file.added > KEPT_SECONDS:
                    self._remove(file)

    def close(self) -> None:
        """Remove the folder with all files."""
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
        """Remove the oldest files of a visit or address that stores too much, until all fit."""
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
                own_files = [file for file in self._files.values() if file.owner.visit == visit]
            elif of_addresses.total() > MOST_BYTES:
                own_files = [file for file in self._files.values() if file.owner.address == address]
            else:
                return
            self._remove(own_files[0])


def _safe_name(name: str) -> str:
    """Reduce a file's name to one that every file system accepts."""
    plain = re.sub(r"[^\w .()-]", "_", name)
    # A character that the cut splits is left out.
    end = plain.encode()[-MOST_NAME_BYTES:].decode(errors="ignore").strip(" .")
    if not end:
        return "file"
    return end


def _remove_abandoned_folders() -> None:
    """Remove the temporary folders that killed processes of this user left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):  # another process may remove the folder meanwhile
            if not _is_own_folder(folder):
                continue
            with _lock_of(folder):  # raises Timeout while the folder's process is running
                shutil.rmtree(folder, ignore_errors=True)
            _lock_path(folder).unlink()


def _is_own_folder(path: Path) -> bool:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "getuid"):  # on Windows each user has a temporary folder
        return True
    return status.st_uid == os.getuid()


def _lock_of(folder: Path) -> FileLock:
    return FileLock(_lock_path(folder), timeout=0)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
