"""Judges reduced dtypes: how near their vectors are to float32's, and which is good enough. Knows no models.

`PrecisionStore` keeps what was measured, beside the other measurements in `STATE_DIR`.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.spec import CalibrationTexts, ModelSpec, Precision
from engines.storage import JsonStore
from engines.types import fingerprint

Vectors = NDArray[np.float32]

REDUCED = ("bfloat16", "float16", "int8", "int4")

MIN_COSINE = {"bfloat16": 0.999, "float16": 0.999, "int8": 0.99, "int4": 0.95}
"""The least cosine to float32 where the registry sets no `min_cosine`."""

_NEIGHBOURS = 10

_WORTHWHILE = 1.1
"""A dtype below this speedup is not offered."""


def compare(reduced: Vectors, full: Vectors) -> tuple[float, float, float]:
    """Returns the worst and the median cosine of `[n, D]` to `[n, D]`, and recall@10 within these texts."""
    a, b = _unit(reduced), _unit(full)
    cosines = (a * b).sum(1)
    return float(cosines.min()), float(np.median(cosines)), _recall(_nearest(a), _nearest(b))


def why_refused(precision: Precision, min_cosine: float | None) -> str:
    """Returns why a model in this dtype must not be served; empty where it may be."""
    least = MIN_COSINE[precision.dtype] if min_cosine is None else min_cosine
    if precision.worst_cosine >= least:
        return ""
    return (
        f"vectors in {precision.dtype} reach a cosine of {precision.worst_cosine:.4f} to float32 at worst, below "
        f"min_cosine {least:g}; set `dtype: float32` or a lower `min_cosine` in the registry"
    )


def is_compared_at_load(spec: ModelSpec) -> bool:
    """Whether a first load takes the bytes of float32 besides, to compare with; `min_cosine: 0` asks for none."""
    return spec.dtype in REDUCED and spec.min_cosine != 0 and spec.task in (None, "embed")


def describe_offer(precision: Precision, min_cosine: float | None = None) -> str:
    """Describes a measured dtype for a model that runs in float32; empty where it is not worth it or not allowed."""
    if precision.speedup < _WORTHWHILE or why_refused(precision, min_cosine):
        return ""
    return (
        f"{precision.dtype} would be {precision.speedup:.1f} × as fast here, with {precision.size_ratio:.0%} of the "
        f"memory, worst cosine {precision.worst_cosine:.4f}: set dtype"
    )


FORM_VERSIONS = {"bfloat16": 2, "int8": 4}
"""Raised when a dtype is computed in another way, so that what was measured before decides nothing any more; int8's is
in the fingerprint of spaces, too (`engines/space.py`).
2: int8 rounds queries, keys and values too, and attention in bfloat16 takes powers of two.
3: int8 rounds inputs behind norms by one step for all tokens."""


class PrecisionStore:
    """Keeps what was measured between starts. Thread-safe.

    Args:
        folder: where; None keeps it in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock = threading.Lock()
        self._kept: JsonStore[Precision] = JsonStore(
            folder / "precision.json" if folder else None, dict[str, Precision]
        )

    def get(self, spec: ModelSpec, revision: str, dtype: str, device: str) -> Precision | None:
        """Returns what decides about a model's files in a dtype on a kind of device; None without it.

        What was measured on the operator's texts decides where there are any: they are nearest to what is embedded.
        """
        own = self.get_on("own", spec, revision, dtype, device)
        return self.get_on("built-in", spec, revision, dtype, device) if own is None else own

    def get_on(
        self, texts: CalibrationTexts, spec: ModelSpec, revision: str, dtype: str, device: str
    ) -> Precision | None:
        """Returns what was measured on the built-in texts, or on the operator's."""
        with self._lock:
            return self._kept.get(_key(spec, revision, dtype, device, texts))

    def put(self, spec: ModelSpec, revision: str, precision: Precision, device: str) -> None:
        """Keeps what was measured; blocks on the disk. What was measured on other texts stays."""
        with self._lock:
            self._kept.refresh()
            self._kept.put(_key(spec, revision, precision.dtype, device, precision.texts), precision)

    def refresh(self) -> None:
        """Reads what other processes measured meanwhile, as `embedyard precision` does; blocks on the disk."""
        with self._lock:
            self._kept.refresh()

    def offers(self, spec: ModelSpec, revision: str, device: str) -> tuple[str, ...]:
        """Returns descriptions of the measured dtypes that a model in float32 could gain from."""
        known = [self.get(spec, revision, dtype, device) for dtype in REDUCED]
        return tuple(filter(None, (describe_offer(one, spec.min_cosine) for one in known if one is not None)))


def _key(spec: ModelSpec, revision: str, dtype: str, device: str, texts: CalibrationTexts) -> str:
    identity = [revision, dtype, FORM_VERSIONS.get(dtype, 1), device.partition(":")[0], spec.pooling, spec.max_tokens]
    return fingerprint(identity if texts == "built-in" else [*identity, texts])


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300))


def _nearest(vectors: NDArray[np.float64]) -> Sequence[set[int]]:
    """Returns the indexes of each text's nearest other texts."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    count = min(_NEIGHBOURS, len(vectors) - 1)
    return [set(map(int, row[:count])) for row in np.argsort(-scores, axis=1, kind="stable")]


def _recall(found: Sequence[set[int]], wanted: Sequence[set[int]]) -> float:
    total = sum(map(len, wanted))
    return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / total if total else 1.0
