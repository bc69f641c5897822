"""The queue of one model. The event loop admits and drops jobs, the lane's threads cut batches: one lock guards both.

The same input for the same model is computed once, however many ask for it before its vector is there: within one
caller's requests where callers are told apart, because who has it sooner learns that another has asked. A text whose
owner leaves passes to another who wants it, so that nobody waits for somebody who has gone; and one that waits in a
bulk job passes to a smaller job that asks for it too.
"""

import threading
from bisect import insort
from collections.abc import Callable, Iterable, Sequence

from engines.batching.batch import BatchLimits, count_waiting_tokens, form_batch, is_worth_splitting, split_for_threads
from engines.batching.request import Entry, Key, PendingRequest, RowTarget
from engines.errors import QueueFull

_SHARE = 0.35
"""Of the seconds that a batch took, the next may wait so much."""


_ENOUGH_TOKENS = 128
"""A batch of so many loses nothing without company."""


_PASSES = 16
"""So many batches do not wait after one that has waited in vain."""


class RejoinWindow:
    """Who is expected. Knows no thread and no clock: the caller has both."""

    def __init__(self) -> None:
        self._num_expected = 0
        self._num_back = 0
        self._until_s = 0.0
        self._passes = 0

    def leave(self, num_jobs: int, took_s: float, now_s: float) -> None:
        """A batch has answered so many jobs."""
        if self._passes:
            self._passes -= 1
            return
        self._num_expected, self._num_back, self._until_s = num_jobs, 0, now_s + _SHARE * took_s

    def come(self) -> None:
        """A job is admitted: one of those, as far as anybody knows."""
        self._num_back += 1

    def wait_s(self, num_tokens: int, now_s: float) -> float:
        """Seconds for which `num_tokens` that wait should go on waiting; 0 when they need not."""
        if self._num_back >= self._num_expected or num_tokens >= _ENOUGH_TOKENS:
            return 0.0
        if now_s < self._until_s:
            return self._until_s - now_s
        if not self._num_back:
            self._passes = _PASSES
        self._num_expected = 0
        return 0.0


_MIN_WAIT_S = 0.1


_MAX_WAIT_S = 300.0
"""Bounds of what a client that is refused is told to wait."""


_ENOUGH_TEXTS = 64
"""A few texts say nothing about the pace of full batches."""


_MEMORY_S = 30.0


class Throughput:
    """Texts a second that leave a queue as long as some are in it. Knows no clock: the caller has one."""

    def __init__(self) -> None:
        self._begun_s = 0.0
        self._num_done = 0.0
        self._per_s = 0.0

    def begin(self, now_s: float) -> None:
        """Texts come after a time without any."""
        self._begun_s, self._num_done = now_s, 0.0

    def end(self, num_texts: int, now_s: float) -> None:
        """So many have left. What is older than a minute hardly counts: texts become longer or shorter."""
        self._num_done += num_texts
        busy_s = now_s - self._begun_s
        if busy_s > 0 and (self._num_done >= _ENOUGH_TEXTS or not self._per_s):
            self._per_s = self._num_done / busy_s
        if busy_s > 2 * _MEMORY_S:
            self._begun_s, self._num_done = now_s - _MEMORY_S, self._per_s * _MEMORY_S

    def wait_s(self, num_texts: int, now_s: float) -> float:
        """How long so many take; where nothing was measured yet, as long as they have taken already."""
        wait_s = num_texts / self._per_s if self._per_s else max(1.0, now_s - self._begun_s)
        return min(max(wait_s, _MIN_WAIT_S), _MAX_WAIT_S)


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
        self._jobs: list[PendingRequest] = []
        self._under_way: dict[Key, Entry] = {}
        self._lock = threading.Lock()
        self._was_small = False
        self._company = RejoinWindow()
        self._throughput = Throughput()

    @property
    def num_items(self) -> int:
        """Texts waiting."""
        with self._lock:
            return self._waiting()

    def is_worth_splitting(self, limit: BatchLimits) -> bool:
        """Whether what waits is enough for a batch beside one that runs."""
        with self._lock:
            return is_worth_splitting(limit, self._jobs)

    def admit(self, job: PendingRequest, indexes: Sequence[int] | None = None) -> int:
        """Take a request in, all of it or nothing. A request larger than the queue is let into an empty one.

        A caller who has texts waiting may add to them as long as no less room is free than they take: alone it fills
        half of the queue, two a third each, and there is always room for one more. (The dynamic thresholds by which
        switches share a buffer; Choudhury and Hahne, 1998.)

        Args:
            job: the request.
            indexes: the inputs that need a vector; None is all of them.

        Returns:
            How many of them were under way already, or stand in the request twice.

        Raises:
            QueueFull: naming how many wait and how many may, and when they will be done.
        """
        wanted = range(len(job.ids)) if indexes is None else indexes
        with self._lock:
            self._check_room(job.caller, len(wanted))
            if not self._under_way:
                self._throughput.begin(self._clock())
            for index in wanted:
                self._enqueue(job, index)
            num_new = len(job.unscheduled)
            self._adopt_from_larger(job)
            job.unscheduled.sort(key=_length)
            self._jobs.append(job)
            self._forget_done()
            self._company.come()
        return len(wanted) - num_new

    def drop(self, job: PendingRequest) -> None:
        """Forget a job that nobody waits for; what others want of it as well is theirs from now on."""
        with self._lock:
            for text in job.entries:
                text.targets = [want for want in text.targets if want.job is not job]
            for text in job.unscheduled:
                self._reassign(text)
            job.unscheduled, job.entries = [], []
            self._forget_done()

    def clear(self) -> list[PendingRequest]:
        """Drop everything and hand over whoever waits."""
        with self._lock:
            waiting = {id(want.job): want.job for text in self._under_way.values() for want in text.targets}
            self._jobs, self._under_way = [], {}
            return list(waiting.values())

    def ready_in_s(self, limit: BatchLimits) -> float | None:
        """When a batch may be cut: 0 now, None when nothing waits."""
        with self._lock:
            if not self._jobs:
                return None
            now_s, tokens = self._clock(), count_waiting_tokens(self._jobs, limit.max_tokens)
            if tokens >= limit.max_tokens or self._waiting() >= limit.max_items:
                return 0.0
            if self._batch_timeout_s == 0:
                return self._company.wait_s(tokens, now_s)
            return max(0.0, self._jobs[0].admitted_at + self._batch_timeout_s - now_s)

    def cut(self, limit: BatchLimits, num_threads: int = 1) -> list[Entry]:
        """The next batch, empty when nothing waits; `num_threads` could run one each.

        Where small jobs wait beside bulk jobs, every other batch is theirs alone: it is short, and they have their
        answer without the bulk's texts in it.
        """
        with self._lock:
            small = [job for job in self._jobs if limit.is_small(job)]
            self._was_small = not self._was_small and 0 < len(small) < len(self._jobs)
            return self._cut(small if self._was_small else self._jobs, limit, num_threads)

    def cut_small(self, limit: BatchLimits) -> list[Entry]:
        """A batch of small jobs alone, empty when none waits."""
        with self._lock:
            return self._cut([job for job in self._jobs if limit.is_small(job)], limit, 1)

    def requeue(self, texts: Iterable[Entry]) -> None:
        """Texts of a batch that could not be run wait again."""
        with self._lock:
            for text in texts:
                self._reassign(text)

    def on_batch_done(self, num_jobs: int, took_s: float) -> None:
        """A batch has ended, and so many jobs with it: see `RejoinWindow`."""
        with self._lock:
            self._company.leave(num_jobs, took_s, self._clock())

    def seal(self, texts: Sequence[Entry]) -> None:
        """Who asks for these texts from now on comes too late for the vectors at hand; `wants` only shrink."""
        with self._lock:
            for text in texts:
                if self._under_way.get(text.key) is text:
                    del self._under_way[text.key]
            self._throughput.end(len(texts), self._clock())

    def _cut(self, jobs: Sequence[PendingRequest], limit: BatchLimits, num_threads: int) -> list[Entry]:
        texts = form_batch(jobs, split_for_threads(limit, jobs, num_threads))
        self._forget_done()
        return texts

    def _check_room(self, caller: str, num_texts: int) -> None:
        waiting = self._waiting()
        if not waiting:
            return
        refusal = ""
        if waiting + num_texts > self._max_items:
            refusal = (
                f"{waiting} texts wait for this model and {num_texts} more would pass the {self._max_items} that may "
                "(MAX_QUEUE_SIZE)"
            )
        elif caller:
            own = sum(len(job.unscheduled) for job in self._jobs if job.caller == caller)
            share = (self._max_items - (waiting - own)) // 2
            if own and own + num_texts > share:
                refusal = (
                    f"{own} of your texts wait for this model and {num_texts} more would pass the {share} that you may "
                    f"have there now, of {self._max_items} for all (MAX_QUEUE_SIZE)"
                )
        if refusal:
            wait_s = self._throughput.wait_s(waiting, self._clock())
            raise QueueFull(f"{refusal}; send it again in {wait_s:.3g} s, or smaller", retry_after_s=wait_s)

    def _enqueue(self, job: PendingRequest, index: int) -> None:
        want, key = RowTarget(job, index), job.keys[index]
        text = self._under_way.get(key)
        if text is None:
            text = self._under_way[key] = Entry(job.ids[index], key, [want], owner=job)
            job.unscheduled.append(text)
        else:
            text.targets.append(want)
        job.entries.append(text)

    def _adopt_from_larger(self, job: PendingRequest) -> None:
        """What it wants and waits in larger jobs becomes its own: one pass over each of them, however many texts."""
        taken: dict[Entry, PendingRequest] = {
            text: text.owner
            for text in job.entries
            if text.owner is not None and text.owner.num_tokens > job.num_tokens
        }
        for text in taken:
            text.owner = job
        for owner in set(taken.values()):
            owner.unscheduled = [text for text in owner.unscheduled if text.owner is owner]
        job.unscheduled += taken

    def _reassign(self, text: Entry) -> None:
        """A text that waits goes to the smallest of those who want it; to nobody, it goes."""
        if not text.targets:
            self._under_way.pop(text.key, None)
            return
        text.owner = heir = min((want.job for want in text.targets), key=_size)
        insort(heir.unscheduled, text, key=_length)
        if heir not in self._jobs:
            self._jobs.append(heir)

    def _forget_done(self) -> None:
        self._jobs = [job for job in self._jobs if job.unscheduled]

    def _waiting(self) -> int:
        return sum(len(job.unscheduled) for job in self._jobs)


def _length(text: Entry) -> int:
    return len(text.ids)


def _size(job: PendingRequest) -> int:
    return job.num_tokens
