"""Tests the properties of the fakes that other tests rely on."""

import asyncio

import numpy as np
import pytest

from engines.errors import (
    ContextLengthExceeded,
    DimensionsNotSupported,
    HubUnreachable,
    InvalidTokenId,
    PromptNotFound,
    TaskNotSupported,
)
from engines.spec import Matryoshka, ModelSpec, Output
from engines.testing.fakes import FakeEngine, FakeFiles, FakeLoader, FakeTime, fake_host, fake_specs, fake_vector
from engines.testing.runtime import let_run
from engines.types import EmbedCall, Embeddings, Outputs, OutputsCall, ScoreCall

SPEC = ModelSpec(
    model_id="a", source="x", prompts={"query": "q: "}, max_tokens=4, matryoshka=Matryoshka(widths=(8,))
)  # fmt: skip


def call(*texts: str, **more: object) -> EmbedCall:
    return EmbedCall(model_id="a", texts=texts, **more)  # type: ignore[arg-type]  # fields by name


async def test_vectors_depend_on_model_and_text_and_are_of_length_one() -> None:
    answer = await FakeEngine(SPEC).run(call("one", "two"))

    rows = answer.array()
    assert (rows == np.stack([fake_vector("a", "one"), fake_vector("a", "two")])).all()
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1])
    assert not np.allclose(fake_vector("a", "one"), fake_vector("b", "one"))
    assert fake_vector("a", "one").tobytes() == fake_vector("a", "one").tobytes()


async def test_prompts_widths_and_tokens_are_as_in_a_real_engine() -> None:
    engine = FakeEngine(SPEC)

    query = await engine.run(call("text", input_type="query", dimensions=8))
    long = await engine.run(call("one", "one two three"))

    assert (query.array()[0] == fake_vector("a", "q: text", 8)).all()
    assert (long.token_counts, long.truncated) == ((3, 4), (1,))
    with pytest.raises(PromptNotFound):
        await engine.run(call("x", input_type="code"))
    with pytest.raises(DimensionsNotSupported):
        await engine.run(call("x", dimensions=7))
    with pytest.raises(ContextLengthExceeded):
        await engine.run(call("one two three", truncate="error"))
    with pytest.raises(InvalidTokenId):
        await engine.run(EmbedCall(model_id="a", token_ids=((1, 10**6),)))
    assert engine.violations == []


async def test_no_time_passes_but_by_the_clock() -> None:
    time = FakeTime()
    task = asyncio.create_task(FakeEngine(SPEC, embed_s=5, sleep=time.sleep).run(call("x")))
    await time.advance(4.9)
    assert not task.done()

    await time.advance(0.1)

    assert task.done()


async def test_cancellation_is_seen() -> None:
    time = FakeTime()
    engine = FakeEngine(SPEC, embed_s=5, sleep=time.sleep)
    task = asyncio.create_task(engine.run(call("x")))
    await let_run()
    assert engine.queue_items == 1

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert (engine.cancelled, engine.running) == (1, 0)


async def test_misuse_is_written_down() -> None:
    time = FakeTime()
    engine = FakeEngine(SPEC, embed_s=5, sleep=time.sleep)
    task = asyncio.create_task(engine.run(call("x")))
    await let_run()

    engine.close()
    await time.advance(5)
    await asyncio.gather(task, return_exceptions=True)
    late = asyncio.create_task(engine.run(call("x")))
    await time.advance(5)

    assert late.done()
    assert engine.violations == ["a was freed under 1 requests", "a was used after it was freed"]


async def test_failures_come_by_attempt() -> None:
    files = FakeFiles(on_disk=(), failures={"a": [HubUnreachable("one"), None, HubUnreachable("three")]})
    outcomes: list[int | str] = []
    for _ in range(4):
        try:
            outcomes.append(files.fetch(SPEC, lambda done, total: None).size_bytes)
        except HubUnreachable as error:
            outcomes.append(str(error))

    assert outcomes == ["one", 1000, "three", 1000]


async def test_one_line_makes_a_host_that_answers() -> None:
    host = fake_host("a", SPEC)
    await host.start()

    answer = await host.run(call("x"))
    assert isinstance(answer, Embeddings)
    assert answer.dimensions == 16
    assert list(fake_specs("a", "b")) == ["a", "b"]
    await host.aclose()


async def test_timers_ring_in_order_and_cancelled_ones_do_not() -> None:
    time = FakeTime(0)
    rung: list[float] = []
    for at_s in (3.0, 1.0, 2.0):
        timer = time.call_at(at_s, lambda: rung.append(time.now_s()))
    timer.cancel()

    await time.advance(5)

    assert rung == [1.0, 3.0]
    assert time.now_s() == 5


def test_a_loader_counts_what_it_holds() -> None:
    loader, files = FakeLoader(weight_bytes={"a": 70}), FakeFiles()
    location = files.locate(SPEC)
    assert location is not None
    first, second = loader.load(SPEC, location), loader.load(SPEC, location)

    first.close()

    assert (loader.resident_bytes, loader.loads["a"], second.is_closed) == (70, 2, False)


async def test_scores_depend_on_the_pair_alone_and_a_model_refuses_what_it_does_not_compute() -> None:
    reranker = FakeEngine(ModelSpec(model_id="r", source="x", task="rerank"))

    together = await reranker.run(ScoreCall(model_id="r", queries=("q",), texts=("one", "two")))
    alone = await reranker.run(ScoreCall(model_id="r", queries=("q",), texts=("two",)))

    assert together.array()[1:].tolist() == alone.array().tolist()
    assert 0 < together.array().min() < together.array().max() < 1
    with pytest.raises(TaskNotSupported, match="a can rerank, not embed"):
        await reranker.run(call("one"))
    with pytest.raises(TaskNotSupported, match="a can embed, not score"):
        await FakeEngine(SPEC).run(ScoreCall(model_id="a", texts=("one",)))


async def test_several_outputs_of_one_call_are_those_of_a_call_for_each() -> None:
    engine = FakeEngine(SPEC, outputs=("dense", "sparse", "multi_vector"))
    texts = ("the cat and the dog", "a bird")

    async def run(*outputs: Output) -> Outputs:
        result = await engine.run(OutputsCall(model_id="a", texts=texts, outputs=outputs, sparse_top_k=2))
        assert isinstance(result, Outputs)
        return result

    together = await run("dense", "sparse", "multi_vector")

    dense, sparse, vectors = await run("dense"), await run("sparse"), await run("multi_vector")
    assert together.array().tolist() == dense.array().tolist() == (await engine.run(call(*texts))).array().tolist()
    assert [part.tolist() for part in together.terms()] == [part.tolist() for part in sparse.terms()]
    assert together.num_terms == sparse.num_terms == (2, 2)
    assert together.vectors().tolist() == vectors.vectors().tolist()
    assert together.num_vectors == vectors.num_vectors == (7, 4)
    assert together.body == together.split_body()[0].with_body(together.split_body()[1]).body
    with pytest.raises(TaskNotSupported, match="a has no sparse output"):
        await FakeEngine(SPEC).run(OutputsCall(model_id="a", texts=texts, outputs=("sparse",)))
