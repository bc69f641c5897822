"""What models took when they were last loaded, kept on disk; and from it, or from their files, what they will take."""

import os
import threading
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from engines.protocols import Files
from engines.records import ModelFiles
from engines.slots import Need
from engines.spec import ModelSpec

log = structlog.get_logger(__name__)


class Measurement(Struct, frozen=True, kw_only=True):
    """Measured after a warm-up."""

    weight_bytes: int
    workspace_bytes: int
    load_s: float


class Measurements:
    """One JSON file for all hosts of a machine. Several processes may write it: what it held is kept.

    Args:
        path: the file; None keeps the measurements in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()  # hosts share this object, each from threads of its own
        self._known = self._read()

    def get(self, key: str) -> Measurement | None:
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Blocks on the disk. A disk that cannot be written costs the next start an estimate, so it only warns."""
        with self._lock:
            self._known = {**self._read(), **self._known, key: measurement}
            if self._path is not None:
                self._write(self._path)

    def _read(self) -> dict[str, Measurement]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Measurement])
        except (OSError, msgspec.DecodeError) as error:
            log.warning("measurements.ignored", file=self._path.name, error=str(error))
            return {}

    def _write(self, path: Path) -> None:
        """Whole or not at all: a reader never sees half a file."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.format(msgspec.json.encode(self._known, order="deterministic"), indent=1))
            part.replace(path)
        except OSError as error:
            log.warning("measurements.not_written", file=path.name, error=str(error))


class Estimates:
    """What a model will take on one device. Blocks, sometimes on the network: call it on a thread."""

    def __init__(self, files: Files, measurements: Measurements, device: str, workspace_bytes: int) -> None:
        """`workspace_bytes`: the guess for a model that never ran here."""
        self._files = files
        self._measurements = measurements
        self._device = device
        self._workspace_bytes = workspace_bytes

    def estimate(self, spec: ModelSpec, files: ModelFiles | None) -> Need | None:
        """Four cases:

        1. measured before;  2. the headers tell the weights;
        3. only the size on disk is known: a guess;  4. nothing is known.
        """
        measured = self._measurements.get(self._key(spec, files)) if files else None
        if measured is not None:
            return Need(
                weight_bytes=measured.weight_bytes,
                workspace_bytes=measured.workspace_bytes,
                weights_known=True,
                workspace_known=True,
                load_s=measured.load_s,
            )  # (1)
        weight_bytes = self._files.weight_bytes(spec, self._device)
        if weight_bytes is not None:
            return Need(weight_bytes=weight_bytes, workspace_bytes=self._workspace_bytes, weights_known=True)  # (2)
        if files is not None:
            return Need(weight_bytes=files.size_bytes, workspace_bytes=self._workspace_bytes)  # (3)
        return None  # (4)

    def remember(self, spec: ModelSpec, files: ModelFiles, measurement: Measurement) -> None:
        """Next time it is known."""
        self._measurements.put(self._key(spec, files), measurement)

    def _key(self, spec: ModelSpec, files: ModelFiles) -> str:
        """What the bytes depend on: the weights, their type, the kind of device, and the largest batch."""
        kind = self._device.partition(":")[0]
        return f"{files.revision} {spec.dtype} {kind} {spec.max_batch_tokens or 'default'}"
