"""Vectors that were computed before, by what they depend on: exact, least recently used leaves first. Off by default.

One cache belongs to one engine, thus to one revision and dtype; the key holds the ids, and with them the prompt. What
is kept is the encoder's own vector, so that every width and quantisation is served from it.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engines.batching.request import Key, PendingRequest
from engines.layers.pooling import truncate_and_normalize

_OVERHEAD_BYTES = 200
"""Of one entry in Python's own structures, about: counted, so that short texts do not pass the limit by far."""

Vector = NDArray[np.float32]


class VectorCache:
    """At most so many bytes of keys and vectors. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._vectors: OrderedDict[Key, Vector] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    def fill(self, job: PendingRequest) -> tuple[int, ...]:
        """Give a job the rows whose vectors are here; their indexes."""
        known = self.find(job.keys)
        if known:
            output, vectors = job.output, torch.from_numpy(np.stack(list(known.values())))
            job.rows[list(known)] = truncate_and_normalize(
                vectors, dimensions=output.dimensions, normalized=output.normalized, pre_norm=output.pre_norm
            ).numpy()
            job.rows_missing -= len(known)
        return tuple(known)

    def find(self, keys: Sequence[Key]) -> dict[int, Vector]:
        """The vectors that are here, by place in `keys`."""
        found: dict[int, Vector] = {}
        with self._lock:
            for index, key in enumerate(keys):
                vector = self._vectors.get(key)
                if vector is not None:
                    self._vectors.move_to_end(key)
                    found[index] = vector
        return found

    def keep(self, keys: Sequence[Key], vectors: Vector) -> None:
        """Remember `vectors`, `[n, D]`; each is copied, so that a batch does not stay as long as one of its rows."""
        with self._lock:
            for key, vector in zip(keys, vectors, strict=True):
                if key not in self._vectors:
                    self._vectors[key] = vector.copy()
                    self.size_bytes += _size(key, vector)
            while self.size_bytes > self._max_bytes:
                self.size_bytes -= _size(*self._vectors.popitem(last=False))


def _size(key: Key, vector: Vector) -> int:
    return len(key[0]) + vector.nbytes + _OVERHEAD_BYTES
