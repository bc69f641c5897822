"""Tests one engine, from texts to vectors, with a scripted encoder on a real scheduler."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from engines.batching.batch import BatchLimits, attribute_batch
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.batching.output import DenseOutput
from engines.batching.request import Entry, PendingRequest, RowTarget
from engines.batching.runner import Runner
from engines.device.scheduler import DeviceScheduler
from engines.errors import (
    DimensionsNotSupported,
    EngineFailed,
    InvalidValue,
    NonFiniteEmbedding,
    OutOfMemory,
    QueueFull,
    ShuttingDown,
)
from engines.inputs.tokenizer import Ids, TokenizedRequest, Tokenizer, TokenizerLimits
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.models.base import ForwardPathFailed
from engines.spec import Matryoshka, ModelSpec
from engines.types import Batch, EmbedCall, ModelInfo, TokenizeCall, Tokens
from tests.testkit.encoders import WIDTH, Letters, ScriptedEncoder

ROOMY = BatchLimits(256, 64)

INFO = ModelInfo(
    dimensions=WIDTH, max_tokens=64, dtype="float32", attention="packed", matryoshka=Matryoshka(widths=(2,))
)


class Bench:
    """An engine with its scheduler, threads and scripted encoder."""

    def __init__(
        self,
        limits: EngineLimits,
        spec: ModelSpec,
        num_threads: int = 1,
        backend: Letters | None = None,
        info: ModelInfo = INFO,
    ) -> None:
        self.encoder = ScriptedEncoder()
        self.scheduler = DeviceScheduler("test", num_threads=num_threads, check_interval_s=0.0)
        self.threads = TokenizerThreads(2)
        self.released = 0
        tokenizer = Tokenizer(backend or Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))
        self.engine = EmbeddingEngine(
            Parts(self.encoder, tokenizer, spec, info),
            self.scheduler,
            self.threads,
            limits,
            lambda: (info, 100, 7),
            self.release,
            100,
        )

    def release(self) -> None:
        self.released += 1

    async def embed(self, *texts: str, **options: object) -> NDArray[np.float32]:
        call = EmbedCall(model_id="m", texts=texts, normalize=False, **options)  # type: ignore[arg-type]  # test options
        return (await self.engine.run(call)).array()

    async def hold_scheduler(self) -> Callable[[], Awaitable[object]]:
        """Keep the scheduler's thread busy; return a function that releases it."""
        begun, gate = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            gate.wait()

        held = asyncio.create_task(self.scheduler.call(hold))
        await asyncio.to_thread(begun.wait)

        def release() -> Awaitable[object]:
            gate.set()
            return held

        return release

    async def until_queued(self, num_texts: int) -> None:
        while self.engine.queue_items < num_texts:  # noqa: ASYNC110  # the queue has no event to wait for
            await asyncio.sleep(0)

    def close(self) -> None:
        self.scheduler.close()
        self.threads.close()


@pytest.fixture
def open_bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(  # noqa: PLR0913  # each test names the one or two that it is about
        *,
        batch: BatchLimits = ROOMY,
        max_queue_items: int = 100,
        target_dim: int | None = None,
        cache_bytes: int = 0,
        cache_shared: bool = False,
        num_threads: int = 1,
        backend: Letters | None = None,
        info: ModelInfo = INFO,
        instruction_template: str | None = None,
    ) -> Bench:
        limits = EngineLimits(batch=batch, max_queue_items=max_queue_items, target_dim=target_dim)
        spec = ModelSpec(
            model_id="m", source="test", cache_bytes=cache_bytes, cache_shared=cache_shared,
            instruction_template=instruction_template,
        )  # fmt: skip
        benches.append(Bench(limits, spec, num_threads, backend, info))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


OpenBench = Callable[..., Bench]


def expected(text: str) -> list[int]:
    letters = [ord(letter) for letter in text]
    return [letters[0], letters[-1], sum(letters), len(letters)]


async def test_vectors_come_back_in_input_order_whatever_order_they_ran_in(open_bench: OpenBench) -> None:
    bench = open_bench(batch=BatchLimits(16, 64))
    await bench.engine.warm_up()
    texts = ["seven!!", "a", "quite long text", "mid", "ab"]

    vectors = await bench.embed(*texts)

    assert vectors.tolist() == [expected(text) for text in texts]
    assert len(bench.encoder.batches) > 1


async def test_many_requests_at_once_each_get_their_own_vectors(open_bench: OpenBench) -> None:
    bench = open_bench(batch=BatchLimits(32, 4), max_queue_items=200)
    await bench.engine.warm_up()
    requests = [[f"{request} {text}" for text in range(request % 5 + 1)] for request in range(40)]

    answers = await asyncio.gather(*(bench.embed(*texts) for texts in requests))

    for texts, vectors in zip(requests, answers, strict=True):
        assert vectors.tolist() == [expected(text) for text in texts]


async def test_warm_up_measures_and_the_answer_carries_counts_and_timings(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()

    answer = await bench.engine.run(EmbedCall(model_id="m", texts=("abc", "x" * 100)))

    assert bench.engine.workspace_bytes == 7
    assert answer.token_counts == (3, 64)
    assert answer.truncated == (1,)
    assert min(answer.timings.tokenize_s, answer.timings.queue_s, answer.timings.forward_s) >= 0


async def test_requests_that_want_different_widths_share_a_batch(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    requests = asyncio.gather(bench.embed("abc"), bench.embed("abcd", dimensions=2))
    await bench.until_queued(2)
    await release()

    full, short = await requests

    assert bench.encoder.batches == [[3, 4]]
    assert full.tolist() == [expected("abc")]
    assert short.tolist() == [expected("abcd")[:2]]


async def test_a_width_that_the_model_does_not_give_is_refused_with_those_it_gives(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()

    with pytest.raises(DimensionsNotSupported, match=r"dimensions is 3, but m gives 2, 4"):
        await bench.embed("abc", dimensions=3)


async def test_the_target_width_applies_where_the_model_allows_it(open_bench: OpenBench) -> None:
    allowed, refused = open_bench(target_dim=2), open_bench(target_dim=3)
    await allowed.engine.warm_up()
    await refused.engine.warm_up()

    assert (await allowed.embed("abc")).shape == (1, 2)
    assert (await refused.embed("abc")).shape == (1, 4)
    assert (await allowed.embed("abc", dimensions=4)).shape == (1, 4)


async def test_token_ids_are_taken_verbatim_and_take_no_prompt(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()

    answer = await bench.engine.run(EmbedCall(model_id="m", token_ids=((5, 6),), normalize=False))
    assert answer.array().tolist() == [[5, 6, 11, 2]]
    with pytest.raises(InvalidValue, match="verbatim"):
        await bench.engine.run(EmbedCall(model_id="m", token_ids=((5, 6),), input_type="query"))


async def test_text_that_is_no_text_is_refused(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()

    with pytest.raises(InvalidValue, match="lone surrogate"):
        await bench.embed("\ud800")


async def test_a_failed_batch_fails_its_callers_and_only_them(open_bench: OpenBench) -> None:
    bench = open_bench(batch=BatchLimits(4, 1))
    await bench.engine.warm_up()

    def poison(texts: Sequence[Ids]) -> None:
        if any(ids[0] == ord("!") for ids in texts):
            raise RuntimeError("a kernel failed")

    bench.encoder.before = poison

    bad, good = await asyncio.gather(bench.embed("!", "b"), bench.embed("ok"), return_exceptions=True)

    assert isinstance(bad, EngineFailed)
    assert "a kernel failed" not in str(bad)
    assert not isinstance(good, BaseException)
    assert good.tolist() == [expected("ok")]
    assert (await bench.embed("again")).tolist() == [expected("again")]


async def test_a_batch_that_does_not_fit_runs_in_halves_and_later_batches_are_smaller(
    open_bench: OpenBench,
) -> None:
    bench = open_bench(batch=BatchLimits(64, 64))
    await bench.engine.warm_up()

    def crowded(texts: Sequence[Ids]) -> None:
        if sum(len(ids) for ids in texts) > 16:
            raise torch.OutOfMemoryError("no room")

    bench.encoder.before = crowded
    texts = [f"text{i:04}" for i in range(8)]

    first = await bench.embed(*texts)
    bench.encoder.batches.clear()
    second = await bench.embed(*texts)

    assert first.tolist() == second.tolist() == [expected(text) for text in texts]
    assert max(sum(batch) for batch in bench.encoder.batches) <= 16


async def test_a_batch_that_answers_many_does_not_keep_the_event_loop_from_others(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    requests = [asyncio.create_task(bench.embed(f"{index:02}")) for index in range(21)]
    await bench.until_queued(21)

    held, num_done = release(), [0]
    while num_done[-1] < 21:
        await asyncio.sleep(0)
        num_done.append(sum(request.done() for request in requests))
    await held

    assert bench.encoder.batches == [[2] * 21]
    assert max(after - before for before, after in pairwise(num_done)) == 1


@pytest.mark.parametrize(
    ("texts", "is_reentrant", "begins_wide"),
    [(("one", "other"), True, False), (("alone",), True, True), (("one", "other"), False, True)],
)
async def test_a_batch_of_several_small_requests_begins_on_one_core(
    open_bench: OpenBench, texts: tuple[str, ...], is_reentrant: bool, begins_wide: bool
) -> None:
    """Where batches run at once: the core of an idle thread is about to be used by the requests that follow."""
    bench = open_bench()
    bench.encoder.is_reentrant = is_reentrant
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    requests = [asyncio.create_task(bench.embed(text)) for text in texts]
    await bench.until_queued(len(texts))
    task = bench.engine.next_task(0)
    assert task is not None
    task.run()
    await asyncio.gather(*requests)
    await release()

    assert (task.uses_idle_cores, task.begins_wide) == (True, begins_wide)


async def test_every_batch_is_reported_with_exactly_one_answer(open_bench: OpenBench) -> None:
    bench = open_bench(batch=BatchLimits(64, 4))
    await bench.engine.warm_up()
    calls = [EmbedCall(model_id="m", texts=tuple("x" * size for size in range(1, 8))) for _ in range(6)]

    answers = await asyncio.gather(*(bench.engine.run(call) for call in calls))

    told = sorted((batch.texts, batch.tokens) for answer in answers for batch in answer.batches)
    ran = sorted((len(batch), sum(batch)) for batch in bench.encoder.batches)
    assert told == ran


async def test_a_batch_whose_first_job_fails_is_reported_by_another() -> None:
    texts = [make_text(size) for size in (1, 2, 3)]
    jobs = [text.targets[0].job for text in texts]
    jobs[1].done.cancel()
    batch = Batch(texts=3, tokens=6, computed_tokens=6)

    attribute_batch(batch, texts, {id(jobs[0])})

    assert [job.batches for job in jobs] == [[], [], [batch]]


async def test_padding_counts_as_computed() -> None:
    encoder = ScriptedEncoder()
    texts = [make_text(size) for size in (3, 4, 4, 100)]

    packed = Runner(encoder).measure(texts)
    encoder.attention = "padded"
    padded = Runner(encoder).measure(texts)

    assert packed == Batch(texts=4, tokens=111, computed_tokens=111)
    assert padded == Batch(texts=4, tokens=111, computed_tokens=112)


def make_text(size: int) -> Entry:
    ids = np.ones(size, dtype=np.int64)
    job = PendingRequest(TokenizedRequest((ids,)), DenseOutput(WIDTH, False, False), asyncio.get_running_loop(), 0.0)
    return Entry(ids, job.keys[0], [RowTarget(job, 0)])


async def test_one_text_that_does_not_fit_fails_alone(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()

    def crowded(texts: Sequence[Ids]) -> None:
        if sum(len(ids) for ids in texts) > 16:
            raise torch.OutOfMemoryError("no room")

    bench.encoder.before = crowded

    large, small = await asyncio.gather(bench.embed("x" * 20), bench.embed("small"), return_exceptions=True)

    assert isinstance(large, OutOfMemory)
    assert "20 tokens" in str(large)
    assert not isinstance(small, BaseException)
    assert small.tolist() == [expected("small")]


async def test_a_vector_that_is_not_finite_never_leaves(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    plain = bench.encoder.__class__.__call__

    def overflow(self: ScriptedEncoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        vectors = plain(self, texts, prompt_tokens)
        vectors[[row for row, ids in enumerate(texts) if ids[0] == ord("N")], 0] = float("nan")
        return vectors

    bench.encoder.__class__ = type("Overflowing", (ScriptedEncoder,), {"__call__": overflow})

    bad, good = await asyncio.gather(bench.embed("fine", "NaN"), bench.embed("fine"), return_exceptions=True)

    assert isinstance(bad, NonFiniteEmbedding)
    assert bad.index == 1
    assert not isinstance(good, BaseException)


async def test_a_cancelled_request_costs_no_forward_pass(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    left = asyncio.create_task(bench.embed("nobody waits for this"))
    await bench.until_queued(1)

    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    await release()

    assert bench.engine.queue_items == 0
    assert (await bench.embed("next")).tolist() == [expected("next")]
    assert bench.encoder.batches == [[4]]


async def test_a_full_queue_refuses_the_whole_request(open_bench: OpenBench) -> None:
    bench = open_bench(max_queue_items=3)
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    waiting = asyncio.create_task(bench.embed("a", "b"))
    await bench.until_queued(1)

    with pytest.raises(QueueFull):
        await bench.embed("c", "d")
    await release()

    assert (await waiting).tolist() == [expected("a"), expected("b")]


async def test_closing_fails_waiting_requests_and_releases_the_memory(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    waiting = asyncio.create_task(bench.embed("a"))
    await bench.until_queued(1)

    await asyncio.to_thread(bench.engine.close)
    with pytest.raises(ShuttingDown):
        await waiting
    await release()

    assert bench.released == 1


# ---- the same text for several ----


async def test_requests_for_the_same_text_share_one_computation(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    calls = [EmbedCall(model_id="m", texts=texts, normalize=False) for texts in (("same", "a", "same"), ("same",))]
    waiting = asyncio.gather(*(bench.engine.run(call) for call in calls))
    await bench.until_queued(2)
    await release()

    answers = await waiting

    assert bench.encoder.batches == [[1, 4]]
    assert answers[0].array().tolist() == [expected("same"), expected("a"), expected("same")]
    assert answers[1].array().tolist() == [expected("same")]
    assert [answer.deduplicated for answer in answers] == [1, 1]


async def test_a_sharer_of_a_text_is_served_when_its_owner_is_cancelled(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    owner, heir = (asyncio.create_task(bench.embed("same")) for _ in range(2))
    await bench.until_queued(1)
    await asyncio.sleep(0)
    owner.cancel()
    await release()

    assert (await heir).tolist() == [expected("same")]


async def test_a_sharer_of_a_text_is_served_when_its_owner_fails(open_bench: OpenBench) -> None:
    """The owner's first batch fails, and with it the whole request; another request shares the texts after it."""
    bench = open_bench(batch=BatchLimits(4, 1))
    await bench.engine.warm_up()

    def poison(texts: Sequence[Ids]) -> None:
        if any(ids[0] == ord("!") for ids in texts):
            raise RuntimeError("a kernel failed")

    bench.encoder.before = poison
    release = await bench.hold_scheduler()
    owner, heir = asyncio.create_task(bench.embed("!!!!", "same")), asyncio.create_task(bench.embed("same"))
    await bench.until_queued(2)
    await release()

    with pytest.raises(EngineFailed):
        await owner
    assert (await heir).tolist() == [expected("same")]


async def test_a_cached_vector_is_not_computed_again_in_any_width(open_bench: OpenBench) -> None:
    bench = open_bench(cache_bytes=100_000)
    await bench.engine.warm_up()
    await bench.embed("abc", "de")
    bench.encoder.batches.clear()

    again = await bench.engine.run(EmbedCall(model_id="m", texts=("de", "new", "abc"), normalize=False))
    narrow = await bench.engine.run(EmbedCall(model_id="m", texts=("abc",), normalize=False, dimensions=2))

    assert bench.encoder.batches == [[3]]
    assert again.array().tolist() == [expected("de"), expected("new"), expected("abc")]
    assert narrow.array().tolist() == [expected("abc")[:2]]
    assert (again.cache_hits, narrow.cache_hits, narrow.token_counts) == (2, 1, (3,))


@pytest.mark.parametrize(("is_shared", "recalled"), [(False, (0, 0, 1)), (True, (0, 1, 1))])
async def test_a_cache_tells_a_caller_nothing_of_another_unless_it_is_shared(
    open_bench: OpenBench, is_shared: bool, recalled: tuple[int, ...]
) -> None:
    bench = open_bench(cache_bytes=100_000, cache_shared=is_shared)
    await bench.engine.warm_up()
    calls = [EmbedCall(model_id="m", texts=("abc",), normalize=False, caller=caller) for caller in ("a", "b", "a")]
    answers = [await bench.engine.run(call) for call in calls]

    assert tuple(answer.cache_hits for answer in answers) == recalled
    assert [answer.array().tolist() for answer in answers] == [[expected("abc")]] * 3


async def test_one_caller_cannot_fill_the_queue(open_bench: OpenBench) -> None:
    bench = open_bench(max_queue_items=8)
    await bench.engine.warm_up()
    release = await bench.hold_scheduler()
    waiting = [asyncio.create_task(bench.embed(first, last, caller="one")) for first, last in ("ab", "cd")]
    await bench.until_queued(3)
    with pytest.raises(QueueFull) as caught:
        await bench.embed("e", "f", caller="one")
    waiting.append(asyncio.create_task(bench.embed("g", "h", caller="two")))
    await bench.until_queued(5)
    await release()

    assert [len(await answer) for answer in waiting] == [2, 2, 2]
    assert caught.value.retry_after_s == 1.0


async def test_a_vector_that_is_not_finite_is_not_kept(open_bench: OpenBench) -> None:
    bench = open_bench(cache_bytes=100_000)
    await bench.engine.warm_up()
    plain = bench.encoder.__class__.__call__
    bench.encoder.__class__ = type(
        "Overflowing", (ScriptedEncoder,), {"__call__": lambda self, *args: plain(self, *args) * float("inf")}
    )
    with pytest.raises(NonFiniteEmbedding):
        await bench.embed("abc")
    bench.encoder.__class__ = ScriptedEncoder

    assert (await bench.embed("abc")).tolist() == [expected("abc")]


# ---- several threads, and small requests beside bulk ones ----


async def test_two_threads_share_a_large_request(open_bench: OpenBench) -> None:
    bench = open_bench(num_threads=2)
    await bench.engine.warm_up()
    meeting = threading.Barrier(2)

    def meet(texts: Sequence[Ids]) -> None:
        meeting.wait(10)  # both halves run at once, or this breaks

    bench.encoder.before = meet

    vectors = await bench.embed(*(f"text{number:04}" for number in range(20)))

    assert vectors.tolist() == [expected(f"text{number:04}") for number in range(20)]
    assert [sum(batch) for batch in bench.encoder.batches] == [80, 80]


@pytest.mark.parametrize("num_tokens", [12, 64])
async def test_a_few_texts_wait_for_the_batch_that_runs_and_many_do_not(open_bench: OpenBench, num_tokens: int) -> None:
    bench = open_bench(num_threads=2)
    await bench.engine.warm_up()
    runs, second, may_end = threading.Event(), threading.Event(), threading.Event()

    def hold(texts: Sequence[Ids]) -> None:
        (second if runs.is_set() else runs).set()
        may_end.wait(10)

    bench.encoder.before = hold
    first = asyncio.create_task(bench.embed("text"))
    await asyncio.to_thread(runs.wait, 10)
    others = [asyncio.create_task(bench.embed(f"{number:04}")) for number in range(num_tokens // 4)]

    is_beside = await asyncio.to_thread(second.wait, 10 if num_tokens == 64 else 0.05)

    assert is_beside is (num_tokens == 64)
    may_end.set()
    await asyncio.gather(first, *others)
    assert sum(map(len, bench.encoder.batches[1:])) == len(others)


async def test_an_encoder_with_state_runs_one_batch_at_a_time(open_bench: OpenBench) -> None:
    bench = open_bench(num_threads=2, batch=BatchLimits(32, 4))
    bench.encoder.is_reentrant = False
    await bench.engine.warm_up()
    inside = threading.Lock()

    def alone(texts: Sequence[Ids]) -> None:
        assert inside.acquire(blocking=False), "two batches at once"
        bench.scheduler.preemption_point()
        inside.release()

    bench.encoder.before = alone
    texts = [f"text{number:04}" for number in range(40)]

    assert (await bench.embed(*texts)).tolist() == [expected(text) for text in texts]


async def test_a_small_request_passes_a_bulk_batch_between_its_layers(open_bench: OpenBench) -> None:
    bench = open_bench(batch=BatchLimits(64, 64))
    await bench.engine.warm_up()
    begun, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def layers(texts: Sequence[Ids]) -> None:
        order.append("begins" if len(texts) > 1 else "small")
        if len(texts) > 1:
            begun.set()
            gate.wait(10)
            bench.scheduler.preemption_point()
            order.append("ends")

    bench.encoder.before = layers
    bulk = asyncio.create_task(bench.embed(*(f"text{number:04}" for number in range(8))))
    await asyncio.to_thread(begun.wait)
    small = asyncio.create_task(bench.embed("quick"))
    await bench.until_queued(1)
    gate.set()

    assert (await small).tolist() == [expected("quick")]
    assert (await bulk).tolist() == [expected(f"text{number:04}") for number in range(8)]
    assert order == ["begins", "small", "ends"]


async def test_texts_of_a_path_that_failed_are_run_again(open_bench: OpenBench) -> None:
    bench = open_bench()
    await bench.engine.warm_up()
    failures = [ForwardPathFailed(), ForwardPathFailed()]

    def fail(texts: Sequence[Ids]) -> None:
        if failures:
            raise failures.pop()

    bench.encoder.before = fail

    assert (await bench.embed("again", "and again")).tolist() == [expected("again"), expected("and again")]


# Prompts, which every text carries.


class ThreadRecorder(Letters):
    """Records the threads on which it was called."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[SimpleNamespace]:
        self.threads.append(threading.current_thread())
        return super().encode_batch_fast(input, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize(
    ("num_texts", "prompt", "is_inline"),
    [(10, None, True), (10, "p" * 10, True), (10, "p" * 200, False), (1, "p" * 5000, False), (200, None, False)],
)
async def test_prompts_count_for_what_is_tokenised_on_the_event_loop(
    open_bench: OpenBench, num_texts: int, prompt: str | None, is_inline: bool
) -> None:
    backend = ThreadRecorder()
    bench = open_bench(backend=backend, max_queue_items=1000)
    await bench.engine.warm_up()

    await bench.embed(*(f"text {number}" for number in range(num_texts)), prompt=prompt)

    assert {thread is threading.main_thread() for thread in backend.threads} == {is_inline}


@pytest.mark.parametrize("field", ["prompt", "instruction", "input_type"])
async def test_what_prompts_add_to_a_request_has_a_bound(open_bench: OpenBench, field: str) -> None:
    long = "p" * 600_000
    bench = open_bench(
        info=structs.replace(INFO, prompts={"query": long}), instruction_template="{task}: {text}", max_queue_items=1000
    )
    await bench.engine.warm_up()
    given = {"input_type": "query"} if field == "input_type" else {field: long}
    number = 600_002 if field == "instruction" else 600_000
    first = 600_000

    with pytest.raises(InvalidValue, match=rf"{field} puts ({first}|{number}) characters around each of 100") as caught:
        await bench.embed(*["a"] * 100, **given)
    assert caught.value.param == field
    assert (await bench.embed("a", "a", **given)).shape == (2, WIDTH)


async def test_tokens_are_listed_without_a_forward_pass(open_bench: Callable[..., Bench]) -> None:
    fast = FastTokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bench = open_bench(backend=fast)
    await bench.engine.warm_up()

    tokens = await bench.engine.run(TokenizeCall(model_id="m", texts=("a", "b")))

    assert isinstance(tokens, Tokens)
    assert tokens.array().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert tokens.timings.tokenize_s > 0
    assert (bench.encoder.batches, bench.engine.queue_items) == ([], 0)
