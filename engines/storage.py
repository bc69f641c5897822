"""Writes small files whole or not at all; and keeps values by key in one JSON file between starts."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import structlog

log = structlog.get_logger(__name__)

Value = TypeVar("Value")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON: of a disk that lost some, for example."""

_PRIVATE, _BY_UMASK = 0o600, 0o666
"""Permissions of a new file."""

_LOCK_WAIT_S, _LOCK_RETRY_S = 1.0, 0.005
"""How long a store waits for another process that writes, and between two looks. Writing takes under a millisecond; a
process that is stopped meanwhile must not stop the others."""


def temporary_path(path: Path) -> Path:
    """Returns a path beside `path` that no thread or process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def write_atomically(path: Path, content: bytes, *, is_private: bool = False, is_durable: bool = True) -> None:
    """Replaces a file's content as a whole: a reader sees the old or the new one. A link stays a link.

    Args:
        path: the file; its folder is made where it is missing.
        is_private: a new file is readable by its owner only, and one that exists keeps its permissions and its owner.
        is_durable: waits until the disk has the content, so that it survives a loss of power.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; the file is as it was.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = temporary_path(target)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE if is_private else _BY_UMASK)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        if is_private:
            _copy_permissions(target, fresh)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _copy_permissions(old: Path, new: Path) -> None:
    try:
        stat = old.stat()
    except FileNotFoundError:
        new.chmod(_PRIVATE)
        return
    new.chmod(stat.st_mode & 0o777)
    if hasattr(os, "chown"):
        with suppress(PermissionError):  # only root may give files away
            os.chown(new, stat.st_uid, stat.st_gid)


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Holds a lock on a file's folder, so that processes write one at a time.

    Goes on without it after `_LOCK_WAIT_S`, and where the system or the disk has no such locks.
    """
    try:
        import fcntl  # late: not on Windows

        parent = path.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not _is_locked(fcntl.flock, folder, fcntl.LOCK_EX | fcntl.LOCK_NB) and time.monotonic() < deadline:
            time.sleep(_LOCK_RETRY_S)
        yield
    finally:
        os.close(folder)


def _is_locked(flock: Callable[[int, int], None], descriptor: int, how: int) -> bool:
    """Tries to lock; True also where that is not possible at all, so that it need not be tried again."""
    try:
        flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class JsonStore(Generic[Value]):
    """Keeps values by key. Not thread-safe.

    Several processes may write the file. Each sets its own values and leaves the others as the file has them: what it
    read of these may be older, such as a proof that another process has taken back meanwhile.

    Args:
        path: the file; None keeps the values in memory only.
        kind: the type that msgspec decodes the file to, `dict[str, Value]`.
        keep: chooses what is kept of too many values; by default all are.
    """

    def __init__(
        self, path: Path | None, kind: Any, keep: Callable[[dict[str, Value]], dict[str, Value]] = lambda values: values
    ) -> None:
        self._path = path
        self._kind = kind
        self._keep = keep
        self._known = self._read()
        self._unwritten: dict[str, Value] = {}

    def get(self, key: str) -> Value | None:
        """Returns the value of `key`; None when there is none."""
        return self._known.get(key)

    def values(self) -> tuple[Value, ...]:
        """Returns all values."""
        return tuple(self._known.values())

    def refresh(self) -> None:
        """Reads what other processes have written. Blocks on the disk."""
        self._known = {**self._known, **self._read(), **self._unwritten}

    def put(self, key: str, value: Value) -> None:
        """Sets a value and writes the file; blocks on the disk. A disk that cannot be written is only logged: the next
        start has to measure again, and no more is lost."""
        self._unwritten[key] = value
        if self._path is None:
            self._merge()
            return
        with _only_writer(self._path):
            self._merge()
            self._write(self._path)

    def _merge(self) -> None:
        self.refresh()
        self._known = self._keep(self._known)
        self._unwritten = {key: value for key, value in self._unwritten.items() if key in self._known}

    def _read(self) -> dict[str, Value]:
        if self._path is None:
            return {}
        try:
            values: dict[str, Value] = msgspec.json.decode(self._path.read_bytes(), type=self._kind)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, *UNREADABLE) as error:
            log.warning("measurements.ignored", file=self._path.name, error=str(error))
            return {}
        return values

    def _write(self, path: Path) -> None:
        content = msgspec.json.format(msgspec.json.encode(self._known, order="deterministic"), indent=1)
        try:
            write_atomically(path, content, is_durable=False)
        except OSError as error:
            log.warning("measurements.not_written", file=path.name, error=str(error))
            return
        self._unwritten.clear()
