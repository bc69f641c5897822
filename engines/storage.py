"""Writes small files whole or not at all; and keeps values by key in one JSON file between starts."""

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
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


class JsonStore(Generic[Value]):
    """Keeps values by key. Several processes may write the file: what others wrote is kept. Not thread-safe.

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

    def get(self, key: str) -> Value | None:
        """Returns the value of `key`; None when there is none."""
        return self._known.get(key)

    def values(self) -> tuple[Value, ...]:
        """Returns all values."""
        return tuple(self._known.values())

    def refresh(self) -> None:
        """Reads what other processes have written. Blocks on the disk."""
        self._known = {**self._known, **self._read()}

    def put(self, key: str, value: Value) -> None:
        """Sets a value and writes the file; blocks on the disk. A disk that cannot be written is only logged: the next
        start has to measure again, and no more is lost."""
        self._known = self._keep({**self._read(), **self._known, key: value})
        if self._path is not None:
            self._write(self._path)

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
