"""Tests the rules that cut batches."""

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.batching.batch import BatchLimits, form_batch, split_for_threads
from engines.batching.output import DenseOutput
from engines.batching.request import Entry, PendingRequest, RowTarget
from engines.inputs.tokenizer import TokenizedRequest

LIMIT = BatchLimits(max_tokens=100, max_items=8)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def job(loop: asyncio.AbstractEventLoop, *lengths: int) -> PendingRequest:
    """Make a request with waiting texts, none of them twice."""
    encoded = TokenizedRequest(tuple(np.full(length, index) for index, length in enumerate(lengths)))
    request = PendingRequest(encoded, DenseOutput(4, True, False), loop, 0.0)
    texts = [Entry(ids, request.keys[index], [RowTarget(request, index)]) for index, ids in enumerate(encoded.ids)]
    request.unscheduled = sorted(texts, key=lambda text: len(text.ids))
    return request


def lengths(texts: Sequence[Entry]) -> list[int]:
    return [len(text.ids) for text in texts]


def owners(texts: Sequence[Entry]) -> list[PendingRequest]:
    return [text.targets[0].job for text in texts]


def test_a_batch_holds_as_many_tokens_as_fit_and_is_sorted_by_length(loop: asyncio.AbstractEventLoop) -> None:
    request = job(loop, 10, 60, 30, 20)

    first, second = form_batch([request], LIMIT), form_batch([request], LIMIT)

    assert lengths(first) == [30, 60]
    assert lengths(second) == [10, 20]


def test_a_text_longer_than_the_budget_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    request = job(loop, 500, 10)

    assert lengths(form_batch([request], LIMIT)) == [500]
    assert lengths(form_batch([request], LIMIT)) == [10]


def test_a_batch_holds_no_more_texts_than_allowed(loop: asyncio.AbstractEventLoop) -> None:
    assert len(form_batch([job(loop, *[1] * 20)], LIMIT)) == 8


def test_one_text_is_in_the_next_batch_however_many_texts_another_request_has(
    loop: asyncio.AbstractEventLoop,
) -> None:
    bulk, single = job(loop, *[10] * 2048), job(loop, 30)

    batch = form_batch([bulk, single], LIMIT)

    assert owners(batch).count(single) == 1
    assert sum(lengths(batch)) == 100


def test_what_a_job_leaves_of_its_share_goes_to_the_oldest(loop: asyncio.AbstractEventLoop) -> None:
    first, second, third = job(loop, *[20] * 9), job(loop, 5), job(loop, *[20] * 9)

    batch = form_batch([first, second, third], LIMIT)

    assert [owners(batch).count(owner) for owner in (first, second, third)] == [3, 1, 1]


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
        requests = [job(loop, *sizes) for sizes in jobs]
        seen: list[tuple[int, int]] = []
        while batch := form_batch(requests, BatchLimits(max_tokens, max_items)):
            assert sum(lengths(batch)) <= max_tokens or len(batch) == 1
            assert len(batch) <= max_items
            seen += [(requests.index(text.targets[0].job), text.targets[0].index) for text in batch]
    finally:
        loop.close()

    assert sorted(seen) == [(j, i) for j, sizes in enumerate(jobs) for i in range(len(sizes))]


def test_work_for_several_threads_is_split_into_equal_parts(loop: asyncio.AbstractEventLoop) -> None:
    request = job(loop, *[20] * 20)

    assert split_for_threads(BatchLimits(512, 64), [request], 1) == BatchLimits(512, 64)
    assert split_for_threads(BatchLimits(512, 64), [request], 2) == BatchLimits(200, 64)
    assert split_for_threads(BatchLimits(150, 64), [request], 2) == BatchLimits(150, 64)


def test_unsplit_batches_do_not_depend_on_the_idle_threads(loop: asyncio.AbstractEventLoop) -> None:
    limit = BatchLimits(max_tokens=256, max_items=64).unsplit()

    def batches(idle: Sequence[int]) -> list[list[int]]:
        waiting = [job(loop, *(20 + n % 50 for n in range(30)))]
        return [lengths(form_batch(waiting, split_for_threads(limit, waiting, 1 + num_idle))) for num_idle in idle]

    expected = batches([0] * 6)
    assert sum(map(len, expected)) == 30
    assert batches([1] * 6) == batches([0, 1, 0, 1, 3, 3]) == expected


def test_work_that_is_not_enough_for_two_threads_stays_together(loop: asyncio.AbstractEventLoop) -> None:
    assert split_for_threads(BatchLimits(512, 64), [job(loop, *[12] * 8)], 2) == BatchLimits(512, 64)
    assert split_for_threads(BatchLimits(512, 64), [job(loop, *[16] * 8)], 2) == BatchLimits(64, 64)
    assert split_for_threads(BatchLimits(512, 64), [job(loop, *[16] * 12)], 4) == BatchLimits(64, 64)
    assert split_for_threads(BatchLimits(512, 64, part_tokens=12), [job(loop, 12, 12)], 2) == BatchLimits(12, 64)


def test_a_job_is_small_up_to_a_quarter_of_a_batch(loop: asyncio.AbstractEventLoop) -> None:
    assert LIMIT.is_small(job(loop, 20, 5))
    assert not LIMIT.is_small(job(loop, 20, 6))
