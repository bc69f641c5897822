"""Requests and texts under way, and the pure rules that cut the next batch from them.

A request is a `PendingRequest`; it wants one vector for each of its inputs. A `Entry` is one distinct input under way:
whoever asks for it before its vector is there waits for the same one. Each text is some job's own, and leaves when that
job's share of a batch takes it: the smallest job's, so that nobody waits for a bulk job because both ask for the same.
"""

from collections.abc import Container, Iterable, Sequence
from itertools import chain

from msgspec import Struct

from engines.batching.request import Entry, PendingRequest
from engines.models.base import PART_TOKENS
from engines.types import Batch

_SMALL_SHARE = 0.25
"""A job of at most this part of a batch is small: it does not wait for the batches of a bulk job."""


class BatchLimits(Struct, frozen=True):
    """Bounds of one batch. A single text longer than `max_tokens` still runs, alone.

    Args:
        part_tokens: of the smallest part that is cut for a thread of its own.
    """

    max_tokens: int
    max_items: int
    part_tokens: int = PART_TOKENS

    def is_small(self, job: PendingRequest) -> bool:
        """Whether a job need not wait for bulk jobs."""
        return job.num_tokens <= self.max_tokens * _SMALL_SHARE


def attribute_batch(batch: Batch, texts: Sequence[Entry], failed: Container[int]) -> None:
    """Let one of the jobs that share a batch, and will be answered, tell about it: so it is counted once.

    `failed`: jobs by `id` that will not.
    """
    jobs = (want.job for text in texts for want in text.targets)
    job = next((job for job in jobs if id(job) not in failed and not job.done.done()), None)
    if job is not None:
        job.batches.append(batch)


def count_waiting_tokens(jobs: Iterable[PendingRequest], enough: int) -> int:
    """Tokens of these jobs' texts that wait. Counting stops at `enough`: thousands of texts may wait, and it is asked
    before every layer.
    """
    tokens = 0
    for text in chain.from_iterable(job.unscheduled for job in jobs):
        tokens += len(text.ids)
        if tokens >= enough:
            break
    return tokens


def is_worth_splitting(limit: BatchLimits, jobs: Iterable[PendingRequest]) -> bool:
    """Whether these jobs' texts are worth a thread of their own."""
    return count_waiting_tokens(jobs, limit.part_tokens) >= limit.part_tokens


def split_for_threads(limit: BatchLimits, jobs: Iterable[PendingRequest], num_threads: int) -> BatchLimits:
    """Smaller batches where several threads have nothing else to do than what these jobs bring, and it is enough."""
    tokens = count_waiting_tokens(jobs, num_threads * limit.max_tokens)
    num_parts = min(num_threads, tokens // limit.part_tokens)
    if num_parts < 2:
        return limit
    return BatchLimits(min(limit.max_tokens, -(-tokens // num_parts)), limit.max_items)


def form_batch(jobs: Sequence[PendingRequest], limit: BatchLimits) -> list[Entry]:
    """Take the next batch out of the jobs' pending texts, sorted by length.

    Every waiting job gets an equal share of the tokens first, so that one text leaves with the next batch however
    many a neighbour has brought; what is left over goes to the oldest.
    """
    batch = _Batch(limit)
    live = [job for job in jobs if job.unscheduled]
    share = limit.max_tokens // max(len(live), 1)
    for allowance in (share, limit.max_tokens):
        for job in live:
            batch.take(job, allowance)
    return sorted(batch.texts, key=lambda text: len(text.ids))


class _Batch:
    def __init__(self, limit: BatchLimits) -> None:
        self.texts: list[Entry] = []
        self._room_tokens = limit.max_tokens
        self._room_items = limit.max_items

    def take(self, job: PendingRequest, allowance: int) -> None:
        """The longest texts of a job first, so that the last batches of a large request are the easy ones."""
        while job.unscheduled and self._room_items:
            length = len(job.unscheduled[-1].ids)
            fits = length <= min(allowance, self._room_tokens)
            if not fits and self.texts:
                return
            text = job.unscheduled.pop()
            text.owner = None
            self.texts.append(text)
            self._room_items -= 1
            self._room_tokens -= length
            allowance -= length
