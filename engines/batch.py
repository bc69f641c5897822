"""The queue of one model, and the pure rule that cuts the next batch from it.

Jobs are requests. The event loop admits and drops them, the lane's thread cuts: one lock guards the few lines in
which both touch the queue.
"""

import asyncio
import threading
from collections.abc import Callable, Container, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import QueueFull
from engines.records import Batch
from engines.tokenize import Encoded, Ids


class Output(Struct, frozen=True):
    """What a request wants of each vector; entries that want the same are finished together."""

    dimensions: int
    normalized: bool
    pre_norm: bool


class Job:
    """One request in the queue.

    Attributes:
        rows: float32 `[n, dimensions]`, filled by the lane's thread, row by row.
        pending: indexes not yet cut, the longest text last.
        left: rows still missing; the event loop counts it down.
        done: resolved with None when all rows are there, or with the error.
        started_at: when the first batch that holds one of its texts began.
        batches: forward passes that its answer tells about; the lane's thread adds to it.
    """

    def __init__(self, encoded: Encoded, output: Output, loop: asyncio.AbstractEventLoop, now_s: float) -> None:
        self.ids = encoded.ids
        self.prompt_tokens = encoded.prompt_tokens
        self.output = output
        self.rows: NDArray[np.float32] = np.empty((len(encoded.ids), output.dimensions), dtype=np.float32)
        self.pending = sorted(range(len(encoded.ids)), key=lambda index: len(encoded.ids[index]))
        self.left = len(encoded.ids)
        self.done: asyncio.Future[None] = loop.create_future()
        self.admitted_at = now_s
        self.started_at: float | None = None
        self.batches: list[Batch] = []


class Entry(Struct, frozen=True):
    """One text of one job."""

    job: Job
    index: int

    @property
    def ids(self) -> Ids:
        """The text's tokens."""
        return self.job.ids[self.index]


def tell(batch: Batch, entries: Sequence[Entry], failed: Container[int]) -> None:
    """Let one of the jobs that share a batch, and will be answered, tell about it: so it is counted once.

    `failed`: jobs by `id` that will not.
    """
    jobs = (entry.job for entry in entries if id(entry.job) not in failed and not entry.job.done.done())
    job = next(jobs, None)
    if job is not None:
        job.batches.append(batch)


class Limit(Struct, frozen=True):
    """Bounds of one batch. A single text longer than `max_tokens` still runs, alone."""

    max_tokens: int
    max_items: int


def cut(jobs: Sequence[Job], limit: Limit) -> list[Entry]:
    """Take the next batch out of the jobs' pending texts, sorted by length.

    Every waiting job gets an equal share of the tokens first, so that one text leaves with the next batch however
    many a neighbour has brought; what is left over goes to the oldest.
    """
    batch = _Batch(limit)
    live = [job for job in jobs if job.pending]
    share = limit.max_tokens // max(len(live), 1)
    for allowance in (share, limit.max_tokens):
        for job in live:
            batch.take(job, allowance)
    return sorted(batch.entries, key=lambda entry: len(entry.ids))


class _Batch:
    def __init__(self, limit: Limit) -> None:
        self.entries: list[Entry] = []
        self._room_tokens = limit.max_tokens
        self._room_items = limit.max_items

    def take(self, job: Job, allowance: int) -> None:
        """The longest texts of a job first, so that the last batches of a large request are the easy ones."""
        while job.pending and self._room_items:
            length = len(job.ids[job.pending[-1]])
            fits = length <= min(allowance, self._room_tokens)
            if not fits and self.entries:
                return
            self.entries.append(Entry(job, job.pending.pop()))
            self._room_items -= 1
            self._room_tokens -= length
            allowance -= length


class Queue:
    """Jobs waiting for one model, oldest first.

    Args:
        max_items: texts that may wait; a request that does not fit whole is refused whole.
        batch_timeout_s: how long a batch that is not full may wait for company.
        clock: seconds.
    """

    def __init__(self, max_items: int, batch_timeout_s: float, clock: Callable[[], float]) -> None:
        self._max_items = max_items
        self._batch_timeout_s = batch_timeout_s
        self._clock = clock
        self._jobs: list[Job] = []
        self._lock = threading.Lock()

    @property
    def num_items(self) -> int:
        """Texts waiting."""
        with self._lock:
            return sum(len(job.pending) for job in self._jobs)

    def admit(self, job: Job) -> None:
        """Take a request in, all of it or nothing. A request larger than the queue is let into an empty one.

        Raises:
            QueueFull: naming how many wait and how many may.
        """
        with self._lock:
            waiting = sum(len(other.pending) for other in self._jobs)
            if waiting and waiting + len(job.pending) > self._max_items:
                raise QueueFull(
                    f"{waiting} texts wait for this model and {len(job.pending)} more would pass the {self._max_items} "
                    "that may (MAX_QUEUE_SIZE); send it again in a moment, or smaller",
                )
            self._jobs.append(job)

    def drop(self, job: Job) -> None:
        """Forget what of a job has not been cut: nobody waits for it."""
        with self._lock:
            job.pending.clear()
            self._jobs = [other for other in self._jobs if other.pending]

    def clear(self) -> list[Job]:
        """Drop everything and hand it over."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
            return jobs

    def due_in_s(self, limit: Limit) -> float | None:
        """When a batch may be cut: 0 now, None when nothing waits."""
        with self._lock:
            if not self._jobs:
                return None
            oldest = self._jobs[0].admitted_at
            if self._batch_timeout_s == 0 or self._is_full(limit):
                return 0.0
            return max(0.0, oldest + self._batch_timeout_s - self._clock())

    def cut(self, limit: Limit) -> list[Entry]:
        """The next batch; empty when nothing waits."""
        with self._lock:
            entries = cut(self._jobs, limit)
            self._jobs = [job for job in self._jobs if job.pending]
            return entries

    def _is_full(self, limit: Limit) -> bool:
        waiting = [index for job in self._jobs for index in job.pending]
        tokens = sum(len(job.ids[index]) for job in self._jobs for index in job.pending)
        return len(waiting) >= limit.max_items or tokens >= limit.max_tokens
