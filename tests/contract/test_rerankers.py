"""Tests unmodified rerank clients against `embedyard serve` with a real reranker; scores are sentence-transformers'.

A client that is not installed is skipped. Dify's, RAGFlow's and open-webui's requests are written out as these
programs send them, and the fields that they read are read: Dify's plugins of 2026-08, RAGFlow of 2026-08, open-webui's
`retrieval/models/external.py`.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.testkit.rerank_models import DOCUMENTS, KEY, QUERY, RerankModels

pytestmark = pytest.mark.slow

CLIENTS = Path(sys.prefix) / "clients"
HERE = Path(__file__).parent
TOP_N = 3
ASKED = {"query": QUERY, "documents": list(DOCUMENTS)}
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> RerankModels:
    return RerankModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def url(models: RerankModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with models.serve(folder / "registry.yaml", DATA_DIR=str(folder / "data")) as server:
        yield server.url


@pytest.fixture(scope="module")
def ranking(models: RerankModels) -> list[tuple[int, float]]:
    found = models.ranking()
    assert [index for index, _ in found] != sorted(range(len(found))), "an order that a client could not get by chance"
    return found


def assert_ranking(found: Sequence[tuple[int, float]], expected: Sequence[tuple[int, float]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def assert_texts(found: Sequence[tuple[str, float]], expected: Sequence[tuple[int, float]]) -> None:
    assert [text for text, _ in found] == [DOCUMENTS[index] for index, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


Ranking = list[tuple[int, float]]


# Cohere.


def test_cohere_v1(url: str, ranking: Ranking) -> None:
    cohere = pytest.importorskip("cohere")
    with httpx.Client() as http, cohere.Client(api_key=KEY, base_url=url, httpx_client=http) as client:
        asked = {"query": QUERY, "model": "ranker", "top_n": TOP_N}
        plain = client.rerank(documents=list(DOCUMENTS), return_documents=True, **asked)
        objects = client.rerank(documents=[{"text": text} for text in DOCUMENTS], rank_fields=["text"], **asked)

    assert_texts([(one.document.text, one.relevance_score) for one in plain.results], ranking[:TOP_N])
    assert_ranking([(one.index, one.relevance_score) for one in objects.results], ranking[:TOP_N])
    assert (plain.meta.api_version.version, plain.meta.billed_units.search_units) == ("1", 1)


def test_cohere_v2(url: str, ranking: Ranking) -> None:
    cohere = pytest.importorskip("cohere")
    with httpx.Client() as http, cohere.ClientV2(api_key=KEY, base_url=url, httpx_client=http) as client:
        asked = {"query": QUERY, "documents": list(DOCUMENTS), "model": "rerank-v3.5"}
        answer = client.rerank(max_tokens_per_doc=4096, **asked)
        with pytest.raises(pytest.importorskip("cohere.errors").NotFoundError):
            client.rerank(**asked | {"model": "rerank-v9"})

    assert_ranking([(one.index, one.relevance_score) for one in answer.results], ranking)
    assert answer.meta.tokens.input_tokens > 0
    assert answer.meta.tokens.output_tokens == 0


# LiteLLM, LangChain, Infinity: environments of their own.


def run_script(environment: str, script: str, url: str, **asked: Any) -> dict[str, Any]:
    python = CLIENTS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} is not installed: make install-test")
    own = {"BASE_URL": url, "API_KEY": KEY, "ASKED": json.dumps(asked), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [python, "-W", "ignore", HERE / script],
        env=os.environ | own, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_litellm(url: str, ranking: Ranking) -> None:
    seen = run_script("litellm", "litellm_rerank.py", url, **ASKED, top_n=TOP_N)
    texts = [DOCUMENTS[index] for index, _ in ranking]

    assert seen.pop("refusal") == 404
    assert_ranking(seen.pop("infinity without documents")["ranking"], ranking[:TOP_N])
    for provider, found in seen.items():
        wanted = len(DOCUMENTS) if provider == "huggingface" else TOP_N  # TEI has no top_n
        assert_ranking(found["ranking"], ranking[:wanted])
        assert found["texts"] == texts[:wanted], provider
    assert seen["cohere"]["meta"]["billed_units"] == {"search_units": 1}
    assert seen["infinity"]["meta"]["tokens"]["input_tokens"] > 0
    assert seen["jina_ai"]["meta"]["billed_units"]["total_tokens"] > 0


def test_langchain_and_infinitys_client(url: str, models: RerankModels, ranking: Ranking) -> None:
    seen = run_script("rerankers", "rerank_clients.py", url, **ASKED, top_n=TOP_N)
    best = [DOCUMENTS[index] for index, _ in ranking[:TOP_N]]
    raw = models.scores(activation_fn=torch.nn.Identity())
    names, probabilities = models.labels(DOCUMENTS)

    for client in ("cohere", "jina", "infinity"):
        assert_texts(seen[client], ranking[:TOP_N])
    assert_ranking(seen["infinity_client"]["ranking"], ranking[:TOP_N])
    assert seen["infinity_client"]["documents"] == best
    assert seen["infinity_client"]["tokens"] > 0
    assert dict(seen["infinity_raw"]["ranking"]) == pytest.approx(dict(enumerate(raw)), abs=1e-4)
    assert seen["infinity_raw"]["documents"] == [None] * len(DOCUMENTS)
    for found, row in zip(seen["infinity_labels"], probabilities, strict=True):
        assert dict(found) == pytest.approx(dict(zip(names, row, strict=True)), abs=1e-5)
        assert found == sorted(found, key=lambda label: -label[1])


# LlamaIndex.


def nodes() -> list[Any]:
    schema = pytest.importorskip("llama_index.core.schema")
    return [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.5) for text in DOCUMENTS]


def test_llama_indexs_reranker_of_tei(url: str, ranking: Ranking) -> None:
    client = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    ranker = client.TextEmbeddingInference(base_url=url, top_n=TOP_N, auth_token=f"Bearer {KEY}")

    found = ranker.postprocess_nodes(nodes(), query_str=QUERY)

    assert_texts([(node.text, node.score) for node in found], ranking[:TOP_N])


def test_llama_indexs_reranker_of_jina(url: str, ranking: Ranking) -> None:
    client = pytest.importorskip("llama_index.postprocessor.jinaai_rerank")
    ranker = client.JinaRerank(base_url=f"{url}/v1", top_n=TOP_N, api_key=KEY, model="ranker")

    found = ranker.postprocess_nodes(nodes(), query_str=QUERY)
    ranker._session.close()

    assert_texts([(node.text, node.score) for node in found], ranking[:TOP_N])


# Haystack.

DIFFERENT = DOCUMENTS[:-1]
"""Haystack drops documents that are equal."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one of them leaves a socket open
@pytest.mark.parametrize(
    ("module", "name", "address"),
    [
        ("cohere", "CohereRanker", ("api_base_url", "")),
        ("jina", "JinaRanker", ("base_url", "/v1/rerank")),
        ("huggingface_api", "HuggingFaceTEIRanker", ("url", "")),
    ],
    ids=str,
)
def test_haystack(
    url: str, models: RerankModels, monkeypatch: pytest.MonkeyPatch, module: str, name: str, address: tuple[str, str]
) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    rankers = pytest.importorskip(f"haystack_integrations.components.rankers.{module}")
    haystack = pytest.importorskip("haystack")
    secret = pytest.importorskip("haystack.utils").Secret.from_token(KEY)
    field, path = address
    key = {"token": secret} if module == "huggingface_api" else {"api_key": secret, "model": "ranker"}
    ranker = getattr(rankers, name)(**key, **{field: f"{url}{path}"}, top_k=TOP_N)

    found = ranker.run(QUERY, [haystack.Document(content=text) for text in DIFFERENT])["documents"]

    assert_texts([(document.content, document.score) for document in found], models.ranking(QUERY, DIFFERENT)[:TOP_N])
    del ranker
    gc.collect()  # or the warning about the socket would fail another test


# text-embeddings-inference.


def test_a_client_of_text_embeddings_inference(url: str, models: RerankModels, ranking: Ranking) -> None:
    tei = pytest.importorskip("tei_client")
    client = tei.HttpClient(url, headers=BEARER)
    try:
        ranks = client.rerank(QUERY, list(DOCUMENTS), return_text=True).ranks
        raw = client.rerank(QUERY, list(DOCUMENTS), raw_scores=True).ranks
        info = client.info()
    finally:
        client.client.close()

    assert_ranking([(rank.index, rank.score) for rank in ranks], ranking)
    assert [rank.text for rank in ranks] == [DOCUMENTS[index] for index, _ in ranking]
    scores = dict(enumerate(models.scores(activation_fn=torch.nn.Identity())))
    assert {rank.index: rank.score for rank in raw} == pytest.approx(scores, abs=1e-4)
    assert (info.server_model_type, info.max_client_batch_size) == ("reranker", 2048)


def test_the_hubs_client_classifies(url: str) -> None:
    """It reads the first of the labels, as it does of text-embeddings-inference; the default model has one."""
    hub = pytest.importorskip("huggingface_hub")
    with hub.InferenceClient(model=f"{url}/predict", token=KEY) as client:
        best = client.text_classification("The yard keeps.")

    assert (best.label, 0 < best.score < 1) == ("LABEL_0", True)


# Programs whose requests are written out.


def post(url: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(url, json=body, headers=BEARER, timeout=30)
    answer.raise_for_status()
    return answer.json()


def results(url: str, **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = post(url, {"model": "ranker", **ASKED, **fields})["results"]
    return found


def test_open_webui(url: str, ranking: Ranking) -> None:
    found = sorted(results(f"{url}/v1/rerank", top_n=len(DOCUMENTS)), key=lambda result: int(result["index"]))
    scores = [result["relevance_score"] for result in found]

    assert scores == pytest.approx([score for _, score in sorted(ranking)], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        pytest.param("/v1/rerank", {"top_n": TOP_N}, id="OpenAI-API-compatible, GPUStack"),
        pytest.param("/v1/rerank", {"top_n": None, "return_documents": False}, id="Jina"),
        pytest.param("/rerank", {"top_n": None}, id="LocalAI"),
        pytest.param(
            "/v1/rerank",
            {"top_n": TOP_N, "return_documents": True, "max_chunks_per_doc": None, "return_len": None},
            id="Xinference",
        ),
    ],
)
def test_dify(url: str, ranking: Ranking, path: str, fields: dict[str, Any]) -> None:
    found = [
        (result["document"]["text"] if "document" in result else DOCUMENTS[result["index"]], result["relevance_score"])
        for result in results(f"{url}{path}", **fields)
    ]

    assert_texts(found, ranking[: fields["top_n"]])


def test_difys_plugin_for_text_embeddings_inference(url: str, ranking: Ranking) -> None:
    info = httpx.get(f"{url}/info", headers=BEARER).json()
    found = post(f"{url}/rerank", {"query": QUERY, "texts": list(DOCUMENTS), "return_text": True})

    assert next(iter(info["model_type"])) == "reranker"
    assert int(info["max_input_length"]) > 0
    assert_texts([(result["text"], result["score"]) for result in found], ranking)
    assert_ranking([(result["index"], result["score"]) for result in found], ranking)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        pytest.param("/v1/rerank", {"top_n": len(DOCUMENTS)}, id="Jina, OpenAI-API-compatible, GPUStack"),
        pytest.param("/rerank", {"top_n": len(DOCUMENTS)}, id="LocalAI"),
        pytest.param("/v1/rerank", {"return_documents": "true", "return_len": "true"}, id="Xinference"),
        pytest.param(
            "/v1/rerank",
            {"top_n": len(DOCUMENTS), "return_documents": False, "max_chunks_per_doc": 1024, "overlap_tokens": 80},
            id="SILICONFLOW",
        ),
    ],
)
def test_ragflow(url: str, ranking: Ranking, path: str, fields: dict[str, Any]) -> None:
    answer = post(f"{url}{path}", {"model": "ranker", **ASKED, **fields})
    rank = np.zeros(len(DOCUMENTS))
    for result in answer["results"]:
        rank[result["index"]] = result["relevance_score"]
    tokens = answer["meta"]["tokens"]

    assert rank == pytest.approx([score for _, score in sorted(ranking)], abs=1e-5)
    assert answer["usage"]["total_tokens"] == tokens["input_tokens"] + tokens["output_tokens"] > 0


def test_ragflow_sends_text_embeddings_inference_eight_texts_at_a_time(url: str, models: RerankModels) -> None:
    texts = [f"{DOCUMENTS[index % 4]} {index}" for index in range(20)]
    scores = np.zeros(len(texts))
    for start in range(0, len(texts), 8):
        body = {"query": QUERY, "texts": texts[start : start + 8], "raw_scores": False, "truncate": True}
        for result in post(f"{url}/rerank", body):
            scores[result["index"] + start] = result["score"]

    assert scores == pytest.approx(models.scores(QUERY, texts), abs=1e-5)


def test_openai_runs_a_batch_of_rerank_requests(url: str, ranking: Sequence[tuple[int, float]]) -> None:
    """Its types name OpenAI's endpoints only; the client sends any."""
    openai = pytest.importorskip("openai")
    body = {"model": "ranker", **ASKED}
    lines = [{"custom_id": name, "method": "POST", "url": "/v1/rerank", "body": body} for name in ("a", "b")]
    lines.append(lines[0] | {"custom_id": "bad", "body": body | {"documents": []}})
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("pairs.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/rerank", completion_window="24h")
        while batch.status in ("validating", "in_progress", "finalizing"):
            time.sleep(0.05)
            batch = client.batches.retrieve(batch.id)
        rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
        (error,) = [json.loads(row) for row in client.files.content(batch.error_file_id).text.splitlines()]

    assert [row["custom_id"] for row in rows] == ["a", "b"]
    for row in rows:
        results = row["response"]["body"]["results"]
        assert_ranking([(found["index"], found["relevance_score"]) for found in results], ranking)
    assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
    refused = httpx.post(f"{url}/v1/rerank", json=lines[2]["body"], headers=BEARER)
    assert error["response"]["body"] == refused.json()
