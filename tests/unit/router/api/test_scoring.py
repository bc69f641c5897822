"""Tests scoring over the real pool and fake engines: which model scores how, cosines, refusals, limits and metrics."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec import structs

from engines.testing.engine import fake_score, fake_vector
from engines.testing.fakes import FakeLoader
from engines.types import EmbedCall, ScoreCall
from router.api.score_encoding import best_first
from router.api.scoring import cosines
from router.limits.limiter import estimate_tokens
from router.registry.registry import Registry
from tests.testkit.contract import assert_envelope
from tests.testkit.score_servers import RERANKERS
from tests.testkit.servers import FakeServer, eventually, fake_server

DOCUMENTS = ["a cat", "a dog", "two cats and a dog"]
RERANK = {"query": "cats?", "documents": DOCUMENTS}


async def rerank(server: FakeServer, model: str, **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/rerank", json={**RERANK, "model": model, **fields})


def by_index(answer: httpx.Response) -> list[float]:
    results = sorted(answer.json()["results"], key=lambda result: result["index"])
    return [result["relevance_score"] for result in results]


def expected_cosines(model: str, prompts: dict[str, str] | None = None) -> Any:
    known = prompts or {}
    query = fake_vector(model, known.get("query", "") + "cats?")
    return pytest.approx([float(fake_vector(model, known.get("document", "") + text) @ query) for text in DOCUMENTS])


async def test_a_reranker_scores_each_pair_and_the_best_comes_first() -> None:
    async with fake_server(registry=RERANKERS) as server:
        answer = await rerank(server, "ranker")
        raw = await rerank(server, "ranker", raw_scores=True)

    scores = [fake_score("ranker", "cats?", text) for text in DOCUMENTS]
    found = [result["relevance_score"] for result in answer.json()["results"]]
    assert by_index(answer) == pytest.approx(scores)
    assert found == sorted(found, reverse=True)
    assert by_index(raw) == pytest.approx([np.log(score / (1 - score)) for score in scores], rel=1e-4)
    assert "method" not in answer.json()
    assert answer.json()["usage"]["prompt_tokens"] == 3 * 4 + 2 + 2 + 5


async def test_an_embedding_model_ranks_by_cosine_with_its_prompts_and_says_so() -> None:
    spec = structs.replace(RERANKERS.models["embedder"], prompts={"query": "find: ", "document": "text: "})
    async with fake_server(registry=Registry(models={"embedder": spec}, default_model="embedder")) as server:
        answer = await rerank(server, "embedder")
        pairs = await server.client.post("/v1/score", json={"text_1": "cats?", "text_2": DOCUMENTS})

    assert by_index(answer) == expected_cosines("embedder", spec.prompts)
    assert (answer.json()["method"], pairs.json()["method"]) == ("cosine", "cosine")
    assert [item["score"] for item in pairs.json()["data"]] == by_index(answer)
    assert answer.json()["usage"]["prompt_tokens"] == 4 + 5 + 5 + 8
    assert server.loader.engines[0].running == 0


async def test_a_model_of_unknown_task_is_asked_for_scores_and_then_for_vectors() -> None:
    async with fake_server(registry=RERANKERS) as server:
        cold = await rerank(server, "unknown")
        warm = await rerank(server, "unknown")
        tei = await server.client.post("/rerank", json={"query": "q", "texts": ["a"], "model": "unknown"})
        labels = await server.client.post("/predict", json={"inputs": "a", "model": "unknown"})

    assert (cold.json()["method"], warm.json()["method"]) == ("cosine", "cosine")
    assert by_index(cold) == by_index(warm) == expected_cosines("unknown")
    for refused in (tei, labels):
        assert_envelope(refused, 400, "task_not_supported", "model")


async def test_a_model_of_unknown_task_that_is_not_in_memory_refuses_what_it_is_not() -> None:
    async with fake_server(registry=RERANKERS) as server:
        answer = await server.client.post("/v1/classify", json={"input": "a", "model": "unknown"})

    assert_envelope(answer, 400, "task_not_supported", "model")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a", "model": "ranker"}),
        ("/v1/rerank", RERANK | {"model": "labeler"}),
        ("/v1/classify", {"input": "a", "model": "embedder"}),
        ("/predict", {"inputs": "a", "model": "embedder"}),
    ],
)
async def test_a_known_task_is_refused_without_a_load(path: str, body: dict[str, Any]) -> None:
    async with fake_server(registry=RERANKERS) as server:
        answer = await server.client.post(path, json=body)

    assert_envelope(answer, 400, "task_not_supported", "model")
    assert server.loader.loads == {}


async def test_labels_have_the_names_of_the_model() -> None:
    async with fake_server(registry=RERANKERS) as server:
        classes = await server.client.post("/v1/classify", json={"input": ["good", "bad"], "model": "labeler"})
        best = await server.client.post("/predict", json={"inputs": "good", "model": "labeler"})
        info = (await server.client.get("/info")).json()["model_type"]

    names = ("negative", "neutral", "positive")
    scores = {name: fake_score("labeler", "", "good", index) for index, name in enumerate(names)}
    first = classes.json()["data"][0]
    assert first["probs"] == pytest.approx(list(scores.values()))
    assert first["label"] == best.json()[0]["label"] == max(scores, key=scores.__getitem__)
    assert {item["label"]: item["score"] for item in best.json()} == pytest.approx(scores)
    assert info == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


async def test_a_limit_of_tokens_per_document_is_never_ignored() -> None:
    async with fake_server(registry=RERANKERS) as server:
        wide = await rerank(server, "embedder", max_tokens_per_doc=7)
        narrow = await rerank(server, "embedder", max_tokens_per_doc=6)

    assert wide.json()["method"] == "cosine"
    assert_envelope(narrow, 400, "invalid_value", "max_tokens_per_doc")
    assert "document 2 has 7 tokens, more than 6" in narrow.text


async def test_a_query_that_an_embedding_model_would_cut_is_refused() -> None:
    async with fake_server(registry=RERANKERS) as server:
        answer = await rerank(server, "embedder", query="word " * 60)

    assert_envelope(answer, 400, "context_length_exceeded", "query")
    assert "query 0 has 62 tokens, the limit is 40: shorten it, queries are not truncated" in answer.text


async def test_truncated_documents_are_named_in_the_header() -> None:
    async with fake_server(registry=RERANKERS) as server:
        documents = ["short", "word " * 60, "word " * 70, "short too"]
        scored = await rerank(server, "ranker", documents=documents)
        cosine = await rerank(server, "embedder", documents=documents)

    assert scored.headers["x-embed-truncated"] == cosine.headers["x-embed-truncated"] == "1-2"


async def test_requests_are_counted_as_those_of_embeddings() -> None:
    async with fake_server(registry=RERANKERS) as server:
        await rerank(server, "ranker")
        await rerank(server, "embedder")
        metrics = (await server.client.get("/metrics")).text

    assert 'embedyard_inputs_total{model="ranker"} 3.0' in metrics
    assert 'embedyard_prompt_tokens_total{model="ranker"} 21.0' in metrics
    assert 'embedyard_inputs_total{model="embedder"} 4.0' in metrics
    assert 'embedyard_requests_total{code="ok",model="ranker",route="/v1/rerank",status="200"} 1.0' in metrics


async def test_the_work_ends_when_the_client_leaves() -> None:
    async with fake_server(registry=RERANKERS, loader=FakeLoader(embed_s=30.0)) as server:
        for model in ("ranker", "embedder"):
            with pytest.raises(httpx.ReadTimeout):
                await server.client.post("/v1/rerank", json={**RERANK, "model": model}, timeout=0.5)
        await eventually(lambda: [engine.cancelled for engine in server.loader.engines] == [1, 1])


async def test_a_token_limit_counts_the_query_once_for_each_document() -> None:
    async with fake_server(registry=RERANKERS, rate_limit_tokens=100) as server:
        answer = await rerank(server, "ranker")
        large = await rerank(server, "ranker", query="word " * 20)

    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100 - 21)
    assert_envelope(large, 429, "rate_limit_exceeded", None)


def test_the_estimate_of_pairs_has_the_query_with_each_document() -> None:
    query, text = "q" * 40, "d" * 80
    one = estimate_tokens(ScoreCall(model_id="m", queries=(query,), texts=(text,)), None)
    many = estimate_tokens(ScoreCall(model_id="m", queries=(query,), texts=(text,) * 5), None)
    zipped = estimate_tokens(ScoreCall(model_id="m", queries=(query,) * 5, texts=(text,) * 5), None)
    single = estimate_tokens(ScoreCall(model_id="m", texts=(text,)), None)
    cut = estimate_tokens(ScoreCall(model_id="m", queries=(query,), texts=(text,), max_text_tokens=8), None)

    assert (one, many, zipped) == (10 + 20 + 3, 5 * one, 5 * one)
    assert single == estimate_tokens(EmbedCall(model_id="m", texts=(text,)), None)
    assert cut == 10 + 1 + 8
    assert estimate_tokens(ScoreCall(model_id="m", queries=(query,), texts=(text,) * 3), 12) == 36


def test_equal_scores_keep_their_order_and_the_best_n_are_taken() -> None:
    values = np.array([0.5, 0.9, 0.5, 0.9, -1.0], np.float32)

    assert best_first(values) == [1, 3, 0, 2, 4]
    assert best_first(values, 3) == [1, 3, 0]
    assert best_first(values, 99) == best_first(values, 0) == best_first(values, None)


def test_a_cosine_does_not_depend_on_the_other_pairs() -> None:
    rng = np.random.default_rng(3)
    query, texts = rng.standard_normal((1, 384)).astype("<f4"), rng.standard_normal((500, 384)).astype("<f4")
    together = cosines(query, texts)

    assert all(cosines(query, texts[index : index + 1])[0] == together[index] for index in range(0, 500, 7))
    assert (cosines(np.repeat(query, 500, axis=0), texts) == together).all()
    assert cosines(query, np.zeros((1, 384), "<f4")).tolist() == [0.0]
    assert cosines(query, 3 * query)[0] == pytest.approx(1.0, abs=1e-7)


async def test_many_requests_at_once_get_their_own_scores() -> None:
    async with fake_server(registry=RERANKERS) as server:
        wanted = [[f"text {request} {index}" for index in range(300)] for request in range(8)]
        answers = await asyncio.gather(*(rerank(server, "ranker", documents=documents) for documents in wanted))

    for documents, answer in zip(wanted, answers, strict=True):
        assert by_index(answer) == pytest.approx([fake_score("ranker", "cats?", text) for text in documents])
