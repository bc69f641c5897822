"""Embedding by a server: requests by length, waits as it says, refusals of single texts, and the vectors' bytes."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest

from engines.testing.engine import fake_vector
from engines.testing.outputs import fake_row
from router.bulk.records import BulkError, BulkStopped, EmbedOptions
from router.bulk.remote import RemoteEmbedder, group_by_length

DENSE = EmbedOptions()


def error(status: int, code: str, *, param: str | None = None, **headers: str) -> httpx2.Response:
    content = {"error": {"message": f"{code}!", "type": "x", "param": param, "code": code}}
    return httpx2.Response(
        status, json=content, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def answer(body: dict[str, Any], **headers: str) -> httpx2.Response:
    items = []
    for index, text in reversed(list(enumerate(body["input"]))):
        item: dict[str, Any] = {"object": "embedding", "index": index}
        row = fake_row(text)
        if "dense" in body.get("outputs", ["dense"]):
            item["embedding"] = base64.b64encode(fake_vector("m", text).tobytes()).decode()
        if "sparse" in body.get("outputs", ()):
            item["sparse_embedding"] = {"indices": row.entries.tolist(), "values": row.weights.tolist()}
        if "multi_vector" in body.get("outputs", ()):
            data = base64.b64encode(row.vectors.tobytes()).decode()
            item["multi_vector_embedding"] = {"shape": row.vectors.shape, "data": data}
        items.append(item)
    content = {"data": items, "model": "m", "usage": {"prompt_tokens": 3 * len(items)}}
    return httpx2.Response(200, json=content, headers={name.replace("_", "-"): text for name, text in headers.items()})


class Server:
    """Answers after some refusals, and keeps the bodies of requests and the client's waits."""

    def __init__(self, *first: httpx2.Response, judge: Callable[[dict[str, Any]], Any] = lambda body: None) -> None:
        self._first, self._judge = list(first), judge
        self.bodies: list[dict[str, Any]] = []
        self.expected_spaces: list[str | None] = []
        self.waits: list[float] = []

    def embedder(self, options: EmbedOptions = DENSE, **fields: Any) -> RemoteEmbedder:
        transport = httpx2.MockTransport(self._handle)
        return RemoteEmbedder("http://x/v1", "m", options, sleep=self._sleep, transport=transport, **fields)

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        assert str(request.url) == "http://x/v1/embeddings"
        body = json.loads(request.content)
        self.bodies.append(body)
        self.expected_spaces.append(request.headers.get("x-expect-space"))
        refusal = self._first.pop(0) if self._first else self._judge(body)
        return answer(body) if refusal is None else refusal


async def test_vectors_come_back_in_order_and_bit_by_bit() -> None:
    server, texts = Server(), [f"text {n} " * (n % 7 + 1) for n in range(600)]
    found = await server.embedder().embed(texts)

    assert len(server.bodies) == 3  # 256 texts at the most
    assert isinstance(found.vectors.dense, np.ndarray)
    assert np.array_equal(found.vectors.dense, np.stack([fake_vector("m", text) for text in texts]))
    assert found.num_tokens == 1800


async def test_all_outputs_of_a_text_are_read() -> None:
    options, texts = EmbedOptions(outputs=("dense", "sparse", "multi_vector")), ["a b", "a longer text"]
    vectors = (await Server().embedder(options).embed(texts)).vectors

    assert vectors.sparse is not None and vectors.tokens is not None
    for text, (entries, weights), tokens in zip(texts, vectors.sparse, vectors.tokens, strict=True):
        row = fake_row(text)
        assert np.array_equal(entries, row.entries) and np.array_equal(weights, row.weights)
        assert np.array_equal(tokens, row.vectors)


async def test_a_refusal_is_obeyed_and_the_request_sent_again() -> None:
    server = Server(error(429, "queue_full", retry_after="2"), error(503, "model_loading", retry_after_ms="250"))
    await server.embedder().embed(["a"])

    assert server.waits == [2.0, 0.25]
    assert len(server.bodies) == 3


async def test_a_server_that_never_answers_stops_the_job() -> None:
    server = Server(judge=lambda body: error(503, "shutting_down"))
    with pytest.raises(BulkStopped, match="shutting_down!; tried 10 times"):
        await server.embedder().embed(["a"])

    assert server.waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(server.waits) <= 60.0


async def test_texts_that_the_server_refuses_are_found_and_the_others_kept() -> None:
    def judge(body: dict[str, Any]) -> Any:
        return error(400, "context_length_exceeded") if any("long" in text for text in body["input"]) else None

    texts = [f"{'long' if n in (3, 8) else 'good'} {n}" for n in range(12)]
    found = await Server(judge=judge).embedder(EmbedOptions(truncate="error")).embed(texts)

    assert {index: refusal.code for index, refusal in found.refusals.items()} == dict.fromkeys(
        (3, 8), "context_length_exceeded"
    )
    good = [text for n, text in enumerate(texts) if n not in (3, 8)]
    assert found.vectors.dense is not None
    assert np.array_equal(found.vectors.dense, np.stack([fake_vector("m", text) for text in good]))


async def test_a_text_that_the_models_tokenizer_cannot_read_is_found_too() -> None:
    def judge(body: dict[str, Any]) -> Any:
        if not any("odd" in text for text in body["input"]):
            return None
        return error(400, "invalid_value", param="input")

    found = await Server(judge=judge).embedder().embed(["a", "odd", "b"])

    assert {index: refusal.code for index, refusal in found.refusals.items()} == {1: "invalid_value"}
    assert found.vectors.dense is not None
    assert np.array_equal(found.vectors.dense, np.stack([fake_vector("m", "a"), fake_vector("m", "b")]))


async def test_vectors_of_another_model_than_at_the_beginning_are_refused() -> None:
    body = {"input": ["text"]}
    server = Server(
        answer(body, server_timing="load;dur=0"),  # it hashes the weights still
        answer(body, server_timing="load;dur=0", x_embedding_space="s1-a"),
        answer(body, x_embedding_space="s1-a"),
        error(409, "space_mismatch", param="expect_space", x_should_retry="false"),
    )
    embedder = server.embedder()
    _, model = await embedder.open()
    await embedder.embed(["text"])
    with pytest.raises(BulkError, match="is not the one that this job began with: space_mismatch!"):
        await embedder.embed(["text"])

    assert model["space"] == "s1-a"
    assert server.waits == [1.0]
    assert server.expected_spaces == [None, None, "s1-a", "s1-a"]


async def test_a_server_of_another_kind_is_not_asked_for_a_space() -> None:
    server = Server()
    embedder = server.embedder()
    _, model = await embedder.open()
    await embedder.embed(["text"])

    assert model["space"] == ""
    assert server.waits == [] and server.expected_spaces == [None, None]


@pytest.mark.parametrize(
    ("status", "code"), [(404, "model_not_found"), (400, "prompt_not_found"), (401, "invalid_api_key")]
)
async def test_a_refusal_that_is_about_all_texts_ends_the_job(status: int, code: str) -> None:
    with pytest.raises(BulkError, match=code):
        await Server(error(status, code)).embedder().open()


async def test_int8_needs_ranges_of_the_models_own() -> None:
    server = Server(error(400, "invalid_value", param="output_dtype"))
    with pytest.raises(BulkError, match="has no calibration on that server"):
        await server.embedder(EmbedOptions(dtype="int8")).open()

    assert server.bodies[0]["output_dtype"] == "int8"
    assert len(server.bodies[0]["input"]) == 1  # of several texts the server would make ranges


def test_a_request_has_texts_of_about_one_length_and_a_bounded_size() -> None:
    texts = ["x" * (40_000 if n % 10 == 0 else 400) for n in range(100)]
    groups = group_by_length(texts)

    assert sorted(index for group in groups for index in group) == list(range(100))
    for group in groups:
        assert sum(len(texts[index]) // 4 + 1 for index in group) <= 16_384
