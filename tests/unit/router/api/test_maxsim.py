"""Tests ranking by MaxSim: models with vectors of tokens, the method that a request asks for, and refusals."""

from typing import Any

import httpx
import numpy as np
import pytest

from engines.testing.engine import fake_score, fake_vector
from engines.testing.outputs import fake_maxsim
from tests.testkit.contract import assert_envelope
from tests.testkit.output_servers import output_server
from tests.testkit.servers import FakeServer

DOCUMENTS = ["a cat", "a dog", "two cats and a dog"]
QUERY = "cats and a dog"
RERANK = {"query": QUERY, "documents": DOCUMENTS}


async def rerank(server: FakeServer, model: str, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    return await server.client.post(path, json={**RERANK, "model": model, **fields})


def by_index(answer: httpx.Response) -> list[float]:
    results = sorted(answer.json()["results"], key=lambda result: result["index"])
    return [result["relevance_score"] for result in results]


EXPECTED = [fake_maxsim(QUERY, text) for text in DOCUMENTS]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank"])
async def test_a_model_with_vectors_of_tokens_alone_ranks_by_maxsim_cold_and_warm(path: str) -> None:
    async with output_server() as server:
        cold, warm = await rerank(server, "colbert", path), await rerank(server, "colbert", path)

    for answer in (cold, warm):
        assert by_index(answer) == pytest.approx(EXPECTED)
        assert answer.json()["method"] == "maxsim"
        assert answer.json()["results"][0]["index"] == int(np.argmax(EXPECTED))


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_pairs_are_scored_by_maxsim_in_the_order_of_the_request(path: str) -> None:
    async with output_server() as server:
        one = await server.client.post(path, json={"model": "colbert", "text_1": QUERY, "text_2": DOCUMENTS})
        zipped = await server.client.post(
            path, json={"model": "bge-m3", "text_1": DOCUMENTS, "text_2": DOCUMENTS, "method": "maxsim"}
        )

    assert [item["score"] for item in one.json()["data"]] == pytest.approx(EXPECTED)
    assert [item["score"] for item in zipped.json()["data"]] == pytest.approx(
        [fake_maxsim(text, text) for text in DOCUMENTS]
    )
    assert (one.json()["method"], zipped.json()["method"]) == ("maxsim", "maxsim")


async def test_text_embeddings_inferences_form_ranks_by_maxsim_where_vectors_of_tokens_are() -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}
    async with output_server() as server:
        plain = await server.client.post("/rerank", json=body | {"model": "colbert", "raw_scores": False})
        answers = [await server.client.post("/rerank", json=body | {"model": name}) for name in ("colbert", "bge-m3")]
        refused = await server.client.post("/rerank", json=body | {"model": "dense"})
        ranked = await server.client.post("/rerank", json=body | {"model": "ranker"})

    for answer in answers:
        assert {item["index"]: item["score"] for item in answer.json()} == pytest.approx(dict(enumerate(EXPECTED)))
    assert_envelope(refused, 400, "task_not_supported", "model")
    assert_envelope(plain, 400, "invalid_value", "raw_scores")
    scores = [fake_score("ranker", QUERY, text) for text in DOCUMENTS]
    logits = {index: float(np.log(score / (1 - score))) for index, score in enumerate(scores)}
    assert {item["index"]: item["score"] for item in ranked.json()} == pytest.approx(logits, rel=1e-4)


async def test_a_model_with_both_ranks_by_cosine_unless_the_request_says_maxsim() -> None:
    async with output_server() as server:
        cold = await rerank(server, "bge-m3")
        answers = [await rerank(server, "bge-m3", method=method) for method in (None, "cosine", "maxsim")]

    query = fake_vector("bge-m3", QUERY)
    cosines = pytest.approx([float(fake_vector("bge-m3", text) @ query) for text in DOCUMENTS], abs=1e-6)
    assert [answer.json()["method"] for answer in (cold, *answers)] == ["cosine", "cosine", "cosine", "maxsim"]
    assert by_index(cold) == by_index(answers[0]) == by_index(answers[1]) == cosines
    assert by_index(answers[2]) == pytest.approx(EXPECTED)


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("colbert", {"method": "cosine"}, "colbert has no dense output: it has multi_vector"),
        ("dense", {"method": "maxsim"}, "dense has no multi_vector output: it has dense"),
        ("splade", {}, "splade has no dense or multi_vector output: it has sparse"),
        ("splade", {"method": "maxsim"}, "splade has no multi_vector output: it has sparse"),
    ],
)
async def test_a_method_that_a_model_has_no_output_for_is_refused(
    model: str, fields: dict[str, str], message: str, *, is_warm: bool
) -> None:
    async with output_server() as server:
        if is_warm:
            await server.client.post(f"/admin/models/{model}/preload")
        answer = await rerank(server, model, **fields)

    assert_envelope(answer, 400, "task_not_supported", "model")
    assert answer.json()["error"]["message"].startswith(message)


async def test_a_reranker_has_no_method() -> None:
    async with output_server() as server:
        answer = await rerank(server, "ranker", method="maxsim")
        wrong = await rerank(server, "bge-m3", method="dot")
        plain = await rerank(server, "ranker")

    assert_envelope(answer, 400, "task_not_supported", "method")
    assert_envelope(wrong, 400, "invalid_value", "method")
    assert "method" not in plain.json()


@pytest.mark.parametrize(("path", "body"), [("/v1/classify", {"input": "a"}), ("/predict", {"inputs": [["a", "b"]]})])
async def test_vectors_of_tokens_give_no_labels(path: str, body: dict[str, Any]) -> None:
    async with output_server() as server:
        answers = [await server.client.post(path, json=body | {"model": "colbert"}) for _ in range(2)]

    for answer in answers:
        assert_envelope(answer, 400, "task_not_supported", "model")


async def test_pairs_of_maxsim_are_counted_as_inputs_of_the_model() -> None:
    async with output_server() as server:
        answer = await rerank(server, "colbert", top_n=1, return_documents=True)
        metrics = (await server.client.get("/metrics")).text

    assert answer.json()["results"] == [
        {"index": 2, "relevance_score": pytest.approx(max(EXPECTED)), "document": {"text": DOCUMENTS[2]}}
    ]
    assert answer.json()["usage"]["prompt_tokens"] == 3 * (4 + 3) + 2 + 2 + 5
    assert 'embedyard_inputs_total{model="colbert"} 3.0' in metrics
