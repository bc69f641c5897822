"""What models took when they were last loaded, kept on disk; and from it, or from their files, what they will take."""

import threading
from pathlib import Path

from msgspec import Struct

from engines.kept import Kept
from engines.protocols import Files
from engines.records import ModelFiles
from engines.slots import Need
from engines.spec import ModelSpec


class Measurement(Struct, frozen=True, kw_only=True):
    """Measured after a warm-up."""

    weight_bytes: int
    workspace_bytes: int
    load_s: float


class Measurements:
    """One JSON file for all hosts of a machine (`Kept`).

    Args:
        path: the file; None keeps the measurements in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()  # hosts share this object, each from threads of its own
        self._kept: Kept[Measurement] = Kept(path, dict[str, Measurement])

    def get(self, key: str) -> Measurement | None:
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Blocks on the disk."""
        with self._lock:
            self._kept.put(key, measurement)


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
