"""One JSON file of values by key, kept between starts. Several processes may write it: what it held is kept.

Not for threads: whoever shares one guards it.
"""

import os
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import structlog

log = structlog.get_logger(__name__)

Value = TypeVar("Value")


class JsonStore(Generic[Value]):
    """Values by key.

    Args:
        path: the file; None keeps them in memory only.
        kind: `dict[str, Value]`, as msgspec reads it.
    """

    def __init__(self, path: Path | None, kind: Any) -> None:
        self._path = path
        self._kind = kind
        self._known = self._read()

    def get(self, key: str) -> Value | None:
        """What is known."""
        return self._known.get(key)

    def refresh(self) -> None:
        """Learn what other processes have written. Blocks on the disk."""
        self._known = {**self._known, **self._read()}

    def put(self, key: str, value: Value) -> None:
        """Blocks on the disk. A disk that cannot be written costs the next start a measurement, so it only warns."""
        self._known = {**self._read(), **self._known, key: value}
        if self._path is not None:
            self._write(self._path)

    def _read(self) -> dict[str, Value]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            known: dict[str, Value] = msgspec.json.decode(self._path.read_bytes(), type=self._kind)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("measurements.ignored", file=self._path.name, error=str(error))
            return {}
        return known

    def _write(self, path: Path) -> None:
        """Whole or not at all: a reader never sees half a file."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.format(msgspec.json.encode(self._known, order="deterministic"), indent=1))
            part.replace(path)
        except OSError as error:
            log.warning("measurements.not_written", file=path.name, error=str(error))
