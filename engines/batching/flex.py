"""Forms the batches of flex requests, which use only what other requests leave idle.

Callers are fair to each other in tokens (start-time fair queuing: Goyal, Vin and Cheng 1996): each text goes to the
caller that has had the fewest. A caller's requests take turns.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from engines.batching.batch import BatchLimits
from engines.batching.request import Entry, PendingRequest
from engines.device.tasks import Task

_MAX_TOKENS = 512
"""Most tokens of a batch on a CPU: the largest of whose layers the first words of another request wait for."""

_SHARE = 4
"""Else a batch has at most one of this many parts of the tokens of an ordinary one: a pass on a GPU cannot be held up
once it has begun."""


_ANY_NUMBER = 1 << 16
"""More batches than a device has threads."""


def flex_limit(limit: BatchLimits) -> BatchLimits:
    """Returns the bounds of a flex batch, from those of an ordinary one."""
    most = max(_MAX_TOKENS, limit.max_tokens // _SHARE)
    return BatchLimits(min(limit.max_tokens, most), limit.max_items, limit.part_tokens)


class FlexQueue(Protocol):
    """What `FlexTasks` needs of `engines.batching.queue.Queue`."""

    @property
    def num_flex_items(self) -> int:
        """Returns the number of texts of flex requests waiting."""

    def next_flex_batch(self, limit: BatchLimits) -> list[Entry]:
        """Returns a batch of flex requests alone, empty when none waits."""

    def ready_in_s(self, limit: BatchLimits) -> float | None:
        """Returns the seconds until other requests have a batch; None when none waits."""


class CallerShares:
    """Shares batches between the callers of flex requests."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._level = 0

    def take(self, jobs: Sequence[PendingRequest], limit: BatchLimits) -> list[Entry]:
        """Takes the next batch out of the requests' unscheduled texts; returns it sorted by length.

        Of each request the longest text goes first, as in other batches. A text that is longer than a batch runs alone.
        """
        waiting: dict[str, deque[PendingRequest]] = {}
        for job in jobs:
            waiting.setdefault(job.caller, deque()).append(job)
        self._used = {caller: self._used.get(caller, self._level) for caller in waiting}
        order = [(used, place, caller) for place, (caller, used) in enumerate(self._used.items())]
        heapq.heapify(order)
        texts: list[Entry] = []
        tokens_left = limit.max_tokens
        while order and len(texts) < limit.max_items:
            used, place, caller = order[0]
            job = waiting[caller][0]
            length = len(job.unscheduled[-1].ids)
            if texts and length > tokens_left:
                break
            texts.append(_pop(job))
            tokens_left -= length
            self._level = used
            self._used[caller] = used + length
            waiting[caller].popleft()
            if job.unscheduled:
                waiting[caller].append(job)
            if waiting[caller]:
                heapq.heapreplace(order, (used + length, place, caller))
            else:
                heapq.heappop(order)
        return sorted(texts, key=lambda text: len(text.ids))


def _pop(job: PendingRequest) -> Entry:
    text = job.unscheduled.pop()
    text.owner = None
    return text


class FlexTasks:
    """The flex batches of one engine (`engines.device.flex.FlexSource`).

    Args:
        queue: of the engine.
        limit: returns the bounds of an ordinary batch.
        run: runs a batch.
        is_reentrant: tells whether several batches of the engine may run at once.

    Attributes:
        num_running: batches that have been formed and have not ended.
    """

    def __init__(
        self,
        queue: FlexQueue,
        limit: Callable[[], BatchLimits],
        run: Callable[[list[Entry]], None],
        is_reentrant: Callable[[], bool],
    ) -> None:
        self._queue, self._limit, self._run, self._is_reentrant = queue, limit, run, is_reentrant
        self._lock = threading.Lock()
        self.num_running = 0

    @property
    def is_exclusive(self) -> bool:
        """See `FlexSource`."""
        return not self._is_reentrant()

    @property
    def must_finish(self) -> bool:
        """See `FlexSource`."""
        return self.is_exclusive and self._queue.ready_in_s(self._limit()) is not None

    @property
    def max_concurrent_tasks(self) -> int:
        """See `TaskSource`."""
        return 1 if self.is_exclusive else _ANY_NUMBER

    def ready_in_s(self) -> float | None:
        """See `TaskSource`."""
        return 0.0 if self._queue.num_flex_items else None

    def next_task(self, num_free: int) -> Task | None:
        """See `TaskSource`."""
        texts = self._queue.next_flex_batch(flex_limit(self._limit()))
        if not texts:
            return None
        self._count(1)
        return Task(partial(self._run_counted, texts), is_long=True)

    def next_small_task(self) -> Task | None:
        """See `TaskSource`; flex tasks do not preempt each other."""
        return None

    def _run_counted(self, texts: list[Entry]) -> None:
        try:
            self._run(texts)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self.num_running += change
