"""Tests that a file is hashed once for each size, mtime and inode, and that no result is used for another file."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.hub import file_verification as verification
from engines.hub.file_verification import Verification
from engines.hub.partial_file import FileEntry, FileHash

CONTENT = bytes(range(256)) * 20000
ENTRY = FileEntry(name="f", size_bytes=len(CONTENT), etag=hashlib.sha256(CONTENT).hexdigest())
NUM_CHUNKS = 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the sizes of the hashed chunks."""
    sizes: list[int] = []

    class Counting(FileHash):
        def update(self, data: bytes) -> None:
            sizes.append(len(data))
            super().update(data)

    monkeypatch.setattr(verification, "FileHash", Counting)
    return sizes


def _damage(path: Path) -> None:
    """Changes one byte and keeps size and mtime, as a failing disk does."""
    stat = path.stat()
    with path.open("r+b") as content:
        content.seek(1_000_000)
        content.write(b"\xff\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _write(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _remount(path: Path) -> None:
    """Gives the file another inode, as a start from an image does."""
    stat = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_file_is_hashed_once_in_the_life_of_a_machine(tmp_path: Path, file: Path, reads: list[int]) -> None:
    outcomes = [Verification(tmp_path / "verified.json").check(file, ENTRY) for _ in range(3)]

    assert outcomes == [True] * 3
    assert len(reads) == NUM_CHUNKS


@pytest.mark.parametrize(("change", "verdict"), [(_write, "written"), (_remount, "unknown")])
def test_a_file_that_changed_is_hashed_again(
    file: Path, reads: list[int], change: Callable[[Path], None], verdict: str
) -> None:
    checks = Verification()
    checks.check(file, ENTRY)
    change(file)

    assert checks.verdict(file, ENTRY) == verdict
    assert checks.check(file, ENTRY) is True
    assert checks.verdict(file, ENTRY) == "right"
    assert len(reads) == 2 * NUM_CHUNKS


def test_damage_that_leaves_no_trace_is_found_when_it_is_looked_for(file: Path) -> None:
    checks = Verification()
    checks.check(file, ENTRY)
    _damage(file)

    assert checks.check(file, ENTRY) is True
    assert checks.check(file, ENTRY, is_anew=True) is False
    assert checks.check(file, ENTRY) is False
    assert checks.verdict(file, ENTRY) == "wrong"


def test_a_file_of_another_size_need_not_be_read(file: Path, reads: list[int]) -> None:
    os.truncate(file, 100)

    assert Verification().check(file, ENTRY) is False
    assert reads == []


def test_a_paused_check_goes_on_where_it_was(file: Path, reads: list[int]) -> None:
    checks = Verification()
    outcomes = [checks.check(file, ENTRY, lambda: False) for _ in range(NUM_CHUNKS)]

    assert outcomes == [None] * NUM_CHUNKS
    assert checks.check(file, ENTRY) is True
    assert sum(reads) == len(CONTENT)


def test_a_paused_check_begins_anew_when_the_file_was_written_meanwhile(file: Path, reads: list[int]) -> None:
    checks = Verification()
    checks.check(file, ENTRY, lambda: False)
    _write(file)

    assert checks.check(file, ENTRY) is True
    assert len(reads) == 1 + NUM_CHUNKS


def test_a_file_that_is_written_while_it_is_read_is_not_judged(file: Path) -> None:
    def write() -> bool:
        _write(file)
        return True

    checks = Verification()

    assert checks.check(file, ENTRY, write) is None
    assert checks.verdict(file, ENTRY) == "unknown"


def test_a_file_without_a_known_hash_is_not_judged(file: Path) -> None:
    assert Verification().check(file, FileEntry(name="f", size_bytes=3, etag="")) is None


def test_a_disk_that_cannot_read_a_file_has_damaged_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FileHash):
        def update(self, data: bytes) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verification, "FileHash", Broken)

    assert Verification().check(file, ENTRY) is False


def test_the_hash_of_a_small_file_is_gits(file: Path) -> None:
    file.write_bytes(b"{}")
    entry = FileEntry(name="config.json", size_bytes=2, etag=hashlib.sha1(b"blob 2\0{}").hexdigest())

    assert Verification().check(file, entry) is True
    file.write_bytes(b"[]")
    assert Verification().check(file, entry) is False


def test_what_other_processes_found_is_known(tmp_path: Path, file: Path, reads: list[int]) -> None:
    first, second = (Verification(tmp_path / "verified.json") for _ in range(2))
    first.check(file, ENTRY)

    assert second.check(file, ENTRY) is True
    assert len(reads) == NUM_CHUNKS
