"""Flex requests in the queue: a class behind the other, texts shared without priority inversion, fair callers."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from msgspec import structs

from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.batching.flex import flex_limit
from engines.batching.output import DenseOutput
from engines.batching.queue import Queue
from engines.batching.request import Entry, Origin, PendingRequest
from engines.device.scheduler import DeviceScheduler
from engines.errors import QueueFull
from engines.inputs.tokenizer import TokenizedRequest, Tokenizer, TokenizerLimits
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.spec import Matryoshka, ModelSpec
from engines.types import EmbedCall, ModelInfo
from tests.testkit.encoders import WIDTH, Letters, ScriptedEncoder

LIMIT = BatchLimits(max_tokens=100, max_items=64)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def queue() -> Queue:
    return Queue(1000, 0.0, lambda: 0.0)


def job(loop: asyncio.AbstractEventLoop, *texts: str, is_flex: bool = False, caller: str = "") -> PendingRequest:
    """Make a request; every letter is a token."""
    ids = tuple(np.array([ord(letter) for letter in text]) for text in texts)
    origin = Origin(caller, is_flex=is_flex)
    return PendingRequest(TokenizedRequest(ids), DenseOutput(4, True, False), loop, 0.0, origin)


def words(texts: list[Entry]) -> list[str]:
    return ["".join(chr(letter) for letter in text.ids) for text in texts]


def jobs_of(texts: list[Entry]) -> list[list[PendingRequest]]:
    return [[target.job for target in text.targets] for text in texts]


def test_each_class_has_batches_of_its_own(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, "flex", is_flex=True))
    is_ready = queue.ready_in_s(LIMIT)
    queue.admit(job(loop, "usual"))

    assert is_ready is None
    assert (queue.num_items, queue.num_flex_items) == (2, 1)
    assert words(queue.next_batch(LIMIT)) == ["usual"]
    assert words(queue.next_flex_batch(LIMIT)) == ["flex"]
    assert (queue.next_batch(LIMIT), queue.next_flex_batch(LIMIT), queue.num_items) == ([], [], 0)


def test_a_text_that_waits_for_a_flex_request_is_raised_by_another(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    flex, usual = job(loop, "same", "other", is_flex=True), job(loop, "same", "and a longer one of its own")
    queue.admit(flex)

    assert queue.admit(usual) == 1
    assert (queue.num_items, queue.num_flex_items) == (3, 1)
    first, second = queue.next_batch(LIMIT)
    assert (jobs_of([first]), jobs_of([second])) == ([[flex, usual]], [[usual]])
    assert words(queue.next_flex_batch(LIMIT)) == ["other"]


def test_when_the_request_that_has_raised_a_text_leaves_it_is_flex_again(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    flex, usual = job(loop, "same", is_flex=True), job(loop, "same")
    queue.admit(flex)
    queue.admit(usual)
    queue.drop(usual)

    assert (queue.ready_in_s(LIMIT), queue.num_flex_items) == (None, 1)
    assert jobs_of(queue.next_flex_batch(LIMIT)) == [[flex]]


def test_no_request_waits_for_a_flex_batch_that_runs(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    """It may be held up for long."""
    flex, again, usual = job(loop, "same", is_flex=True), job(loop, "same", is_flex=True), job(loop, "same")
    queue.admit(flex)
    running = queue.next_flex_batch(LIMIT)

    assert (queue.admit(again), queue.admit(usual)) == (1, 0)
    batch = queue.next_batch(LIMIT)
    assert (jobs_of(running), jobs_of(batch)) == ([[flex, again]], [[usual]])
    queue.seal(running)
    queue.seal(batch)
    assert queue.admit(job(loop, "same")) == 0


def test_a_flex_request_shares_what_is_under_way_for_another(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    usual, flex = job(loop, "same"), job(loop, "same", is_flex=True)
    queue.admit(usual)

    assert queue.admit(flex) == 1
    assert jobs_of(queue.next_batch(LIMIT)) == [[usual, flex]]
    assert queue.next_flex_batch(LIMIT) == []


def test_flex_texts_of_a_failed_path_wait_as_flex_again(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, "one", is_flex=True))
    queue.requeue(queue.next_flex_batch(LIMIT))

    assert words(queue.next_flex_batch(LIMIT)) == ["one"]


def test_clearing_returns_requests_of_both_classes(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    both = [job(loop, "one", is_flex=True), job(loop, "two")]
    for each in both:
        queue.admit(each)

    assert {id(each) for each in queue.clear()} == {id(each) for each in both}
    assert queue.num_items == 0


def test_flex_requests_never_fill_the_places_of_others(loop: asyncio.AbstractEventLoop) -> None:
    queue = Queue(10, 0.0, lambda: 0.0, max_requests=2)
    queue.admit(job(loop, *"abcdef", is_flex=True))
    with pytest.raises(QueueFull, match=r"6 texts wait .* 5 more would pass the 10"):
        queue.admit(job(loop, *"ghijk", is_flex=True))
    queue.admit(job(loop, "g", is_flex=True))
    with pytest.raises(QueueFull, match=r"2 of 2 requests wait"):
        queue.admit(job(loop, "h", is_flex=True))

    queue.admit(job(loop, *"ABCDEFGHI"))
    queue.admit(job(loop, "J"))

    assert queue.num_items == 17


@pytest.mark.parametrize("sizes", [(10, 10), (10, 50), (30, 70), (100, 40)])
def test_two_flex_callers_get_equal_tokens_whatever_their_texts(
    loop: asyncio.AbstractEventLoop, queue: Queue, sizes: tuple[int, int]
) -> None:
    for caller, size in zip("ab", sizes, strict=True):
        texts = [f"{number:03}".ljust(size, caller) for number in range(200)]
        queue.admit(job(loop, *texts, is_flex=True, caller=caller))
    had: Counter[str] = Counter()

    for _ in range(12):
        for text in queue.next_flex_batch(LIMIT):
            had[text.targets[0].job.caller] += len(text.ids)

    assert abs(had["a"] - had["b"]) <= 2 * max(sizes)


def test_a_flex_caller_that_comes_later_starts_level(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    queue.admit(job(loop, *(f"a{number:03}" for number in range(900)), is_flex=True, caller="a"))
    for _ in range(20):
        queue.next_flex_batch(LIMIT)
    queue.admit(job(loop, *(f"b{number:02}z" for number in range(60)), is_flex=True, caller="b"))

    batch = words(queue.next_flex_batch(LIMIT))

    assert sum(word.startswith("a") for word in batch) in (12, 13)


def test_requests_of_one_flex_caller_take_turns(loop: asyncio.AbstractEventLoop, queue: Queue) -> None:
    for name in "ab":
        queue.admit(job(loop, *(f"{name}{number:04}" for number in range(40)), is_flex=True))

    batch = words(queue.next_flex_batch(LIMIT))

    assert sum(word.startswith("a") for word in batch) == sum(word.startswith("b") for word in batch) == 10


def test_a_flex_batch_keeps_its_bounds_and_a_long_text_runs_alone(
    loop: asyncio.AbstractEventLoop, queue: Queue
) -> None:
    queue.admit(job(loop, "x" * 300, "a" * 60, "b" * 40, "c", is_flex=True))

    assert [len(text) for text in words(queue.next_flex_batch(LIMIT))] == [300]
    assert [len(text) for text in words(queue.next_flex_batch(LIMIT))] == [40, 60]
    assert [len(text) for text in words(queue.next_flex_batch(BatchLimits(100, 1)))] == [1]


def test_flex_batches_are_small_where_a_pass_cannot_be_held_up() -> None:
    sizes = [flex_limit(BatchLimits(tokens, 64)).max_tokens for tokens in (256, 512, 1024, 16384)]

    assert sizes == [256, 512, 512, 4096]


# ---- one engine ----


class Bench:
    """An engine with a scripted encoder that calls the preemption point before each batch."""

    def __init__(self) -> None:
        info = ModelInfo(
            dimensions=WIDTH, max_tokens=64, dtype="float32", attention="packed", matryoshka=Matryoshka(widths=())
        )
        self.encoder = ScriptedEncoder()
        self.scheduler = DeviceScheduler("test", check_interval_s=0.0)
        self.threads = TokenizerThreads(1)
        tokenizer = Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))
        spec = ModelSpec(model_id="m", source="/m")
        self.engine = EmbeddingEngine(
            Parts(self.encoder, tokenizer, spec, info), self.scheduler, self.threads,
            EngineLimits(batch=BatchLimits(256, 64)), lambda: (info, 100, 7), lambda: None, 100,
        )  # fmt: skip

    async def embed(self, *texts: str, is_flex: bool = False) -> list[list[float]]:
        call = EmbedCall(model_id="m", texts=texts, normalize=False, is_flex=is_flex)
        vectors: list[list[float]] = (await self.engine.run(call)).array().tolist()
        return vectors


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.scheduler.close()
    bench.threads.close()


async def test_a_flex_call_has_the_same_vectors_as_any_other(bench: Bench) -> None:
    await bench.engine.warm_up()

    assert await bench.embed("one", "twelve", is_flex=True) == await bench.embed("one", "twelve")


async def test_a_call_does_not_wait_for_a_flex_batch_with_the_same_text(bench: Bench) -> None:
    await bench.engine.warm_up()
    begun, gate = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        if threading.current_thread().name.startswith("flex"):
            begun.set()
            gate.wait(10)

    bench.encoder.before = hold
    flex = asyncio.create_task(bench.embed("same", is_flex=True))
    await asyncio.to_thread(begun.wait, 10)
    usual = await asyncio.wait_for(bench.embed("same"), 10)
    was_held = not flex.done()
    gate.set()

    assert was_held
    assert await flex == usual


async def test_an_engine_that_runs_one_batch_at_a_time_waits_for_its_flex_batch(bench: Bench) -> None:
    await bench.engine.warm_up()
    running: list[int] = []
    most: list[int] = []

    def count(_: object) -> None:
        running.append(1)
        most.append(len(running))
        bench.scheduler.preemption_point()
        running.pop()

    bench.encoder.is_reentrant = False
    bench.encoder.before = count

    calls = [bench.embed(f"flex {number}", is_flex=True) for number in range(20)]
    calls += [bench.embed(f"usual {number}") for number in range(20)]
    await asyncio.wait_for(asyncio.gather(*calls), 20)

    assert max(most) == 1


async def test_a_cancelled_flex_call_leaves_nothing_in_the_queue(bench: Bench) -> None:
    await bench.engine.warm_up()
    begun, gate = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(10)

    held = asyncio.create_task(bench.scheduler.call(hold))
    await asyncio.to_thread(begun.wait, 10)
    flex = asyncio.create_task(bench.embed("a", "b", is_flex=True))
    while bench.engine.queue_items < 2:  # noqa: ASYNC110  # the queue has no event to wait for
        await asyncio.sleep(0)
    flex.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flex
    gate.set()
    await held

    assert bench.engine.queue_items == 0
    assert bench.encoder.batches == []


def test_the_class_of_a_call_is_its_own_field() -> None:
    call = EmbedCall(model_id="m", texts=("a",))

    assert (call.is_flex, structs.replace(call, is_flex=True).is_flex) == (False, True)
