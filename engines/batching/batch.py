"""Forms the next batch of the requests that wait, by pure rules.

A request is a `PendingRequest`, which wants one row for each of its inputs. An `Entry` is one distinct input in the
queue or in a batch: all requests that want it before its row exists wait for the same entry. Each entry is owned by
one request, the smallest that wants it, and leaves the queue with that request's share of a batch: so no request waits
for a bulk request because both want the same input.
"""

from collections.abc import Container, Iterable, Sequence

from msgspec import Struct, structs

from engines.batching.request import Entry, PendingRequest
from engines.models.base import PART_TOKENS
from engines.types import Batch

_SMALL_SHARE = 0.25
"""A request of at most this part of a batch is small: it does not wait for the batches of a bulk request."""


class BatchLimits(Struct, frozen=True):
    """Bounds of one batch. A single text longer than `max_tokens` still runs, alone.

    Args:
        part_tokens: of the smallest part that gets a thread of its own.
    """

    max_tokens: int
    max_items: int
    part_tokens: int = PART_TOKENS

    def unsplit(self) -> "BatchLimits":
        """Returns the same limits with parts as large as a batch: texts are not split among threads that happen to be
        idle. The last bit of some products depends on the rows of a batch, and on its cores."""
        return structs.replace(self, part_tokens=self.max_tokens)

    def is_small(self, job: PendingRequest) -> bool:
        """Tells whether a request need not wait for bulk requests."""
        return job.num_tokens <= self.max_tokens * _SMALL_SHARE

    def are_small(self, texts: Iterable[Entry]) -> bool:
        """Tells whether each text is wanted by a small request."""
        for text in texts:
            for target in text.targets:
                if self.is_small(target.job):
                    break
            else:
                return False
        return True


def attribute_batch(batch: Batch, texts: Sequence[Entry], failed: Container[int]) -> None:
    """Reports a batch with one of the requests that share it and will be answered, so that it is counted once.

    Args:
        failed: the `id` of requests that will not be answered.
    """
    for text in texts:
        for target in text.targets:
            if id(target.job) not in failed and not target.job.done.done():
                target.job.batches.append(batch)
                return


def count_waiting_tokens(jobs: Iterable[PendingRequest], enough: int) -> int:
    """Counts the tokens of these requests' waiting texts, up to `enough`: thousands of texts may wait, and this is
    called before every layer.
    """
    tokens = 0
    for job in jobs:
        for text in job.unscheduled:
            tokens += len(text.ids)
            if tokens >= enough:
                return tokens
    return tokens


def is_worth_splitting(limit: BatchLimits, jobs: Iterable[PendingRequest]) -> bool:
    """Tells whether these requests' texts are worth a thread of their own."""
    return count_waiting_tokens(jobs, limit.part_tokens) >= limit.part_tokens


def split_for_threads(limit: BatchLimits, jobs: Iterable[PendingRequest], num_threads: int) -> BatchLimits:
    """Returns smaller limits where several threads are free for these texts, and these are enough for them."""
    tokens = count_waiting_tokens(jobs, num_threads * limit.max_tokens)
    num_parts = min(num_threads, tokens // limit.part_tokens)
    if num_parts < 2:
        return limit
    return BatchLimits(min(limit.max_tokens, -(-tokens // num_parts)), limit.max_items)


def form_batch(jobs: Sequence[PendingRequest], limit: BatchLimits) -> list[Entry]:
    """Takes the next batch out of the requests' unscheduled texts; returns it sorted by length.

    Every waiting request gets an equal share of the tokens first, so that one text leaves with the next batch however
    many another request has; what is left over goes to the oldest.
    """
    live = [job for job in jobs if job.unscheduled]
    if len(live) == 1 and len(live[0].unscheduled) == 1:
        text = live[0].unscheduled.pop()
        text.owner = None
        return [text]
    batch = _Batch(limit)
    share = limit.max_tokens // max(len(live), 1)
    for allowance in (share, limit.max_tokens):
        for job in live:
            batch.take(job, allowance)
    return sorted(batch.texts, key=lambda text: len(text.ids))


class _Batch:
    def __init__(self, limit: BatchLimits) -> None:
        self.texts: list[Entry] = []
        self._tokens_left = limit.max_tokens
        self._items_left = limit.max_items

    def take(self, job: PendingRequest, allowance: int) -> None:
        """Takes the longest texts of a request first, so that a large request's last batches are the short ones."""
        while job.unscheduled and self._items_left:
            length = len(job.unscheduled[-1].ids)
            fits = length <= min(allowance, self._tokens_left)
            if not fits and self.texts:
                return
            text = job.unscheduled.pop()
            text.owner = None
            self.texts.append(text)
            self._items_left -= 1
            self._tokens_left -= length
            allowance -= length


_SHARE = 0.35
"""The next batch may wait for this part of the seconds that the last one took."""

_ENOUGH_TOKENS = 128
"""A batch of this many gains little by more texts."""

_PASSES = 16
"""After a batch that has waited in vain, this many do not wait."""


class RejoinWindow:
    """Decides how long a batch waits for clients that a batch has just answered to send their next request.

    Knows no thread and no clock: the caller has both.

    Args:
        timeout_s: how long a batch that is not full waits for them at the most. 0: a share of the time that the last
            batch took, and no longer than until it has enough tokens.
    """

    def __init__(self, timeout_s: float = 0.0) -> None:
        self._timeout_s = timeout_s
        self._num_expected = 0
        self._num_back = 0
        self._until_s = 0.0
        self._passes = 0

    def on_batch_done(self, num_jobs: int, took_s: float, now_s: float) -> None:
        """Expects as many requests as a batch has answered."""
        if self._passes:
            self._passes -= 1
            return
        wait_s = self._timeout_s or _SHARE * took_s
        self._num_expected, self._num_back, self._until_s = num_jobs, 0, now_s + wait_s

    def on_admitted(self) -> None:
        """Counts a request as one of those that are expected."""
        self._num_back += 1

    def is_open(self, jobs: Iterable[PendingRequest], now_s: float) -> bool:
        """Tells whether a batch of these requests, which wait, goes on waiting for others."""
        if self._num_back >= self._num_expected or now_s >= self._until_s:
            return False
        return not self._timeout_s and count_waiting_tokens(jobs, _ENOUGH_TOKENS) < _ENOUGH_TOKENS

    def wait_s(self, num_tokens: int, now_s: float) -> float:
        """Returns the seconds for which `num_tokens` that wait should go on waiting; 0 when they need not."""
        if self._num_back >= self._num_expected or (not self._timeout_s and num_tokens >= _ENOUGH_TOKENS):
            return 0.0
        if now_s < self._until_s:
            return self._until_s - now_s
        if not self._num_back:
            self._passes = _PASSES
        self._num_expected = 0
        return 0.0
