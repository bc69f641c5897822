"""Which files of the hub's cache were hashed, and how it came out.

A file is damaged after its download by a disk, a copy, or a person; its name says what should be in it. To hash it
takes a second for a gigabyte and a half, so it is done once for each size, time and inode of a file, and never while a
load is waited for, unless the file was written to since it was hashed.

`huggingface_hub` has the same check (`HfApi.verify_repo_checksums`, `hf cache verify`); but it asks the hub for the
hashes, which may be away, and it cannot be paused.
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

GoOn = Callable[[], bool]
"""HubRequest after each megabyte; False pauses."""

Verdict = Literal["right", "wrong", "unknown", "written"]
"""Of the hash of a file; `written`: its size or time are others than when it was hashed."""

_READ_BYTES = 1 << 20


class Hashed(Struct, frozen=True):
    """How a file looked when it was hashed, and whether its hash was the one that it is named by."""

    size_bytes: int
    mtime_ns: int
    inode: int
    etag: str
    is_right: bool = True


class _Begun(Struct, frozen=True):
    """A hash that was paused after so many bytes."""

    looks: Hashed
    digest: FileHash
    num_bytes: int


class Verification:
    """Remembers the hashes of cached files in one `JsonStore` for all models of a machine. Thread-safe.

    Args:
        path: None remembers them in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._kept: JsonStore[Hashed] = JsonStore(path, dict[str, Hashed])
        self._begun: dict[str, _Begun] = {}

    def verdict(self, path: Path, file: FileEntry) -> Verdict:
        """What is known of the file as it is now, without reading it.

        Raises:
            OSError: it is not there.
        """
        looks = _look(path, file)
        with self._lock:
            known = self._kept.get(_key(path))
        if known is None or known.etag != file.etag:
            return "unknown"
        if (known.size_bytes, known.mtime_ns) != (looks.size_bytes, looks.mtime_ns):
            return "written"
        if known.inode != looks.inode:
            return "unknown"  # an image or a volume that was mounted anew
        return "right" if known.is_right else "wrong"

    def note(self, path: Path, file: FileEntry, *, is_right: bool) -> None:
        """The file has just been hashed, by whoever brought or needed it."""
        if not file.etag:
            return
        looks = _look(path, file, is_right=is_right)
        with self._lock:
            self._kept.put(_key(path), looks)

    def check(self, path: Path, file: FileEntry, go_on: GoOn = lambda: True, *, is_anew: bool = False) -> bool | None:
        """Whether the file has its hash: as remembered, else by reading it. None: not yet, or its hash is not known.

        Args:
            go_on: a check that it pauses is gone on with by the next call.
            is_anew: read it even if the outcome is remembered: a disk may fail without a trace.

        Raises:
            OSError: it cannot be read.
        """
        if not file.etag:
            return None
        verdict = self.verdict(path, file)
        if verdict in ("right", "wrong") and not is_anew:
            return verdict == "right"
        with self._lock:
            self._kept.refresh()  # another process of this machine may have done it
        if not is_anew and self.verdict(path, file) == "right":
            return True
        try:
            is_right = self._read(path, file, go_on)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            is_right = False
        if is_right is not None:
            self.note(path, file, is_right=is_right)
        return is_right

    def _read(self, path: Path, file: FileEntry, go_on: GoOn) -> bool | None:
        looks, key = _look(path, file), _key(path)
        if looks.size_bytes != file.size_bytes:
            return False
        with self._lock:
            begun = self._begun.pop(key, None)
        if begun is None or begun.looks != looks:
            begun = _Begun(looks, FileHash(file), 0)
        digest, num_bytes = begun.digest, begun.num_bytes
        digest.resume()
        with path.open("rb") as content:
            content.seek(num_bytes)
            while chunk := content.read(_READ_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
                if not go_on():
                    with self._lock:
                        self._begun = {key: _Begun(looks, digest, num_bytes)}
                    return None
        return digest.is_right() if _look(path, file) == looks else None


def _key(path: Path) -> str:
    """One for all snapshots that show a blob."""
    return os.path.realpath(path)


def _look(path: Path, file: FileEntry, *, is_right: bool = True) -> Hashed:
    stat = path.stat()
    return Hashed(stat.st_size, stat.st_mtime_ns, stat.st_ino, file.etag, is_right)
