"""What models took when they were last loaded, kept on disk; and from it, or from their files, what they will take."""

import threading
from pathlib import Path

from msgspec import Struct

from engines.pool.slot import MemoryNeed
from engines.protocols import Files
from engines.spec import ModelSpec
from engines.storage import JsonStore
from engines.types import ModelFiles


class Measurement(Struct, frozen=True, kw_only=True):
    """Measured after a warm-up."""

    weight_bytes: int
    workspace_bytes: int
    load_s: float


class Measurements:
    """One JSON file for all hosts of a machine (`JsonStore`).

    Args:
        path: the file; None keeps the measurements in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()  # hosts share this object, each from threads of its own
        self._kept: JsonStore[Measurement] = JsonStore(path, dict[str, Measurement])

    def get(self, key: str) -> Measurement | None:
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Blocks on the disk."""
        with self._lock:
            self._kept.put(key, measurement)


class Estimates:
    """What a model will take on one device. Blocks, sometimes on the network: call it on a thread.

    Args:
        workspace_bytes: the guess for a model that never ran here.
        conditions: what the bytes depend on beside the model and the device (`HostConfig.conditions`).
    """

    def __init__(
        self, files: Files, measurements: Measurements, device: str, workspace_bytes: int, conditions: str = ""
    ) -> None:
        self._files = files
        self._measurements = measurements
        self._device = device
        self._workspace_bytes = workspace_bytes
        self._conditions = conditions

    def estimate(self, spec: ModelSpec, files: ModelFiles | None) -> MemoryNeed | None:
        """What is remembered is a guess, for settings and software change: only the headers can refuse a model.

        1. measured before under these very settings;  2. measured under others: no less than the headers tell;
        3. the headers tell the weights;  4. only the size on disk is known: a guess;  5. nothing is known.
        """
        same, other = self._remembered(spec, files) if files else (None, None)
        weight_bytes = self._files.weight_bytes(spec, self._device)
        if same is not None:
            return _guess(same, same.weight_bytes, min(weight_bytes or 0, same.weight_bytes))  # (1)
        if other is not None:
            least_bytes = weight_bytes or 0
            return _guess(other, max(least_bytes, other.weight_bytes), least_bytes)  # (2)
        if weight_bytes is not None:
            return MemoryNeed(
                weight_bytes=weight_bytes, workspace_bytes=self._workspace_bytes, weights_known=True
            )  # (3)
        if files is not None:
            return MemoryNeed(weight_bytes=files.size_bytes, workspace_bytes=self._workspace_bytes)  # (4)
        return None  # (5)

    def remember(self, spec: ModelSpec, files: ModelFiles, measurement: Measurement) -> None:
        """Next time it is known."""
        for key in self._keys(spec, files):
            self._measurements.put(key, measurement)

    def _remembered(self, spec: ModelSpec, files: ModelFiles) -> tuple[Measurement | None, Measurement | None]:
        """What it took under these settings, and what it took last under any."""
        exact, plain = self._keys(spec, files)
        return self._measurements.get(exact), self._measurements.get(plain)

    def _keys(self, spec: ModelSpec, files: ModelFiles) -> tuple[str, str]:
        """Under these settings, and under any: the weights, their type, the kind of device, and the largest batch.

        A vector cache counts as weights where it is in the device's memory.
        """
        kind = self._device.partition(":")[0]
        plain = f"{files.revision} {spec.dtype} {kind} {spec.max_batch_tokens or 'default'}"
        if kind == "cpu" and spec.cache_bytes:
            plain += f" cache={spec.cache_bytes}"
        return f"{plain} {self._conditions}".rstrip(), plain


def _guess(measured: Measurement, weight_bytes: int, least_weight_bytes: int) -> MemoryNeed:
    """What it took last is what it will take, but for the weights."""
    return MemoryNeed(
        weight_bytes=weight_bytes,
        workspace_bytes=measured.workspace_bytes,
        least_weight_bytes=least_weight_bytes,
        load_s=measured.load_s,
    )
