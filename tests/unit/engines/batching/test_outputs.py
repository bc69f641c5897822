"""Tests of calls for several outputs: what they may ask for, their rows, and their bounds."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engines.batching import outputs
from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.batching.output import OutputDefaults, output_spec
from engines.batching.outputs import OutputFacts, heaviest, kind_of_outputs
from engines.device.scheduler import DeviceScheduler
from engines.errors import DimensionsNotSupported, InvalidValue, NonFiniteEmbedding, TaskNotSupported
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.models.outputs import MAX_TERMS, RawOutputs, SparseRows, TokenRows, Wanted
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelInfo, Outputs, OutputsCall, ScoreCall
from tests.testkit.encoders import WIDTH, Letters, ScriptedEncoder

VOCABULARY = 1000
INFO = ModelInfo(
    dimensions=WIDTH,
    max_tokens=64,
    dtype="float32",
    attention="packed",
    outputs=("dense", "sparse", "multi_vector"),
    vocab_size=VOCABULARY,
    vector_width=2,
)
FACTS = OutputFacts(dimensions=WIDTH, vocab_size=VOCABULARY, vector_width=2, states_width=3)
SPEC = ModelSpec(model_id="m", source="test", cache_bytes=10_000, normalize=False)


class OutputsScript(ScriptedEncoder):
    """Gives an entry for each distinct letter that weighs its count, and vectors `[id, place]` of all tokens.

    Attributes:
        passes: what was wanted of each pass, and the lengths of its texts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[Wanted, list[int]]] = []

    def run_outputs(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None, wanted: Wanted) -> RawOutputs:
        self.passes.append((wanted, [len(ids) for ids in texts]))
        counted = [np.unique(ids, return_counts=True) for ids in texts]
        sign = 2 if wanted.side == "query" else 1
        sparse = SparseRows(
            torch.tensor([len(entries) for entries, _ in counted]),
            torch.tensor(np.concatenate([entries for entries, _ in counted]), dtype=torch.int32),
            torch.tensor(np.concatenate([counts for _, counts in counted])).float() * sign,
        )
        vectors = torch.tensor(np.concatenate([np.stack([ids, np.arange(len(ids))], 1) for ids in texts])).float()
        vectors[:, 0] = torch.where(vectors[:, 0] == ord("!"), torch.inf, vectors[:, 0])
        if wanted.states:
            vectors = torch.cat([vectors, vectors[:, :1]], 1)
        return RawOutputs(
            self(texts) if wanted.dense else None,
            sparse if wanted.sparse else None,
            TokenRows([len(ids) for ids in texts], vectors) if wanted.multi_vector or wanted.states else None,
        )


class Bench:
    """Makes an engine of the scripted encoder."""

    def __init__(self) -> None:
        self.encoder = OutputsScript()
        self.scheduler = DeviceScheduler("test", check_interval_s=0.0)
        self.threads = TokenizerThreads(1)

    async def engine(self, facts: OutputFacts = FACTS) -> EmbeddingEngine:
        tokenizer = Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))
        engine = EmbeddingEngine(
            Parts(self.encoder, tokenizer, SPEC, INFO, facts=facts), self.scheduler, self.threads,
            EngineLimits(batch=BatchLimits(256, 64)), lambda: (INFO, 100, 7), lambda: None, weight_bytes=100,
        )  # fmt: skip
        await engine.warm_up()
        return engine

    def close(self) -> None:
        self.scheduler.close()
        self.threads.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def call(*names: Any, texts: Sequence[str] = ("abba", "z", "aab"), **options: Any) -> OutputsCall:
    return OutputsCall(model_id="m", texts=tuple(texts), outputs=names, **options)


async def run(engine: EmbeddingEngine, asked: OutputsCall) -> Outputs:
    found = await engine.run(asked)
    assert isinstance(found, Outputs)
    return found


def terms_of(found: Outputs) -> list[dict[str, float]]:
    """Returns the weights of letters, for each input."""
    entries, weights = found.terms()
    ends = np.cumsum(found.num_terms)
    spans = [slice(end - count, end) for end, count in zip(ends, found.num_terms, strict=True)]
    return [dict(zip(map(chr, entries[span]), weights[span].tolist(), strict=True)) for span in spans]


def vectors_of(found: Outputs) -> list[list[list[float]]]:
    return [part.tolist() for part in np.split(found.vectors(), np.cumsum(found.num_vectors)[:-1])]


async def test_all_outputs_of_one_call_come_from_one_pass_in_input_order(bench: Bench) -> None:
    found = await run(await bench.engine(), call("dense", "sparse", "multi_vector"))

    assert found.array().tolist() == [[97, 97, 390, 4], [122, 122, 122, 1], [97, 98, 292, 3]]
    assert terms_of(found) == [{"a": 2, "b": 2}, {"z": 1}, {"a": 2, "b": 1}]
    assert vectors_of(found) == [[[97, 0], [98, 1], [98, 2], [97, 3]], [[122, 0]], [[97, 0], [97, 1], [98, 2]]]
    assert (found.dimensions, found.vector_width, found.token_counts) == (WIDTH, 2, (4, 1, 3))
    assert bench.encoder.passes == [(Wanted(True, True, True), [1, 3, 4])]
    assert [(batch.texts, batch.tokens) for batch in found.batches] == [(3, 8)]


async def test_what_was_not_asked_for_is_neither_computed_nor_returned(bench: Bench) -> None:
    engine = await bench.engine()

    sparse, states = await run(engine, call("sparse")), await run(engine, call("tokens"))

    assert terms_of(sparse) == [{"a": 2, "b": 2}, {"z": 1}, {"a": 2, "b": 1}]
    assert (sparse.dimensions, sparse.num_vectors, len(sparse.body)) == (0, (), 8 * 5)
    assert (states.num_terms, states.num_vectors, states.vector_width) == ((), (4, 1, 3), 3)
    assert vectors_of(states)[1] == [[122, 0, 122]]
    assert [wanted for wanted, _ in bench.encoder.passes] == [Wanted(sparse=True), Wanted(states=True)]


async def test_a_dense_output_is_what_an_embedding_call_gives(bench: Bench) -> None:
    engine = await bench.engine()
    texts = ("abba", "z")

    found = await run(engine, call("dense", texts=texts, normalize=True))
    wanted = await engine.run(EmbedCall(model_id="m", texts=texts, normalize=True))

    assert found.array().tobytes() == wanted.array().tobytes()
    assert bench.encoder.passes == []


async def test_equal_texts_of_two_sides_share_nothing_and_of_one_side_a_row(bench: Bench) -> None:
    engine = await bench.engine()
    gate = threading.Event()
    held = asyncio.create_task(bench.scheduler.call(gate.wait))
    sides = [None, "query", "document", "search_query"]
    running = asyncio.gather(*(run(engine, call("sparse", texts=["aab"], input_type=side)) for side in sides))
    while engine.queue_items < 2:  # noqa: ASYNC110  # the queue has no event to wait for
        await asyncio.sleep(0)
    gate.set()
    unnamed, query, document, other_query = await running
    await held

    assert terms_of(unnamed) == terms_of(document) == [{"a": 2, "b": 1}]
    assert terms_of(query) == terms_of(other_query) == [{"a": 4, "b": 2}]
    assert sorted(wanted.side for wanted, _ in bench.encoder.passes) == ["document", "query"]


async def test_a_model_may_take_texts_that_name_no_side_for_queries(bench: Bench) -> None:
    engine = await bench.engine(OutputFacts(default_side="query"))

    found = await run(engine, call("sparse", texts=["a"]))
    document = await run(engine, call("sparse", texts=["a"], input_type="passage"))

    assert (terms_of(found), terms_of(document)) == ([{"a": 2}], [{"a": 1}])


async def test_queries_may_be_read_by_a_tokenizer_of_their_own(bench: Bench) -> None:
    short = Tokenizer(Letters(), TokenizerLimits(max_tokens=2, vocab_size=0x110000))
    engine = await bench.engine(OutputFacts(query_tokenizer=short))

    query = await run(engine, call("sparse", texts=["abc"], input_type="query"))
    document = await run(engine, call("sparse", texts=["abc"], input_type="document"))

    assert (query.token_counts, query.truncated, document.token_counts) == ((2,), (0,), (3,))


async def test_the_heaviest_entries_are_kept_and_light_ones_left_out(bench: Bench) -> None:
    engine = await bench.engine()

    top = await run(engine, call("sparse", texts=["cbbaa"], sparse_top_k=1))
    heavy = await run(engine, call("sparse", texts=["cbbaa"], sparse_min_weight=1.5))

    assert (terms_of(top), terms_of(heavy)) == ([{"a": 2}], [{"a": 2, "b": 2}])


def test_weights_below_zero_are_kept_unless_a_least_weight_is_asked_for() -> None:
    entries, weights = np.array([1, 5, 7], np.int32), np.array([-1.0, np.nan, 2.0], np.float32)

    assert heaviest(entries, weights, 3, 0.0)[0].tolist() == [1, 5, 7]
    assert heaviest(entries, weights, 3, 0.5)[0].tolist() == [5, 7]


async def test_entries_are_named_where_the_call_asks_for_it(bench: Bench) -> None:
    engine = await bench.engine()
    plain, named = [await run(engine, call("sparse", "dense", names_terms=wanted)) for wanted in (False, True)]

    assert plain.term_names == {}
    assert named.term_names == {ord(letter): letter for letter in "abz"}
    assert named.body == plain.body


async def test_such_rows_are_not_cached(bench: Bench) -> None:
    engine = await bench.engine()

    found = [await run(engine, call("sparse", texts=["ab"])) for _ in range(2)]

    assert [result.cache_hits for result in found] == [0, 0]
    assert len(bench.encoder.passes) == 2
    assert engine._cache is not None
    assert engine._cache.size_bytes == 0


async def test_a_row_that_is_not_finite_fails_its_own_request(bench: Bench) -> None:
    engine = await bench.engine()

    with pytest.raises(NonFiniteEmbedding, match=r"input\[1\]"):
        await run(engine, call("multi_vector", texts=["ab", "c!"]))
    assert vectors_of(await run(engine, call("multi_vector", texts=["ab"]))) == [[[97, 0], [98, 1]]]


async def test_a_large_answer_is_joined_on_a_thread_and_a_small_one_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await bench.engine()
    threads: list[str] = []
    pack = outputs.MixedOutput.pack

    def recorded(self: outputs.MixedOutput, rows: list[Any], **details: Any) -> Outputs:
        threads.append(threading.current_thread().name)
        return pack(self, rows, **details)

    monkeypatch.setattr(outputs.MixedOutput, "pack", recorded)

    await run(engine, call("sparse"))
    large = await run(engine, call("multi_vector", texts=["x" * 60 + chr(97 + index % 26) for index in range(200)]))

    assert threads[0] == threading.current_thread().name
    assert threads[1] != threads[0]
    assert len(large.vectors()) == 200 * 61


async def test_an_answer_that_may_be_too_large_is_refused_before_anything_is_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await bench.engine()
    monkeypatch.setattr(outputs, "MAX_ANSWER_BYTES", 2000)

    with pytest.raises(InvalidValue, match=r"2 inputs with 7 tokens may take 15\.\d KiB, and the limit is 2\.0 KiB"):
        await run(engine, call("dense", "sparse", "multi_vector", texts=["abcd", "efg"]))
    assert bench.encoder.passes == []
    await run(engine, call("dense", "sparse", "multi_vector", texts=["abcd", "efg"], sparse_top_k=100))


def test_the_entries_of_a_sparse_output_have_a_ceiling() -> None:
    info = ModelInfo(
        dimensions=0, max_tokens=8, dtype="float32", attention="packed", outputs=("sparse",), vocab_size=250_000
    )

    def max_terms(**options: Any) -> int:
        found = output_spec(call("sparse", **options), info, OutputDefaults())
        assert isinstance(found, outputs.MixedOutput)
        return found.max_terms

    assert (max_terms(), max_terms(sparse_top_k=5), max_terms(sparse_top_k=10**6)) == (MAX_TERMS, 5, MAX_TERMS)


@pytest.mark.parametrize(
    "names", [(), ("dense", "dense"), ("multi_vector", "tokens"), ("sparse", "tokens", "multi_vector")]
)
def test_outputs_that_exclude_each_other_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidValue, match="outputs is"):
        output_spec(call(*names), INFO, OutputDefaults(states_width=3))


def test_an_output_that_the_model_does_not_give_is_refused_by_name() -> None:
    plain = ModelInfo(dimensions=4, max_tokens=8, dtype="float32", attention="packed")
    sparse = ModelInfo(dimensions=0, max_tokens=8, dtype="float32", attention="packed", outputs=("sparse",))
    scores = ModelInfo(dimensions=0, max_tokens=8, dtype="float32", attention="packed", task="rerank", outputs=())

    with pytest.raises(TaskNotSupported, match="m gives dense; it has no sparse output"):
        output_spec(call("dense", "sparse"), plain, OutputDefaults())
    with pytest.raises(TaskNotSupported, match="m gives dense; it has no tokens output"):
        output_spec(call("tokens"), plain, OutputDefaults())
    with pytest.raises(TaskNotSupported, match="m gives sparse outputs, no dense vectors"):
        output_spec(EmbedCall(model_id="m", texts=("a",)), sparse, OutputDefaults())
    with pytest.raises(TaskNotSupported, match="m can embed, not score"):
        output_spec(ScoreCall(model_id="m", texts=("a",)), sparse, OutputDefaults())
    with pytest.raises(TaskNotSupported, match="m can rerank, not embed"):
        output_spec(call("dense"), scores, OutputDefaults())
    with pytest.raises(DimensionsNotSupported, match="dimensions is 3"):
        output_spec(call("dense", dimensions=3), plain, OutputDefaults())


def test_a_kind_of_outputs_is_made_once() -> None:
    kinds = {kind_of_outputs(Wanted(sparse=True, side=side)) for side in ("query", "document", "query")}

    assert len(kinds) == 2
