"""Stores values by key in a JSON file between starts. Several processes may write the same file: keys are merged.

Not thread-safe: threads that share a store need a lock.
"""

import os
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import structlog

log = structlog.get_logger(__name__)

Value = TypeVar("Value")


class JsonStore(Generic[Value]):
    """A dictionary in memory, backed by one JSON file.

    Args:
        path: the file; None keeps the values in memory only.
        kind: the type that msgspec decodes the file to, `dict[str, Value]`.
    """

    def __init__(self, path: Path | None, kind: Any) -> None:
        self._path = path
        self._kind = kind
        self._known = self._read()

    def get(self, key: str) -> Value | None:
        """Returns the value in memory, None if there is none; does not read the file."""
        return self._known.get(key)

    def refresh(self) -> None:
        """Reads the keys that other processes have written. Blocks on the disk."""
        self._known = {**self._known, **self._read()}

    def put(self, key: str, value: Value) -> None:
        """Sets a value and writes the file; blocks on the disk.

        A failed write only logs a warning: it costs the next start one measurement.
        """
        self._known = {**self._read(), **self._known, key: value}
        if self._path is not None:
            self._write(self._path)

    def _read(self) -> dict[str, Value]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            values: dict[str, Value] = msgspec.json.decode(self._path.read_bytes(), type=self._kind)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("measurements.ignored", file=self._path.name, error=str(error))
            return {}
        return values

    def _write(self, path: Path) -> None:
        """Replaces the file atomically: a reader never sees half of it."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.format(msgspec.json.encode(self._known, order="deterministic"), indent=1))
            part.replace(path)
        except OSError as error:
            log.warning("measurements.not_written", file=path.name, error=str(error))
