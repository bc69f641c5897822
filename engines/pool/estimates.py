"""Estimates the memory that a model needs, from earlier measurements on disk or from its files."""

import threading
from pathlib import Path

from msgspec import Struct, structs

from engines.form_cache import QUANTIZED, FormCache
from engines.pool.slot import MemoryNeed, SmallerForm
from engines.precision import PrecisionStore, is_compared_at_load
from engines.protocols import Files
from engines.spec import Dtype, ModelSpec, in_dtype
from engines.storage import JsonStore
from engines.types import ModelFiles


class Measurement(Struct, frozen=True, kw_only=True):
    """Memory and load time of a model, measured after its warm-up."""

    weight_bytes: int
    workspace_bytes: int
    load_s: float


class Measurements:
    """Stores measurements in one JSON file for all hosts of a machine (`JsonStore`). Thread-safe.

    Args:
        path: the file; None keeps the measurements in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()  # hosts share this object and use it from different threads
        self._store: JsonStore[Measurement] = JsonStore(path, dict[str, Measurement])

    def get(self, key: str) -> Measurement | None:
        with self._lock:
            return self._store.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Saves a measurement; blocks on the disk."""
        with self._lock:
            self._store.put(key, measurement)


class ReducedForms(Struct, frozen=True):
    """What earlier loads left of reduced dtypes.

    `precisions`: what was compared with float32, so that no load does so again; None: whatever was loaded before was
    compared. `kept`: quantised weights on disk; None: no load is charged for float weights that it rounds.
    """

    precisions: PrecisionStore | None = None
    kept: FormCache | None = None


class Estimates:
    """Estimates memory on one device. Blocks, sometimes on the network: call it on a thread.

    Args:
        workspace_bytes: the guess for a model without a measurement.
        conditions: the settings that the bytes depend on (`HostConfig.conditions`).
        reduced: what is known of reduced dtypes.
    """

    def __init__(
        self,
        files: Files,
        measurements: Measurements,
        device: str,
        workspace_bytes: int,
        conditions: str = "",
        reduced: ReducedForms | None = None,
    ) -> None:
        self._files = files
        self._measurements = measurements
        self._device = device
        self._workspace_bytes = workspace_bytes
        self._conditions = conditions
        self._reduced = reduced or ReducedForms()

    def estimate(self, spec: ModelSpec, files: ModelFiles | None) -> MemoryNeed | None:
        """Estimates the model's memory, in each dtype that a load may take; None if unknown."""
        need = self._estimate(spec, files)
        if need is not None and spec.offload == "allowed":
            need = structs.replace(need, parts=())
        if need is None or not spec.smaller_dtypes:
            return need
        others = ((dtype, self._estimate(in_dtype(spec, dtype), files)) for dtype in spec.smaller_dtypes)
        return structs.replace(need, smaller=tuple(SmallerForm(dtype, other or need) for dtype, other in others))

    def _estimate(self, spec: ModelSpec, files: ModelFiles | None) -> MemoryNeed | None:
        """Estimates the model's memory in `dtype`; None if unknown.

        Measurements count as guesses, as settings and software change: only weights from safetensors headers are
        certain and can refuse a model. Five cases:

        1. measured under the same settings;  2. measured under other settings: at least the weights of the headers;
        3. weights from the headers;  4. only the size on disk is known: a guess;  5. nothing is known.

        To 1, 2 and 3 the weights in float32 are added where the load will compare with them; and, as a guess, those
        that it holds until they are rounded.
        """
        same, other = self._find_measurements(spec, files) if files else (None, None)
        weight_bytes = self._files.weight_bytes(spec, self._device)
        compared_bytes = self._compared_bytes(spec, files, was_loaded=bool(same or other))
        rounded_bytes = self._rounded_bytes(spec, files)
        if same is not None:
            least_bytes = min(weight_bytes or 0, same.weight_bytes)
            return _need_of(
                same, same.weight_bytes + compared_bytes + rounded_bytes, least_bytes + compared_bytes
            )  # (1)
        if other is not None:
            least_bytes = weight_bytes or 0
            more_bytes = max(least_bytes, other.weight_bytes)
            return _need_of(other, more_bytes + compared_bytes + rounded_bytes, least_bytes + compared_bytes)  # (2)
        if weight_bytes is not None:
            weight_bytes += compared_bytes
            return MemoryNeed(
                weight_bytes=weight_bytes + rounded_bytes,
                workspace_bytes=self._workspace_bytes,
                least_weight_bytes=weight_bytes,
                weights_known=not rounded_bytes,
            )  # (3)
        if files is not None:
            return MemoryNeed(weight_bytes=files.size_bytes, workspace_bytes=self._workspace_bytes)  # (4)
        return None  # (5)

    def _compared_bytes(self, spec: ModelSpec, files: ModelFiles | None, *, was_loaded: bool) -> int:
        """Returns the bytes of the float32 form that the load will build to compare with; 0 where it builds none."""
        if not is_compared_at_load(spec) or self._is_compared(spec, files, was_loaded=was_loaded):
            return 0
        return self._files.weight_bytes(structs.replace(spec, dtype="float32"), self._device) or 0

    def _rounded_bytes(self, spec: ModelSpec, files: ModelFiles | None) -> int:
        """Returns how many more bytes float weights take, until they are rounded, than the form that they become; 0
        where the load reads that form from disk."""
        if self._reduced.kept is None or spec.dtype not in QUANTIZED:
            return 0
        is_on_cpu = self._device.partition(":")[0] == "cpu"
        if is_on_cpu and files is not None and self._reduced.kept.is_kept(spec, files.revision):
            return 0
        read_in: Dtype = "float32" if is_on_cpu else "bfloat16"
        full, own = (self._files.weight_bytes(one, self._device) for one in (in_dtype(spec, read_in), spec))
        return max(0, (full or 0) - (own or 0))

    def _is_compared(self, spec: ModelSpec, files: ModelFiles | None, *, was_loaded: bool) -> bool:
        if self._reduced.precisions is None or files is None:
            return was_loaded
        return self._reduced.precisions.get(spec, files.revision, spec.dtype, self._device) is not None

    def save(self, spec: ModelSpec, files: ModelFiles, measurement: Measurement) -> None:
        """Saves a measurement for later estimates."""
        for key in self._keys(spec, files):
            self._measurements.put(key, measurement)

    def _find_measurements(self, spec: ModelSpec, files: ModelFiles) -> tuple[Measurement | None, Measurement | None]:
        """Returns the measurements under these settings and under any settings."""
        exact, plain = self._keys(spec, files)
        return self._measurements.get(exact), self._measurements.get(plain)

    def _keys(self, spec: ModelSpec, files: ModelFiles) -> tuple[str, str]:
        """Returns the store's keys for these settings and for any settings: revision, dtype, kind of device, largest
        batch.

        A vector cache in the device's memory (CPU) counts as weights.
        """
        kind = self._device.partition(":")[0]
        plain = f"{files.revision} {spec.dtype} {kind} {spec.max_batch_tokens or 'default'}"
        if kind == "cpu" and spec.cache_bytes:
            plain += f" cache={spec.cache_bytes}"
        return f"{plain} {self._conditions}".rstrip(), plain


def _need_of(measured: Measurement, weight_bytes: int, least_weight_bytes: int) -> MemoryNeed:
    """Builds an estimate from a measurement, with other weights."""
    return MemoryNeed(
        weight_bytes=weight_bytes,
        workspace_bytes=measured.workspace_bytes,
        least_weight_bytes=least_weight_bytes,
        load_s=measured.load_s,
    )
