"""Queues the requests of one model. The event loop admits and drops requests, the scheduler's threads form batches: one
lock guards both.

The same input for the same model is computed once, however many requests want it before its row exists: within one
caller's requests where callers are told apart, because a caller that gets it sooner learns that another has asked. When
the owner of an entry is dropped, the entry passes to another request that wants it; and one that waits in a bulk
request passes to a smaller request that wants it too.

Flex requests, which run when nothing else does, wait beside the others, with places of their own. An entry that waits
for a flex request passes to any other request that wants it; one that is in a flex batch, which may be held up for
long, is computed once more.
"""

import threading
from bisect import insort
from collections.abc import Callable, Iterable, Sequence

from engines.batching.batch import (
    BatchLimits,
    RejoinWindow,
    count_waiting_tokens,
    form_batch,
    is_worth_splitting,
    split_for_threads,
)
from engines.batching.flex import CallerShares
from engines.batching.request import Entry, Key, PendingRequest, RowTarget
from engines.errors import QueueFull

_MIN_WAIT_S = 0.1

_MAX_WAIT_S = 300.0
"""Bounds of the wait that a refused client is told."""

_ENOUGH_TEXTS = 64
"""Fewer texts say nothing about the speed of full batches."""

_MEMORY_S = 30.0


class Throughput:
    """Measures the texts a second that leave a queue while it is not empty. Knows no clock: the caller has one."""

    def __init__(self) -> None:
        self._begun_s = 0.0
        self._num_done = 0.0
        self._per_s = 0.0

    def begin(self, now_s: float) -> None:
        """Begins to measure: the queue was empty until now."""
        self._begun_s, self._num_done = now_s, 0.0

    def end(self, num_texts: int, now_s: float) -> None:
        """Counts texts that have left. What is older than a minute hardly counts: texts become longer or shorter."""
        self._num_done += num_texts
        busy_s = now_s - self._begun_s
        if busy_s > 0 and (self._num_done >= _ENOUGH_TEXTS or not self._per_s):
            self._per_s = self._num_done / busy_s
        if busy_s > 2 * _MEMORY_S:
            self._begun_s, self._num_done = now_s - _MEMORY_S, self._per_s * _MEMORY_S

    def wait_s(self, num_texts: int, now_s: float) -> float:
        """Returns how long so many take; where nothing was measured yet, as long as they have taken already."""
        wait_s = num_texts / self._per_s if self._per_s else max(1.0, now_s - self._begun_s)
        return min(max(wait_s, _MIN_WAIT_S), _MAX_WAIT_S)


class Waiting:
    """The requests of one class that wait for one model.

    Attributes:
        jobs: those with texts in no batch yet, oldest first.
        num_texts: entries in the jobs' `unscheduled`: counted, as thousands of jobs may wait.
        entries: those that wait or are in a batch of this class.
    """

    def __init__(self) -> None:
        self.jobs: list[PendingRequest] = []
        self.num_texts = 0
        self.entries: dict[Key, Entry] = {}
        self.throughput = Throughput()

    def clear(self) -> dict[int, PendingRequest]:
        """Drops everything; returns the requests that waited, by `id`."""
        waiting = {id(target.job): target.job for text in self.entries.values() for target in text.targets}
        for job in self.jobs:
            job.unscheduled = []
        self.jobs, self.num_texts, self.entries = [], 0, {}
        return waiting


class Queue:
    """The requests that wait for one model, oldest first.

    Args:
        max_items: texts that may wait, and as many of flex requests; a request that does not fit whole is refused
            whole.
        batch_timeout_s: how long a batch that is not full may wait for clients that were just answered; see
            `RejoinWindow`. A request waits for no longer either, and not at all while it is the only one.
        clock: seconds.
        max_requests: requests that may wait; None is any number.
    """

    def __init__(
        self, max_items: int, batch_timeout_s: float, clock: Callable[[], float], max_requests: int | None = None
    ) -> None:
        self._max_items = max_items
        self._max_requests = max_requests
        self._batch_timeout_s = batch_timeout_s
        self._clock = clock
        self._usual, self._flex = Waiting(), Waiting()
        self._flex_shares = CallerShares()
        self._lock = threading.Lock()
        self._was_small = False
        self._rejoin = RejoinWindow(batch_timeout_s)

    @property
    def num_items(self) -> int:
        """Returns the number of texts waiting, those of flex requests included."""
        with self._lock:
            return self._usual.num_texts + self._flex.num_texts

    @property
    def num_flex_items(self) -> int:
        """Returns the number of texts of flex requests waiting."""
        return self._flex.num_texts

    def is_worth_splitting(self, limit: BatchLimits) -> bool:
        """Tells whether the waiting texts are enough for a batch beside one that runs."""
        with self._lock:
            return is_worth_splitting(limit, self._usual.jobs)

    def admit(self, job: PendingRequest, indexes: Sequence[int] | None = None) -> int:
        """Admits a request, all of it or nothing. A request larger than the queue is admitted to an empty one.

        A caller that has texts waiting may add to them as long as at least as many places are free as they take: one
        caller fills half of the queue, two a third each, and there is always a place for one more. (The dynamic
        thresholds by which switches share a buffer; Choudhury and Hahne, 1998.)

        Args:
            job: the request.
            indexes: the inputs that need a row; None is all of them.

        Returns:
            How many of them were in the queue or in a batch already, or are in the request twice.

        Raises:
            QueueFull: naming how many wait and how many may, and when they will be done.
        """
        wanted = range(len(job.ids)) if indexes is None else indexes
        own = self._flex if job.is_flex else self._usual
        with self._lock:
            self._check_places(own, job, len(wanted))
            if not own.entries:
                own.throughput.begin(self._clock())
            for index in wanted:
                self._enqueue(own, job, index)
            num_new = len(job.unscheduled)
            own.num_texts += num_new
            if num_new < len(job.entries):
                self._adopt_from_larger(own, job)
            if job.unscheduled:
                job.unscheduled.sort(key=_length)
                own.jobs.append(job)
            if not job.is_flex:
                self._rejoin.on_admitted()
                job.needs_thread = len(own.jobs) < 2 or not self._rejoin.is_open(own.jobs, self._clock())
        return len(wanted) - num_new

    def drop(self, job: PendingRequest) -> None:
        """Drops a request whose caller has left; entries that other requests want pass to them."""
        with self._lock:
            for text in job.entries:
                text.targets = [target for target in text.targets if target.job is not job]
            own = self._flex if job.is_flex else self._usual
            own.num_texts -= len(job.unscheduled)
            for text in job.unscheduled:
                self._reassign(text)
            job.unscheduled, job.entries = [], []
            _forget_done(self._usual)
            _forget_done(self._flex)

    def clear(self) -> list[PendingRequest]:
        """Drops everything; returns the requests that waited."""
        with self._lock:
            return list((self._usual.clear() | self._flex.clear()).values())

    def ready_in_s(self, limit: BatchLimits) -> float | None:
        """Returns the seconds until a batch may be formed: 0 now, None when nothing waits."""
        with self._lock:
            jobs = self._usual.jobs
            if not jobs:
                return None
            now_s, tokens = self._clock(), count_waiting_tokens(jobs, limit.max_tokens)
            if tokens >= limit.max_tokens or self._usual.num_texts >= limit.max_items:
                return 0.0
            wait_s = self._rejoin.wait_s(tokens, now_s)
            if self._batch_timeout_s == 0:
                return wait_s
            return min(wait_s, max(0.0, jobs[0].admitted_at + self._batch_timeout_s - now_s))

    def next_batch(self, limit: BatchLimits, num_threads: int = 1) -> list[Entry]:
        """Returns the next batch, empty when nothing waits; `num_threads` could run one each.

        Where small requests wait beside bulk requests, every other batch is theirs alone: it is short, and they are
        answered without bulk texts in it.
        """
        with self._lock:
            jobs = self._usual.jobs
            small = [job for job in jobs if limit.is_small(job)] if len(jobs) > 1 else []
            self._was_small = not self._was_small and 0 < len(small) < len(jobs)
            return self._take(small if self._was_small else jobs, limit, num_threads)

    def next_small_batch(self, limit: BatchLimits) -> list[Entry]:
        """Returns a batch of small requests alone, empty when none waits."""
        with self._lock:
            return self._take([job for job in self._usual.jobs if limit.is_small(job)], limit, 1)

    def next_flex_batch(self, limit: BatchLimits) -> list[Entry]:
        """Returns a batch of flex requests alone, empty when none waits. Callers have equal shares of the tokens."""
        with self._lock:
            texts = self._flex_shares.take(self._flex.jobs, limit)
            self._flex.num_texts -= len(texts)
            _forget_done(self._flex)
            return texts

    def requeue(self, texts: Iterable[Entry]) -> None:
        """Puts the texts of a batch that could not be run back."""
        with self._lock:
            for text in texts:
                self._reassign(text)

    def on_batch_done(self, num_jobs: int, took_s: float) -> None:
        """Reports that a batch has ended, and so many requests with it; see `RejoinWindow`."""
        with self._lock:
            self._rejoin.on_batch_done(num_jobs, took_s, self._clock())

    def seal(self, texts: Sequence[Entry]) -> None:
        """Closes entries whose outputs exist: requests that want them from now on get entries of their own, so that the
        targets of these only shrink."""
        with self._lock:
            own = self._flex if texts and texts[0].is_flex else self._usual
            for text in texts:
                if own.entries.get(text.key) is text:
                    del own.entries[text.key]
            own.throughput.end(len(texts), self._clock())

    def _take(self, jobs: Sequence[PendingRequest], limit: BatchLimits, num_threads: int) -> list[Entry]:
        texts = form_batch(jobs, split_for_threads(limit, jobs, num_threads))
        self._usual.num_texts -= len(texts)
        _forget_done(self._usual)
        return texts

    def _check_places(self, of_class: Waiting, job: PendingRequest, num_texts: int) -> None:
        waiting, jobs, caller = of_class.num_texts, of_class.jobs, job.caller
        if not waiting:
            return
        refusal = ""
        if self._max_requests is not None and len(jobs) >= self._max_requests:
            refusal = f"{len(jobs)} of {self._max_requests} requests wait for this model (MAX_QUEUE_SIZE)"
        elif waiting + num_texts > self._max_items:
            refusal = (
                f"{waiting} texts wait for this model and {num_texts} more would pass the {self._max_items} that may"
            )
        elif caller:
            own = sum(len(other.unscheduled) for other in jobs if other.caller == caller)
            share = (self._max_items - (waiting - own)) // 2
            if own and own + num_texts > share:
                refusal = (
                    f"{own} of your texts wait for this model and {num_texts} more would pass the {share} that you may "
                    f"have there now, of {self._max_items} for all"
                )
        if refusal:
            wait_s = of_class.throughput.wait_s(waiting, self._clock())
            raise QueueFull(f"{refusal}; send it again in {wait_s:.3g} s, or smaller", retry_after_s=wait_s)

    def _enqueue(self, own: Waiting, job: PendingRequest, index: int) -> None:
        target, key = RowTarget(job, index), job.keys[index]
        text = own.entries.get(key)
        if text is None and (job.is_flex or self._flex.entries):
            text = self._of_other_class(job, key)
        if text is None:
            text = own.entries[key] = Entry(job.ids[index], key, [target], owner=job, is_flex=job.is_flex)
            job.unscheduled.append(text)
        else:
            text.targets.append(target)
        job.entries.append(text)

    def _of_other_class(self, job: PendingRequest, key: Key) -> Entry | None:
        """Returns the entry that a request shares with those of the other class. An entry of a flex batch, which may
        have to wait while other requests run, is not shared."""
        if job.is_flex:
            return self._usual.entries.get(key)
        text = self._flex.entries.get(key)
        return text if text is not None and text.owner is not None else None

    def _adopt_from_larger(self, own: Waiting, job: PendingRequest) -> None:
        """Makes a request the owner of entries that it wants and that wait in larger requests, or in flex requests
        while it is none, in one pass over each of these, however many texts."""
        taken: dict[Entry, PendingRequest] = {
            text: text.owner
            for text in job.entries
            if text.owner is not None
            and (text.owner.num_tokens > job.num_tokens if text.is_flex is job.is_flex else text.is_flex)
        }
        for text in taken:
            text.owner = job
            if text.is_flex and not job.is_flex:
                self._raise(text)
        if not taken:
            return
        for owner in set(taken.values()):
            owner.unscheduled = [text for text in owner.unscheduled if text.owner is owner]
        job.unscheduled += taken
        _forget_done(own)
        _forget_done(self._flex)

    def _raise(self, text: Entry) -> None:
        """Moves an entry that waits to the class of requests that are not flex."""
        text.is_flex = False
        self._usual.entries[text.key] = self._flex.entries.pop(text.key)
        self._flex.num_texts -= 1
        self._usual.num_texts += 1

    def _reassign(self, text: Entry) -> None:
        """Gives an entry to the smallest request that wants it, or drops it when none does."""
        old = self._flex if text.is_flex else self._usual
        if not text.targets:
            if old.entries.get(text.key) is text:  # a batch that was sealed may have a successor of the same key
                del old.entries[text.key]
            return
        text.owner = owner = min((target.job for target in text.targets), key=_rank)
        own = self._flex if owner.is_flex else self._usual
        if own is not old:
            self._change_class(text, old, own)
        insort(owner.unscheduled, text, key=_length)
        own.num_texts += 1
        if owner not in own.jobs:
            own.jobs.append(owner)

    def _change_class(self, text: Entry, old: Waiting, new: Waiting) -> None:
        text.is_flex = new is self._flex
        if old.entries.get(text.key) is text:
            del old.entries[text.key]
        new.entries.setdefault(text.key, text)


def _forget_done(waiting: Waiting) -> None:
    if waiting.jobs:
        waiting.jobs = [job for job in waiting.jobs if job.unscheduled]


def _length(text: Entry) -> int:
    return len(text.ids)


def _rank(job: PendingRequest) -> tuple[bool, int]:
    return job.is_flex, job.num_tokens
