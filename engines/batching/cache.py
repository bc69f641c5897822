"""Caches computed outputs by what they depend on: exact, least recently used evicted first. Off by default.

One cache belongs to one engine, thus to one revision and dtype; the key holds the ids, and with them the prompt. What
is kept of an output is its kind's own choice (`OutputSpec.cache_rows`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engines.batching.output import Row
from engines.batching.request import Key, PendingRequest
from engines.batching.rest_of_check import RestOfCheck

_OVERHEAD_BYTES = 200
"""Of one entry in Python's own structures, about: counted, so that short texts do not pass the limit by far."""


class VectorCache:
    """Keeps at most `max_bytes` of keys and rows. Thread-safe.

    Args:
        rest_of_check: of the model; before it has passed nothing is kept, as a wrong row would stay for hours.
    """

    def __init__(self, max_bytes: int, rest_of_check: RestOfCheck | None = None) -> None:
        self._max_bytes = max_bytes
        self._rest_of_check = rest_of_check
        self._rows: OrderedDict[Key, Row] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    def fill(self, job: PendingRequest) -> tuple[int, ...]:
        """Gives a request the rows that are cached; returns their indexes."""
        known = self.find(job.keys)
        if known:
            job.use_cached(known)
        return tuple(known)

    def find(self, keys: Sequence[Key]) -> dict[int, Row]:
        """Returns the cached rows, by place in `keys`."""
        found: dict[int, Row] = {}
        with self._lock:
            for index, key in enumerate(keys):
                row = self._rows.get(key)
                if row is not None:
                    self._rows.move_to_end(key)
                    found[index] = row
        return found

    def keep(self, keys: Sequence[Key], rows: Iterable[Row]) -> None:
        """Caches one row for each key. Copies each, so that no batch stays as long as one of its rows."""
        if self._rest_of_check is not None and not self._rest_of_check.has_passed:
            return
        with self._lock:
            for key, row in zip(keys, rows, strict=True):
                if key not in self._rows:
                    self._rows[key] = row.copy()
                    self.size_bytes += _size(key, row)
            while self.size_bytes > self._max_bytes:
                self.size_bytes -= _size(*self._rows.popitem(last=False))


def _size(key: Key, row: Row) -> int:
    return len(key[0]) + row.nbytes + _OVERHEAD_BYTES
