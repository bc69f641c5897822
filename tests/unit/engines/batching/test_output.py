"""Tests that a new kind of output passes engine, queue, cache, host, backend and messages without changes to them.

Multi-vector rows: for each text as many vectors `[id, place]` as it has tokens, so that rows differ in length.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Self, Unpack

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.batching.output import FinishedRows, OutputDefaults, OutputSpec, Row, Rows, output_spec, register_output
from engines.device.scheduler import DeviceScheduler
from engines.errors import EngineError, NonFiniteEmbedding
from engines.host import Host, HostConfig
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.models.base import Encoder
from engines.rpc.errors import ErrorRecord
from engines.rpc.messages import MessageCodec, Run, RunResult
from engines.rpc.service import HostService
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, fake_runtime
from engines.types import (
    BaseCall,
    BaseResult,
    Budget,
    EmbedCall,
    Embeddings,
    ModelFiles,
    ModelInfo,
    ResultDetails,
    TextCall,
)
from router.backends.local import LocalBackend
from tests.testkit.encoders import WIDTH, Letters, ScriptedEncoder

INFO = ModelInfo(dimensions=WIDTH, max_tokens=64, dtype="float32", attention="packed")
SPEC = ModelSpec(model_id="m", source="test", cache_bytes=10_000, normalize=False)


class TokenCall(TextCall, frozen=True, kw_only=True, tag="tokens"):
    """A call for a vector of each token, times `scale`."""

    scale: float = 1.0


class TokenVectors(BaseResult, frozen=True, kw_only=True, tag="token_vectors"):
    """Float32 vectors `[tokens, 2]` of all inputs, one input after the other."""

    vectors: bytes

    def split_body(self) -> tuple[Self, bytes]:
        return structs.replace(self, vectors=b""), self.vectors

    def with_body(self, body: bytes) -> Self:
        return structs.replace(self, vectors=body)

    def rows(self) -> list[NDArray[np.float32]]:
        packed = np.frombuffer(self.vectors, dtype="<f4").reshape(-1, 2)
        return np.split(packed, [*accumulate(self.token_counts)][:-1])


class MultiVectorEncoder(ScriptedEncoder):
    """A scripted encoder with a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.token_batches: list[list[int]] = []

    def token_vectors(self, texts: Sequence[Ids]) -> Tensor:
        self.token_batches.append([len(ids) for ids in texts])
        vectors = torch.tensor(np.concatenate([np.stack([ids, np.arange(len(ids))], axis=1) for ids in texts])).float()
        return torch.where(vectors == ord("!"), torch.inf, vectors)


class TokenOutput(OutputSpec, frozen=True):
    """Raw outputs are one array `[tokens of the text, 2]` for each text."""

    scale: float

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> list[Tensor]:
        assert isinstance(encoder, MultiVectorEncoder)
        packed = encoder.token_vectors(texts)
        ends = accumulate((len(ids) for ids in texts), initial=0)
        return [packed[start:end] for start, end in pairwise(ends)]

    @classmethod
    def cache_rows(cls, raw: list[Tensor]) -> FinishedRows:
        rows = [vectors.numpy() for vectors in raw]
        return FinishedRows(rows, np.array([np.isfinite(row).all() for row in rows]))

    def finish(self, raw: list[Tensor], indexes: Sequence[int] | None) -> FinishedRows:
        rows, is_finite = self.cache_rows(raw if indexes is None else [raw[index] for index in indexes])
        return FinishedRows(self.finish_cached(rows), is_finite)

    def finish_cached(self, rows: Rows) -> list[Row]:
        return [row * self.scale for row in rows]

    def allocate(self, num_items: int) -> list[Row | None]:
        return [None] * num_items

    def pack(self, allocated: list[Row], **details: Unpack[ResultDetails]) -> TokenVectors:  # type: ignore[override]  # no member of Result
        return TokenVectors(vectors=np.concatenate(allocated).astype("<f4").tobytes(), **details)

    def not_finite(self, index: int) -> EngineError:
        return NonFiniteEmbedding(f"input[{index}] is not finite", index=index)


@register_output(TokenCall)
def _token_output(call: TokenCall, info: ModelInfo, defaults: OutputDefaults) -> TokenOutput:
    return TokenOutput(call.scale)


def tokens(*texts: str, scale: float = 1.0) -> Any:
    """A call about tokens; `Call` does not know it, so it has no type for mypy."""
    return TokenCall(model_id="m", texts=texts, scale=scale)


def dense(*texts: str) -> EmbedCall:
    return EmbedCall(model_id="m", texts=texts)


def expected(text: str, scale: float = 1.0) -> list[list[float]]:
    return [[ord(letter) * scale, place * scale] for place, letter in enumerate(text)]


def expected_vector(text: str) -> list[int]:
    letters = [ord(letter) for letter in text]
    return [letters[0], letters[-1], sum(letters), len(letters)]


def lists(result: Any) -> list[list[list[float]]]:
    assert isinstance(result, TokenVectors)
    return [row.tolist() for row in result.rows()]


class Bench:
    """Makes engines on one scheduler (`engines.protocols.Loader`)."""

    def __init__(self) -> None:
        self.encoder = MultiVectorEncoder()
        self.scheduler = DeviceScheduler("test", check_interval_s=0.0)
        self.threads = TokenizerThreads(1)

    def load(self, spec: ModelSpec, files: ModelFiles) -> EmbeddingEngine:
        tokenizer = Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))
        parts = Parts(self.encoder, tokenizer, spec, INFO)
        limits = EngineLimits(batch=BatchLimits(256, 64))
        return EmbeddingEngine(
            parts, self.scheduler, self.threads, limits, lambda: (INFO, 100, 7), lambda: None, weight_bytes=100
        )

    async def engine(self) -> EmbeddingEngine:
        engine = self.load(SPEC, ModelFiles(path="", revision="r", size_bytes=0))
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


async def test_rows_of_different_length_come_back_in_input_order(bench: Bench) -> None:
    engine = await bench.engine()

    result = await engine.run(tokens("abc", "z", "abcdefg"))

    assert lists(result) == [expected("abc"), expected("z"), expected("abcdefg")]
    assert result.token_counts == (3, 1, 7)
    assert [(batch.texts, batch.tokens) for batch in result.batches] == [(3, 11)]


async def test_two_kinds_of_output_share_a_queue_and_no_rows(bench: Bench) -> None:
    engine = await bench.engine()
    gate = threading.Event()
    held = asyncio.create_task(bench.scheduler.call(gate.wait))
    running = asyncio.gather(engine.run(tokens("abc", "de")), engine.run(dense("abc", "f")), engine.run(tokens("de")))
    while engine.queue_items < 4:  # noqa: ASYNC110  # the queue has no event to wait for
        await asyncio.sleep(0)
    gate.set()
    two, vectors, one = await running
    await held

    assert (lists(two), lists(one)) == ([expected("abc"), expected("de")], [expected("de")])
    assert vectors.array().tolist() == [expected_vector("abc"), expected_vector("f")]
    assert (two.deduplicated + one.deduplicated, vectors.deduplicated) == (1, 0)
    assert (bench.encoder.token_batches, bench.encoder.batches) == ([[2, 3]], [[1, 3]])


async def test_cached_rows_serve_every_spec_of_their_kind_and_no_other_kind(bench: Bench) -> None:
    engine = await bench.engine()
    await engine.run(tokens("abc", "de"))

    again = await engine.run(tokens("de", "new", "abc", scale=2.0))
    vectors = await engine.run(dense("abc"))

    assert lists(again) == [expected("de", 2.0), expected("new", 2.0), expected("abc", 2.0)]
    assert (again.cache_hits, vectors.cache_hits) == (2, 0)
    assert bench.encoder.token_batches == [[2, 3], [3]]


async def test_a_row_that_is_not_finite_fails_its_own_request_and_is_not_cached(bench: Bench) -> None:
    engine = await bench.engine()

    for _ in range(2):
        with pytest.raises(NonFiniteEmbedding, match=r"input\[1\]"):
            await engine.run(tokens("abc", "d!"))

    assert bench.encoder.token_batches == [[2, 3], [2]]


async def test_it_crosses_host_backend_and_messages(bench: Bench) -> None:
    codec = MessageCodec(Run[TokenCall | EmbedCall], RunResult[TokenVectors | Embeddings] | ErrorRecord)
    config = HostConfig(host_id="h", budget=Budget(size_bytes=1000), workspace_bytes=10)
    host = Host(config, {"m": SPEC}, FakeFiles(), bench, fake_runtime())
    backend = LocalBackend([host], {"m": SPEC})
    await backend.start()

    async def over_messages(call: Any) -> tuple[BaseResult, bytes]:
        request = codec.decode_request(codec.encode_request(Run(call=call)))
        head, body = codec.encode_reply(await HostService(host).answer(request))
        reply = codec.decode_reply(head, body)
        assert isinstance(reply, RunResult)
        return reply.result, body

    try:
        result, body = await over_messages(tokens("abc", "z"))
        vectors, _ = await over_messages(dense("abc"))
        near = await backend.run(tokens("abc"))
    finally:
        await backend.aclose()

    assert lists(result) == [expected("abc"), expected("z")]
    assert np.frombuffer(body, dtype="<f4").tolist() == np.array([*expected("abc"), *expected("z")]).ravel().tolist()
    assert isinstance(vectors, Embeddings)
    assert vectors.array().tolist() == [expected_vector("abc")]
    assert lists(near) == [expected("abc")]


def test_a_call_of_an_unknown_kind_is_refused_where_outputs_are_chosen() -> None:
    with pytest.raises(NotImplementedError, match="BaseCall"):
        output_spec(BaseCall(model_id="m"), INFO, OutputDefaults())
