"""Hashes files in the hub cache and remembers the results.

A disk, a copy or a person may damage a file after its download; the name of its blob is its expected hash. Hashing
takes a second per 1.5 GB, so a file is hashed once for each size, mtime and inode, and never while a load waits,
unless the file was written since its last check.

`huggingface_hub` has the same check (`HfApi.verify_repo_checksums`, `hf cache verify`), but it requests the hashes from
the hub, which may be unreachable, and cannot be paused.
"""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from engines.hub.partial_file import FileEntry, FileHash
from engines.storage import JsonStore

ShouldContinue = Callable[[], bool]
"""Called after each megabyte; False pauses the check."""

Verdict = Literal["right", "wrong", "unknown", "written"]
"""Result of a file's last hash check; `written`: its size or mtime differ from those at the check."""

_READ_BYTES = 1 << 20


class HashRecord(Struct, frozen=True):
    """A file's size, mtime and inode when it was hashed, and whether the hash matched its etag."""

    size_bytes: int
    mtime_ns: int
    inode: int
    etag: str
    is_right: bool = True


class _PausedHash(Struct, frozen=True):
    """A hash computation that was paused after `num_bytes`."""

    before: HashRecord
    digest: FileHash
    num_bytes: int


class Verification:
    """Checks cached files against their hashes; keeps the results of all models in one `JsonStore`. Thread-safe.

    Args:
        path: the store's file; None keeps results in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._records: JsonStore[HashRecord] = JsonStore(path, dict[str, HashRecord])
        self._paused: dict[str, _PausedHash] = {}

    def verdict(self, path: Path, file: FileEntry) -> Verdict:
        """Returns the remembered result for the file in its current state, without reading it.

        Raises:
            OSError: the file does not exist.
        """
        looks = _current_record(path, file)
        with self._lock:
            known = self._records.get(_key(path))
        if known is None or known.etag != file.etag:
            return "unknown"
        if (known.size_bytes, known.mtime_ns) != (looks.size_bytes, looks.mtime_ns):
            return "written"
        if known.inode != looks.inode:
            return "unknown"  # a remounted image or volume
        return "right" if known.is_right else "wrong"

    def record(self, path: Path, file: FileEntry, *, is_right: bool) -> None:
        """Stores the result of a hash that the caller has just computed."""
        if not file.etag:
            return
        looks = _current_record(path, file, is_right=is_right)
        with self._lock:
            self._records.put(_key(path), looks)

    def check(
        self, path: Path, file: FileEntry, should_continue: ShouldContinue = lambda: True, *, is_anew: bool = False
    ) -> bool | None:
        """Returns whether the file matches its hash, as remembered or else by reading it.

        None: the check was paused, the file changed meanwhile, or its hash is unknown.

        Args:
            should_continue: the next call resumes a check that it paused.
            is_anew: read the file even if a result is remembered: a disk may fail without changing mtime or size.

        Raises:
            OSError: the file cannot be read.
        """
        if not file.etag:
            return None
        verdict = self.verdict(path, file)
        if verdict in ("right", "wrong") and not is_anew:
            return verdict == "right"
        with self._lock:
            self._records.refresh()  # another process of this machine may have checked it
        if not is_anew and self.verdict(path, file) == "right":
            return True
        try:
            is_right = self._read(path, file, should_continue)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            is_right = False
        if is_right is not None:
            self.record(path, file, is_right=is_right)
        return is_right

    def _read(self, path: Path, file: FileEntry, should_continue: ShouldContinue) -> bool | None:
        before, key = _current_record(path, file), _key(path)
        if before.size_bytes != file.size_bytes:
            return False
        with self._lock:
            paused = self._paused.pop(key, None)
        if paused is None or paused.before != before:
            paused = _PausedHash(before, FileHash(file), 0)
        digest, num_bytes = paused.digest, paused.num_bytes
        digest.resume()
        with path.open("rb") as content:
            content.seek(num_bytes)
            while chunk := content.read(_READ_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
                if not should_continue():
                    with self._lock:
                        self._paused = {key: _PausedHash(before, digest, num_bytes)}
                    return None
        return digest.is_right() if _current_record(path, file) == before else None


def _key(path: Path) -> str:
    """Returns the path of the blob, which is the same for all snapshots that link to it."""
    return os.path.realpath(path)


def _current_record(path: Path, file: FileEntry, *, is_right: bool = True) -> HashRecord:
    stat = path.stat()
    return HashRecord(stat.st_size, stat.st_mtime_ns, stat.st_ino, file.etag, is_right)
