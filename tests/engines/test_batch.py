"""The queue and the rule that cuts batches."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.batch import Job, Limit, Output, Queue, cut
from engines.errors import QueueFull
from engines.tokenize import Encoded

LIMIT = Limit(max_tokens=100, max_items=8)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def job(loop: asyncio.AbstractEventLoop, *lengths: int, at_s: float = 0.0) -> Job:
    ids = tuple(np.arange(length, dtype=np.int64) for length in lengths)
    return Job(Encoded(ids), Output(4, True, False), loop, at_s)


def lengths(entries: list[object]) -> list[int]:
    return [len(entry.ids) for entry in entries]  # type: ignore[attr-defined]  # entries of any job


def test_a_batch_holds_as_many_tokens_as_fit_and_is_sorted_by_length(loop: asyncio.AbstractEventLoop) -> None:
    request = job(loop, 10, 60, 30, 20)

    first, second = cut([request], LIMIT), cut([request], LIMIT)

    assert lengths([*first]) == [30, 60]
    assert lengths([*second]) == [10, 20]


def test_a_text_longer_than_the_budget_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    request = job(loop, 500, 10)

    assert lengths([*cut([request], LIMIT)]) == [500]
    assert lengths([*cut([request], LIMIT)]) == [10]


def test_a_batch_holds_no_more_texts_than_allowed(loop: asyncio.AbstractEventLoop) -> None:
    assert len(cut([job(loop, *[1] * 20)], LIMIT)) == 8


def test_one_text_leaves_with_the_next_batch_however_many_its_neighbour_brought(
    loop: asyncio.AbstractEventLoop,
) -> None:
    bulk, single = job(loop, *[10] * 2048), job(loop, 30)

    batch = cut([bulk, single], LIMIT)

    assert [entry.job for entry in batch].count(single) == 1
    assert sum(lengths([*batch])) == 100


def test_what_a_job_leaves_of_its_share_goes_to_the_oldest(loop: asyncio.AbstractEventLoop) -> None:
    first, second, third = job(loop, *[20] * 9), job(loop, 5), job(loop, *[20] * 9)

    batch = cut([first, second, third], LIMIT)

    assert [[entry.job for entry in batch].count(owner) for owner in (first, second, third)] == [3, 1, 1]


@given(
    jobs=st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=12), min_size=1, max_size=6),
    max_tokens=st.integers(1, 200),
    max_items=st.integers(1, 10),
)
def test_every_text_leaves_exactly_once_and_no_batch_passes_its_bounds(
    jobs: list[list[int]], max_tokens: int, max_items: int
) -> None:
    loop = asyncio.new_event_loop()
    try:
        owners = [job(loop, *sizes) for sizes in jobs]
        seen: list[tuple[int, int]] = []
        while batch := cut(owners, Limit(max_tokens, max_items)):
            total = sum(len(entry.ids) for entry in batch)
            assert total <= max_tokens or len(batch) == 1
            assert len(batch) <= max_items
            seen += [(owners.index(entry.job), entry.index) for entry in batch]
    finally:
        loop.close()

    assert sorted(seen) == [(j, i) for j, sizes in enumerate(jobs) for i in range(len(sizes))]


def test_a_request_that_does_not_fit_whole_is_refused_whole(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(10, 0.0, lambda: 0.0)
    queue.admit(job(loop, *[1] * 8))

    with pytest.raises(QueueFull, match=r"8 texts wait .* 3 more would pass the 10"):
        queue.admit(job(loop, 1, 1, 1))

    assert queue.num_items == 8


def test_a_request_larger_than_the_queue_is_let_into_an_empty_one(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(10, 0.0, lambda: 0.0)

    queue.admit(job(loop, *[1] * 50))

    assert queue.num_items == 50


def test_a_dropped_job_costs_no_batch(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.0, lambda: 0.0)
    left, stays = job(loop, 5, 5, 5), job(loop, 7)
    queue.admit(left)
    queue.admit(stays)

    queue.drop(left)

    assert [entry.job for entry in queue.cut(LIMIT)] == [stays]
    assert queue.due_in_s(LIMIT) is None


def test_without_a_batch_timeout_work_is_due_at_once(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.0, lambda: 50.0)
    assert queue.due_in_s(LIMIT) is None

    queue.admit(job(loop, 5, at_s=50.0))

    assert queue.due_in_s(LIMIT) == 0.0


def test_a_batch_that_is_not_full_waits_for_company_no_longer_than_the_timeout(
    loop: asyncio.AbstractEventLoop,
) -> None:
    now = 10.0
    queue = Queue(100, 0.5, lambda: now)
    queue.admit(job(loop, 5, at_s=10.0))
    assert queue.due_in_s(LIMIT) == pytest.approx(0.5)

    now = 10.6

    assert queue.due_in_s(LIMIT) == 0.0


def test_a_full_batch_waits_for_nobody(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.5, lambda: 10.0)

    queue.admit(job(loop, 60, 60, at_s=10.0))

    assert queue.due_in_s(LIMIT) == 0.0
