"""Hashes the tensors of weight files, and remembers the results by the files' size, times and inode.

The digest of a safetensors file is the sum of its tensors' hashes (name, dtype, shape, bytes), modulo 2^256. The sum
over a model's files is therefore the same however its tensors are spread over files, and whatever else their headers
say. Pickled files are hashed as they are, because reading their tensors would run their code; in a hub's cache the
name of a blob is that hash already.

Hashing takes a second for 0.7 to 0.95 GB (one core of an AMD EPYC beside other work), once for each file of a machine.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from engines.errors import FilesChanged, ShuttingDown
from engines.hub.weight_files import read_header, read_range
from engines.storage import JsonStore

MAX_RECORDS = 4096
"""Files that are remembered; the one that was hashed first is dropped for a new one."""

_READ_BYTES = 1 << 20
SERVING_REST_SHARE = 0.5
"""As when a download is hashed (`engines/hub/partial_file.py`)."""

_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
_MODULO = 1 << 256

GoOn = Callable[[], bool]
"""Called after each megabyte; False ends the work."""


Pause = Callable[[float], None]
"""Called after each part that was hashed, with the seconds of CPU time that it took."""

_LEAST_SPENT_S = 1e-4
"""Below that, a sleep costs more than it gives."""


class FileStamp(Struct, frozen=True):
    """What changes when a file is written or replaced; `ctime_ns` also where a program sets the mtime back."""

    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int = 0


class DigestRecord(Struct, frozen=True):
    """The digest of a file, and its stamp when it was hashed. `at_s`: when, in Unix seconds."""

    stamp: FileStamp
    digest: str
    at_s: float


class WeightFile(Struct, frozen=True):
    """A weight file as it was when its model began to load."""

    path: Path
    stamp: FileStamp

    @classmethod
    def at(cls, path: Path) -> "WeightFile":
        """Raises OSError where there is no such file."""
        return cls(path, _stamp_of(path))


class ContentDigests:
    """Hashes weight files once. Thread-safe.

    Args:
        folder: where results are kept between starts; None keeps them in memory only.
        rest_share: of the CPU time spent is slept, for requests that are served beside it.
    """

    def __init__(self, folder: Path | None, *, rest_share: float = 0.0) -> None:
        self._rest_share = rest_share
        self._lock = threading.Lock()
        path = folder / "digests.json" if folder else None
        self._records: JsonStore[DigestRecord] = JsonStore(path, dict[str, DigestRecord], keep=_newest)

    def digest(self, files: Iterable[WeightFile], go_on: GoOn = lambda: True) -> str:
        """Returns the digest of the tensors of all files together, 64 hex digits; blocks on the disk.

        Raises:
            FilesChanged: a file is another one than when it was named.
            BrokenFiles: a file is no safetensors file.
            ShuttingDown: `go_on` returned False.
            OSError: a file cannot be read.
        """
        total = sum(int(self._file_digest(file, go_on), 16) for file in files)
        return f"{total % _MODULO:064x}"

    def _file_digest(self, file: WeightFile, go_on: GoOn) -> str:
        path = file.path.resolve()
        if file.path.suffix != ".safetensors" and path.parent.name == "blobs" and _BLOB_NAME.fullmatch(path.name):
            return path.name
        with self._lock:
            known = self._records.get(str(path))
        if known is not None and known.stamp == file.stamp:
            return known.digest
        pause = partial(_pause, go_on, self._rest_share)
        _check_unchanged(file)
        digest = _hash_tensors(file, pause) if file.path.suffix == ".safetensors" else _hash_bytes(file, pause)
        _check_unchanged(file)
        with self._lock:
            self._records.put(str(path), DigestRecord(file.stamp, digest, time.time()))
        return digest


def _newest(records: dict[str, DigestRecord]) -> dict[str, DigestRecord]:
    if len(records) <= MAX_RECORDS:
        return records
    return dict(sorted(records.items(), key=lambda item: item[1].at_s)[-MAX_RECORDS:])


def _check_unchanged(file: WeightFile) -> None:
    if _stamp_of(file.path) != file.stamp:
        raise FilesChanged(f"{file.path.name} was written since its model began to load")


def _stamp_of(path: Path) -> FileStamp:
    stat = path.stat()
    return FileStamp(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


def _hash_tensors(file: WeightFile, pause: Pause) -> str:
    size_bytes = file.stamp.size_bytes
    tensors = read_header(file.path.name, size_bytes, partial(read_range, file.path.parent))
    data_start = size_bytes - max((tensor.end for tensor in tensors), default=0)
    total = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        digest = hashlib.sha256(msgspec.json.encode([tensor.name, tensor.dtype, tensor.shape]))
        _update(digest.update, file.path, (data_start + tensor.start, data_start + tensor.end), pause)
        total += int.from_bytes(digest.digest(), "big")
    return f"{total % _MODULO:064x}"


def _hash_bytes(file: WeightFile, pause: Pause) -> str:
    digest = hashlib.sha256()
    _update(digest.update, file.path, (0, file.stamp.size_bytes), pause)
    return digest.hexdigest()


def _update(update: Callable[[bytes], None], path: Path, span: tuple[int, int], pause: Pause) -> None:
    """Hashes a range of a file; hashlib releases the GIL, so that the model loads meanwhile."""
    left = span[1] - span[0]
    with path.open("rb") as content:
        content.seek(span[0])
        while left > 0 and (chunk := content.read(min(left, _READ_BYTES))):
            begun_s = time.thread_time()
            update(chunk)
            left -= len(chunk)
            pause(time.thread_time() - begun_s)


def _pause(go_on: GoOn, rest_share: float, spent_s: float) -> None:
    if not go_on():
        raise ShuttingDown("hashing was stopped: the model left")
    if spent_s > _LEAST_SPENT_S:
        time.sleep(rest_share * spent_s)
