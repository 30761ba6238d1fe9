"""The file of the access log: every line, its mode, its rotation, and a disk that fails."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from clinora.serving.log import AccessLog
from tests.served import ROOT


@pytest.fixture
def path(tmp_path):
    return tmp_path / "access.log"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_lines_of_many_threads_are_all_there_and_whole(path):
    log = AccessLog(path)

    def add(thread):
        for number in range(200):
            log.add({"thread": thread, "number": number})

    threads = [threading.Thread(target=add, args=[thread]) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = lines_of(path)
    assert len(found) == 1600
    for thread in range(8):  # the lines of one thread keep their order
        assert [x["number"] for x in found if x["thread"] == thread] == list(range(200))


def test_lines_are_added_to_those_of_the_last_start(path):
    for number in range(3):
        log = AccessLog(path)
        log.add({"start": number})
        log.close()
    assert lines_of(path) == [{"start": 0}, {"start": 1}, {"start": 2}]


def test_only_the_owner_can_read_the_files_whatever_the_mask_and_the_mode_before(path):
    path.touch(0o644)
    mask = os.umask(0)
    try:
        log = AccessLog(path, most_bytes=100)
        for number in range(20):
            log.add({"number": number})
        log.close()
    finally:
        os.umask(mask)
    files = list(path.parent.iterdir())
    assert len(files) > 1
    assert {mode_of(file) for file in files} == {0o600}


def test_a_full_file_is_kept_as_an_older_one_and_the_oldest_is_removed(path):
    log = AccessLog(path, most_bytes=100, older_files=2)
    for number in range(40):
        log.add({"number": number})  # 15 or 16 bytes: six lines in a file
    log.close()
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "access.log", "access.log.1", "access.log.2"
    ]  # fmt: skip
    found = []
    for name in ("access.log.2", "access.log.1", "access.log"):
        file = path.with_name(name)
        assert 0 < file.stat().st_size <= 100
        found += [line["number"] for line in lines_of(file)]
    assert found == list(range(found[0], 40))  # the newest, without a gap


def test_a_line_that_is_longer_than_a_file_is_written_whole(path):
    log = AccessLog(path, most_bytes=10)
    log.add({"text": "x" * 50})
    log.close()
    assert lines_of(path) == [{"text": "x" * 50}]


@pytest.mark.parametrize("place", ["missing/access.log", "folder", "link", "pipe"])
def test_a_file_that_cannot_be_a_log_is_an_error_at_once(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        AccessLog(tmp_path / place)


# A limit of the file's size stands in for a disk of 100 bytes: the last line fits in part.
ON_A_FULL_DISK = """
import resource, sys
from clinora.serving.log import AccessLog
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
log = AccessLog(sys.argv[1])
for number in range(9):
    log.add({"number": number, "text": "canary"})
log.close()
print(log.lost_lines)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log = AccessLog(sys.argv[1])
log.add({"number": 9})
log.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of the size of files")
def test_a_full_disk_loses_whole_lines_and_is_reported_once(path):
    command = [sys.executable, "-c", ON_A_FULL_DISK, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line["number"] for line in lines_of(path)] == [0, 1, 2, 9]  # 32 bytes each
    assert done.stdout == "6\n"
    assert done.stderr.count("\n") == 1 and "OSError" in done.stderr
    assert "canary" not in done.stderr


def test_after_a_failed_rotation_the_log_continues(path, monkeypatch):
    log = AccessLog(path, most_bytes=40)
    replace, fails = os.replace, [True]

    def replace_or_fail(*names):
        if fails:
            raise PermissionError(fails.pop())
        replace(*names)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    for number in range(6):
        log.add({"number": number})
    log.close()
    files = sorted(path.parent.iterdir(), reverse=True)
    found = [line["number"] for file in files for line in lines_of(file)]
    assert log.lost_lines == 0
    assert found == list(range(6))


def test_a_file_that_cannot_be_renamed_takes_lines_up_to_twice_its_size(path, monkeypatch, caplog):
    log = AccessLog(path, most_bytes=40)
    replace = os.replace

    def fail(*_names):
        raise PermissionError("the folder is not writable")

    monkeypatch.setattr(os, "replace", fail)
    for number in range(9):
        log.add({"number": number})  # 14 bytes: two in 40 bytes, five in 80 bytes
    log.close()
    assert [line["number"] for line in lines_of(path)] == [0, 1, 2, 3, 4]
    assert log.lost_lines == 4
    assert len(caplog.records) == 1
    monkeypatch.setattr(os, "replace", replace)
    log = AccessLog(path, most_bytes=40)
    log.add({"number": 9})
    log.close()
    assert lines_of(path) == [{"number": 9}]
    assert len(lines_of(path.with_name("access.log.1"))) == 5


def test_a_disk_that_hangs_delays_nobody_and_fills_no_memory(path, monkeypatch):
    monkeypatch.setattr("clinora.serving.log.MOST_WAITING_LINES", 10)
    log = AccessLog(path)
    may_go_on, hangs, dumps = threading.Event(), threading.Event(), json.dumps

    def hang_and_dump(entry):
        hangs.set()
        may_go_on.wait(30)
        return dumps(entry)

    monkeypatch.setattr("clinora.serving.log.json.dumps", hang_and_dump)
    log.add({"number": 0})
    assert hangs.wait(30)
    for number in range(1, 15):
        log.add({"number": number})  # returns although nothing can be written
    may_go_on.set()
    log.close()
    assert log.lost_lines == 4
    assert [line["number"] for line in lines_of(path)] == list(range(11))
