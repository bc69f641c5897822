"""Tests the queue: admission, shared texts, and that no request waits for a cancelled one."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.batching.batch import BatchLimits
from engines.batching.output import DenseOutput
from engines.batching.queue import Queue, Throughput
from engines.batching.request import Entry, Origin, PendingRequest
from engines.errors import QueueFull
from engines.inputs.tokenizer import TokenizedRequest

LIMIT = BatchLimits(max_tokens=100, max_items=64)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def queue() -> Queue:
    return Queue(1000, 0.0, lambda: 0.0)


def job(
    loop: asyncio.AbstractEventLoop,
    *texts: str,
    at_s: float = 0.0,
    prompt_tokens: int = 0,
    origin: Origin = Origin(),  # noqa: B008  # frozen
) -> PendingRequest:
    """Make a request; every letter is a token."""
    ids = tuple(np.array([ord(letter) for letter in text]) for text in texts)
    return PendingRequest(
        TokenizedRequest(ids, prompt_tokens=prompt_tokens), DenseOutput(4, True, False), loop, at_s, origin
    )


def words(texts: Sequence[Entry]) -> list[str]:
    return ["".join(chr(letter) for letter in text.ids) for text in texts]


def wanted_by(text: Entry) -> list[tuple[PendingRequest, int]]:
    return [(want.job, want.index) for want in text.targets]


# ---- being let in ----


def test_a_request_that_does_not_fit_whole_is_refused_whole(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(10, 0.0, lambda: 0.0)
    queue.admit(job(loop, *"abcdefgh"))

    with pytest.raises(QueueFull, match=r"8 texts wait .* 3 more would pass the 10"):
        queue.admit(job(loop, *"xyz"))

    assert queue.num_items == 8


def test_a_request_larger_than_the_queue_is_let_into_an_empty_one(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(10, 0.0, lambda: 0.0)

    queue.admit(job(loop, *(str(number) for number in range(50))))

    assert queue.num_items == 50


def fill(queue: Queue, loop: asyncio.AbstractEventLoop, caller: str) -> int:
    """Return how many texts a caller gets into the queue, four per request."""
    for number in range(100):
        try:
            queue.admit(job(loop, *(f"{caller}{number}{letter}" for letter in "abcd"), origin=Origin(caller)))
        except QueueFull:
            return 4 * number
    raise AssertionError("the queue took everything")


def test_no_caller_fills_the_queue_and_later_callers_are_admitted(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.0, lambda: 0.0)

    assert [fill(queue, loop, caller) for caller in ("one", "two", "three", "four")] == [48, 24, 12, 8]
    with pytest.raises(QueueFull, match=r"48 of your texts wait .* 1 more would pass the 28 that you may .* of 100 "):
        queue.admit(job(loop, "z", origin=Origin("one")))
    queue.admit(job(loop, *"abcdefgh", origin=Origin("five")))


def test_a_single_or_anonymous_caller_may_use_the_whole_queue(loop: asyncio.AbstractEventLoop) -> None:
    assert fill(Queue(100, 0.0, lambda: 0.0), loop, "") == 100
    queue = Queue(10, 0.0, lambda: 0.0)
    queue.admit(job(loop, *"abcdefghij", origin=Origin("one")))

    assert queue.num_items == 10, "a caller's first request needs no share"


def test_a_refused_request_gets_the_time_of_the_texts_before_it(loop: asyncio.AbstractEventLoop) -> None:
    now = 0.0
    queue = Queue(1000, 0.0, lambda: now)
    queue.admit(job(loop, *(f"{number}" for number in range(1000))))

    def told_s() -> float:
        with pytest.raises(QueueFull) as caught:
            queue.admit(job(loop, *(f"more {number}" for number in range(1000))))
        return caught.value.retry_after_s

    at_once = told_s()
    now = 20.0
    unmeasured = told_s()
    queue.seal(queue.next_batch(BatchLimits(10_000, 100)))
    measured = told_s()
    now = 21.0
    queue.seal(queue.next_batch(BatchLimits(10_000, 320)))
    faster = told_s()

    assert (at_once, unmeasured) == (1.0, 20.0)
    assert measured == 900 / (100 / 20)
    assert faster == pytest.approx(580 / (420 / 21))


def test_a_wait_is_bounded_and_ignores_old_batches() -> None:
    throughput = Throughput()
    throughput.begin(0.0)
    throughput.end(100, 100.0)  # one a second
    slow_s = throughput.wait_s(8192, 100.0), throughput.wait_s(60, 100.0)
    for second in range(101, 400):
        throughput.end(1000, float(second))

    assert slow_s == (300.0, 60.0)
    assert throughput.wait_s(8192, 400.0) == pytest.approx(8.192, rel=0.05)
    assert throughput.wait_s(1, 400.0) == 0.1


def test_few_texts_after_a_pause_do_not_pass_for_the_pace_of_full_batches() -> None:
    throughput = Throughput()
    throughput.begin(0.0)
    throughput.end(512, 1.0)
    throughput.begin(100.0)
    throughput.end(1, 100.1)

    assert throughput.wait_s(5120, 100.1) == 10.0


def test_callers_do_not_share_what_is_under_way(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    """A faster answer would reveal that another caller has sent the same text."""
    one, again, two = (job(loop, "same", origin=Origin(caller)) for caller in ("one", "one", "two"))

    assert [queue.admit(each) for each in (one, again, two)] == [0, 1, 0]
    assert [wanted_by(text) for text in queue.next_batch(LIMIT)] == [[(one, 0), (again, 0)], [(two, 0)]]


def test_callers_share_where_the_registry_allows_it(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    one, two = (job(loop, "same", origin=Origin(caller, is_open=True)) for caller in ("one", "two"))

    assert [queue.admit(each) for each in (one, two)] == [0, 1]


def test_texts_that_wait_together_are_worth_a_thread_of_their_own_or_not(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    assert not queue.is_worth_splitting(LIMIT)

    queue.admit(job(loop, "a" * 30, "b" * 30))
    assert not queue.is_worth_splitting(LIMIT)
    assert queue.is_worth_splitting(BatchLimits(100, 64, part_tokens=60))

    queue.admit(job(loop, "cccc"))
    assert queue.is_worth_splitting(LIMIT)


def test_a_dropped_job_costs_no_batch(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    left, stays = job(loop, "one", "two"), job(loop, "three")
    queue.admit(left)
    queue.admit(stays)

    queue.drop(left)

    assert words(queue.next_batch(LIMIT)) == ["three"]
    assert queue.ready_in_s(LIMIT) is None


# ---- when a batch is due ----


def test_without_a_batch_timeout_work_is_due_at_once(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    assert queue.ready_in_s(LIMIT) is None

    queue.admit(job(loop, "text"))

    assert queue.ready_in_s(LIMIT) == 0.0


def test_a_small_batch_waits_for_clients_that_were_just_answered(loop: asyncio.AbstractEventLoop) -> None:
    now = 10.0
    queue = Queue(100, 0.0, lambda: now)
    queue.admit(job(loop, "one"))
    queue.admit(job(loop, "two"))
    queue.next_batch(LIMIT)
    queue.admit(job(loop, "waits"))
    queue.on_batch_done(2, 0.1)
    assert queue.ready_in_s(LIMIT) == pytest.approx(0.035)

    queue.admit(job(loop, "one again"))
    assert queue.ready_in_s(LIMIT) == pytest.approx(0.035)
    queue.admit(job(loop, "two again"))
    assert queue.ready_in_s(LIMIT) == 0.0


def test_of_the_clients_that_a_batch_waits_for_only_the_first_and_the_last_wake_a_thread(
    loop: asyncio.AbstractEventLoop,
) -> None:
    """The first sets the timer of the thread that waits, the last ends its wait."""
    queue = Queue(1000, 0.0, lambda: 5.0)
    queue.on_batch_done(4, took_s=0.1)

    back = [job(loop, text) for text in "abcd"]
    for one in back:
        queue.admit(one)

    assert [one.needs_thread for one in back] == [True, False, False, True]


def test_a_request_beside_one_that_waits_for_nobody_wakes_a_thread(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(1000, 0.0, lambda: 5.0)

    jobs = [job(loop, text) for text in "ab"]
    for one in jobs:
        queue.admit(one)

    assert [one.needs_thread for one in jobs] == [True, True]


def test_a_request_that_makes_a_batch_large_enough_wakes_a_thread(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(1000, 0.0, lambda: 5.0)
    queue.on_batch_done(4, took_s=0.1)

    jobs = [job(loop, "a"), job(loop, "b"), job(loop, "c" * 126)]
    for one in jobs:
        queue.admit(one)

    assert [one.needs_thread for one in jobs] == [True, False, True]


def test_a_full_batch_does_not_wait_for_clients_that_were_just_answered(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.0, lambda: 10.0)
    queue.admit(job(loop, "one"))
    queue.next_batch(LIMIT)
    queue.admit(job(loop, "x" * 100))
    queue.on_batch_done(9, 0.1)

    assert queue.ready_in_s(LIMIT) == 0.0


def test_a_batch_that_is_not_full_waits_for_answered_clients_no_longer_than_the_timeout(
    loop: asyncio.AbstractEventLoop,
) -> None:
    now = 10.0
    queue = Queue(100, 0.5, lambda: now)
    queue.admit(job(loop, "one"))
    queue.admit(job(loop, "two"))
    queue.next_batch(LIMIT)
    queue.on_batch_done(2, 0.01)
    queue.admit(job(loop, "one again", at_s=10.0))
    assert queue.ready_in_s(LIMIT) == pytest.approx(0.5)

    now = 10.6

    assert queue.ready_in_s(LIMIT) == 0.0


def test_a_timeout_ends_when_all_answered_clients_are_back(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.5, lambda: 10.0)
    queue.on_batch_done(2, 0.01)

    queue.admit(job(loop, "one", at_s=10.0))
    assert queue.ready_in_s(LIMIT) == pytest.approx(0.5)
    queue.admit(job(loop, "two", at_s=10.0))

    assert queue.ready_in_s(LIMIT) == 0.0


def test_a_lone_request_does_not_wait_for_the_timeout(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.5, lambda: 10.0)

    queue.admit(job(loop, "first", at_s=10.0))
    assert queue.ready_in_s(LIMIT) == 0.0
    queue.next_batch(LIMIT)
    queue.on_batch_done(1, 0.01)
    queue.admit(job(loop, "next of the same client", at_s=10.0))

    assert queue.ready_in_s(LIMIT) == 0.0


def test_as_many_requests_wait_as_may_whatever_their_texts(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.0, lambda: 10.0, max_requests=2)
    queue.admit(job(loop, *"abcdefgh"))
    queue.admit(job(loop, *"ijklmnop"))

    with pytest.raises(QueueFull, match=r"2 of 2 requests wait for this model \(MAX_QUEUE_SIZE\)"):
        queue.admit(job(loop, "q"))


def test_a_full_batch_does_not_wait(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(100, 0.5, lambda: 10.0)

    queue.admit(job(loop, "x" * 60, "y" * 60, at_s=10.0))

    assert queue.ready_in_s(LIMIT) == 0.0


# ---- small jobs beside bulk jobs ----


def test_small_jobs_have_every_other_batch_for_themselves(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, *(f"{number:09}" for number in range(40))))
    queue.admit(job(loop, "a", "b"))

    first = words(queue.next_batch(LIMIT))
    queue.admit(job(loop, "c"))
    second = words(queue.next_batch(LIMIT))
    queue.admit(job(loop, "d"))
    third = words(queue.next_batch(LIMIT))

    assert sorted(first) == ["a", "b"]
    assert (second[0], len(second)) == ("c", 12), "its share, beside the bulk's"
    assert third == ["d"]


def test_without_bulk_jobs_small_ones_fill_a_batch_together(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    for letter in "abc":
        queue.admit(job(loop, letter))

    assert sorted(words(queue.next_batch(LIMIT))) == ["a", "b", "c"]


def test_a_batch_of_small_jobs_leaves_the_bulk_alone(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, *(f"{number:09}" for number in range(40))))

    assert queue.next_small_batch(LIMIT) == []
    queue.admit(job(loop, "a"))
    assert words(queue.next_small_batch(LIMIT)) == ["a"]
    assert queue.num_items == 40


def test_idle_threads_get_a_part_each(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, *(f"{number:010}" for number in range(16))))

    assert len(queue.next_batch(BatchLimits(512, 64), 2)) == 8
    assert len(queue.next_batch(BatchLimits(512, 64), 1)) == 8


# ---- the same text for several ----


def test_the_same_text_is_computed_once_for_all_requests(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    first, second = job(loop, "same", "other"), job(loop, "new", "same", "same")

    assert (queue.admit(first), queue.admit(second)) == (0, 2)
    cut = queue.next_batch(LIMIT)
    texts = dict(zip(words(cut), cut, strict=True))

    assert sorted(texts) == ["new", "other", "same"]
    assert wanted_by(texts["same"]) == [(first, 0), (second, 1), (second, 2)]


def test_a_request_for_a_running_text_shares_its_vector(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    first, late = job(loop, "same"), job(loop, "same")
    queue.admit(first)
    (running,) = queue.next_batch(LIMIT)

    assert queue.admit(late) == 1
    assert wanted_by(running) == [(first, 0), (late, 0)]
    assert queue.ready_in_s(LIMIT) is None


def test_a_request_after_the_vector_is_delivered_computes_it_again(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    queue.admit(job(loop, "same"))
    running = queue.next_batch(LIMIT)
    queue.seal(running)
    late = job(loop, "same")

    assert queue.admit(late) == 0
    assert [wanted_by(text) for text in queue.next_batch(LIMIT)] == [[(late, 0)]]


def test_a_text_under_another_prompt_is_another_text(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, "same"))

    assert queue.admit(job(loop, "same", prompt_tokens=2)) == 0
    assert sorted(text.prompt_tokens for text in queue.next_batch(LIMIT)) == [0, 2]


def test_a_text_whose_owner_is_cancelled_passes_to_the_next_sharer(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    owner, heir = job(loop, "same", "gone"), job(loop, "same")
    queue.admit(owner)
    queue.admit(heir)

    queue.drop(owner)

    assert [wanted_by(text) for text in queue.next_batch(LIMIT)] == [[(heir, 0)]]


@pytest.mark.parametrize("is_small_first", [False, True], ids=["bulk first", "small first"])
def test_a_text_that_a_bulk_job_wants_too_leaves_with_the_small_job(
    loop: asyncio.AbstractEventLoop, queue: Queue, is_small_first: bool
) -> None:
    bulk, small = job(loop, *(f"{number:09}" for number in range(40))), job(loop, f"{7:09}")
    reused = [queue.admit(each) for each in ((small, bulk) if is_small_first else (bulk, small))]

    (first,) = queue.next_batch(LIMIT)

    assert reused == [0, 1]
    assert sorted(wanted_by(first), key=lambda want: want[1]) == [(small, 0), (bulk, 7)]
    left = [word for _ in range(4) for word in words(queue.next_batch(LIMIT))]
    assert sorted(left) == sorted(f"{number:09}" for number in range(40) if number != 7)


def test_when_the_small_job_leaves_its_text_goes_back_to_the_bulk(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    bulk, small = job(loop, "same", "more"), job(loop, "same")
    queue.admit(bulk)
    queue.admit(small)

    queue.drop(small)

    assert sorted(words(queue.next_batch(LIMIT))) == ["more", "same"]


def test_a_job_whose_every_text_went_to_smaller_ones_waits_for_them(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    large, one, two = job(loop, "one", "two"), job(loop, "one"), job(loop, "two")
    for each in (large, one, two):
        queue.admit(each)

    texts = queue.next_batch(LIMIT)

    assert sorted(words(texts)) == ["one", "two"]
    assert all(len(text.targets) == 2 for text in texts)
    assert queue.ready_in_s(LIMIT) is None


def test_a_cancelled_request_does_not_stop_a_running_text(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    owner, other = job(loop, "same"), job(loop, "same")
    queue.admit(owner)
    queue.admit(other)
    (running,) = queue.next_batch(LIMIT)

    queue.drop(owner)

    assert wanted_by(running) == [(other, 0)]


def test_texts_that_could_not_be_run_wait_again(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    stays, left = job(loop, "stays"), job(loop, "left")
    queue.admit(stays)
    queue.admit(left)
    texts = queue.next_batch(LIMIT)
    queue.drop(left)

    queue.requeue(texts)

    assert words(queue.next_batch(LIMIT)) == ["stays"]
    assert queue.admit(job(loop, "left")) == 0


def test_requeueing_an_unwanted_sealed_entry_keeps_its_successor(queue: Queue, loop: asyncio.AbstractEventLoop) -> None:
    first, later = job(loop, "same"), job(loop, "same")
    queue.admit(first)
    texts = queue.next_batch(LIMIT, 1)
    queue.seal(texts)
    queue.admit(later)
    queue.drop(first)
    queue.requeue(texts)

    queue.admit(shares := job(loop, "same"))

    assert wanted_by(later.entries[0]) == [(later, 0), (shares, 0)]


def test_clearing_returns_every_request_once_also_those_that_share_a_running_text(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    running, follower, waiting = job(loop, "a"), job(loop, "a"), job(loop, "b", "c")
    queue.admit(running)
    queue.next_batch(LIMIT)
    queue.admit(follower)
    queue.admit(waiting)

    assert {id(found) for found in queue.clear()} == {id(running), id(follower), id(waiting)}
    assert queue.num_items == 0
    for each in (running, follower, waiting):
        queue.drop(each)
    assert queue.num_items == 0


class Storm:
    """Random steps: requests are added, share texts and are cancelled; batches are cut, run or requeued."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.loop = asyncio.new_event_loop()
        self.queue = Queue(10_000, 0.0, lambda: 0.0)
        self.jobs: list[PendingRequest] = []
        self.gone: set[PendingRequest] = set()
        self.running: list[list[Entry]] = []
        self.answered: Counter[tuple[PendingRequest, int]] = Counter()

    def step(self) -> None:
        """Take one random step."""
        steps = [self.come, self.come, self.cut, self.cut_flex, self.finish_one, self.put_back_one, self.leave]
        self.chance.choice(steps)()
        assert self.queue.num_items == sum(len(each.unscheduled) for each in self.jobs)
        for each in self.jobs:
            assert all(text.owner is each for text in each.unscheduled)
            assert all(rank(each) == min(rank(w.job) for w in text.targets) for text in each.unscheduled)
            assert all(text.is_flex is each.is_flex for text in each.unscheduled)

    def come(self) -> None:
        texts = [self.chance.choice("abcdefgh") for _ in range(self.chance.randint(1, 5))]
        self.jobs.append(job(self.loop, *texts, origin=Origin(is_flex=self.chance.random() < 0.4)))
        self.queue.admit(self.jobs[-1])

    def cut(self) -> None:
        self.running.append(
            self.queue.next_batch(BatchLimits(self.chance.randint(1, 4), 64), self.chance.randint(1, 2))
        )

    def cut_flex(self) -> None:
        self.running.append(self.queue.next_flex_batch(BatchLimits(self.chance.randint(1, 4), 64)))

    def finish_one(self) -> None:
        if self.running:
            self.finish(self.running.pop(self.chance.randrange(len(self.running))))

    def put_back_one(self) -> None:
        if self.running:
            self.queue.requeue(self.running.pop(self.chance.randrange(len(self.running))))

    def leave(self) -> None:
        if self.jobs:
            leaving = self.chance.choice(self.jobs)
            self.gone.add(leaving)
            self.queue.drop(leaving)

    def finish(self, texts: list[Entry]) -> None:
        self.queue.seal(texts)
        self.answered.update((want.job, want.index) for text in texts for want in text.targets)

    def end(self) -> None:
        """End all running batches."""
        for texts in self.running:
            self.finish(texts)
        while texts := self.queue.next_batch(LIMIT) or self.queue.next_flex_batch(LIMIT):
            self.finish(texts)
        self.loop.close()


def rank(each: PendingRequest) -> tuple[bool, int]:
    return each.is_flex, each.num_tokens


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60))
def test_every_input_of_a_request_that_is_not_cancelled_is_answered_exactly_once(seed: int, steps: int) -> None:
    storm = Storm(random.Random(seed))

    for _ in range(steps):
        storm.step()
    storm.end()

    stayed = {(each, index) for each in storm.jobs if each not in storm.gone for index in range(len(each.ids))}
    assert {key: storm.answered[key] for key in stayed} == dict.fromkeys(stayed, 1)
    assert storm.queue.num_items == 0
