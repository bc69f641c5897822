"""Sparse and multi-vector outputs of real folders over sockets, beside sentence-transformers on the same folders."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from benchmarks.lib import vocabularies
from benchmarks.lib.models import RECIPES, quiet
from benchmarks.lib.workloads import SENTENCES
from engines.hub.file_selection import COLBERT_LINEAR, SPARSE_LINEAR
from tests.testkit import late_models
from tests.testkit.servers import LiveServer, serve_live
from tests.testkit.sparse_models import save_router, save_splade, sparse_encode, sparse_reference

pytestmark = pytest.mark.slow

TEXTS = list(SENTENCES[:5])
WIDTH = 48
COLBERT = "bert-unseen-fillers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    found = {name: root / name for name in ("splade", "router", "colbert", "m3")}
    save_splade(found["splade"])
    save_router(found["router"])
    late_models.FAMILIES[COLBERT].build(found["colbert"])
    with quiet():
        RECIPES["xlm-roberta-cls"].build(found["m3"])
    generator = torch.Generator().manual_seed(3)
    for name, rows in ((SPARSE_LINEAR, 1), (COLBERT_LINEAR, WIDTH)):
        head = {"weight": torch.randn(rows, WIDTH, generator=generator), "bias": torch.zeros(rows)}
        torch.save(head, found["m3"] / name)
    return found


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    lines = [f"  - {{name: {name}, source: {folder}}}" for name, folder in folders.items()]
    registry = tmp_path_factory.mktemp("registry") / "registry.yaml"
    registry.write_text("\n".join(["version: 1", "models:", *lines, ""]))
    with serve_live(registry, DEVICE="cpu") as live:
        yield live


def post(server: LiveServer, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def embed(server: LiveServer, model: str, **body: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = post(server, "/v1/embeddings", model=model, input=TEXTS, **body)["data"]
    assert [item["index"] for item in items] == list(range(len(TEXTS)))
    return items


def assert_weights(items: list[dict[str, Any]], wanted: torch.Tensor) -> None:
    found = np.zeros(wanted.shape, np.float32)
    for row, item in zip(found, items, strict=True):
        terms = item["sparse_embedding"]
        assert terms["indices"] == sorted(terms["indices"])
        row[terms["indices"]] = terms["values"]
    assert np.abs(found - wanted.numpy()).max() < 1e-5


def vectors_of(item: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    packed = item["multi_vector_embedding"]
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def test_a_splade_folder_answers_without_naming_its_output(server: LiveServer, folders: dict[str, Path]) -> None:
    items = embed(server, "splade", return_tokens=True)

    assert_weights(items, sparse_encode(sparse_reference(folders["splade"]), TEXTS))
    terms = items[0]["sparse_embedding"]
    tokenizer = vocabularies.bert()
    assert terms["tokens"] == tokenizer.convert_ids_to_tokens(terms["indices"])


def test_each_side_of_a_router_takes_its_own_modules(server: LiveServer, folders: dict[str, Path]) -> None:
    reference = sparse_reference(folders["router"])

    for side in ("query", "document"):
        items = embed(server, "router", outputs=["sparse"], input_type=side)
        assert_weights(items, sparse_encode(reference, TEXTS, task=side))


def test_vectors_of_tokens_are_those_of_the_reference_on_both_sides(
    server: LiveServer, folders: dict[str, Path]
) -> None:
    model = late_models.reference(folders["colbert"])

    for side in ("query", "document"):
        items = embed(server, "colbert", input_type=side, encoding_format="base64")
        late_models.assert_same([vectors_of(item) for item in items], late_models.wanted(model, TEXTS, side))


def test_a_colbert_reranks_by_maxsim(server: LiveServer, folders: dict[str, Path]) -> None:
    model = late_models.reference(folders["colbert"])
    query, *documents = TEXTS
    wanted = model.similarity(
        late_models.wanted(model, [query], "query"), late_models.wanted(model, documents, "document")
    )[0].tolist()

    answer = post(server, "/v1/rerank", model="colbert", query=query, documents=documents)

    assert answer["method"] == "maxsim"
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert found == pytest.approx(dict(enumerate(wanted)), abs=1e-4)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)


def test_three_outputs_of_one_call_are_those_of_three_calls(server: LiveServer) -> None:
    together = embed(server, "m3", outputs=["dense", "sparse", "multi_vector"], encoding_format="float")
    alone = {name: embed(server, "m3", outputs=[name], encoding_format="float") for name in ("sparse", "multi_vector")}
    dense = embed(server, "m3")

    for index, item in enumerate(together):
        assert item["embedding"] == pytest.approx(dense[index]["embedding"], abs=1e-6)
        assert item["sparse_embedding"]["indices"] == alone["sparse"][index]["sparse_embedding"]["indices"]
        found, single = (np.array(each["multi_vector_embedding"]) for each in (item, alone["multi_vector"][index]))
        assert np.abs(found - single).max() < 1e-6


def test_models_say_what_they_give(server: LiveServer) -> None:
    for name in ("splade", "colbert", "m3"):
        embed(server, name)

    listed = {model["id"]: model for model in httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]}

    assert {name: listed[name]["outputs"] for name in ("splade", "colbert", "m3")} == {
        "splade": ["sparse"], "colbert": ["multi_vector"], "m3": ["dense", "sparse", "multi_vector"],
    }  # fmt: skip
    assert listed["colbert"]["vector_width"] == late_models.PROJECTED
    assert listed["splade"]["dimensions"] is None


def test_teis_routes_answer_with_the_same_weights_and_the_states_of_all_tokens(server: LiveServer) -> None:
    sparse = post(server, "/v1/embeddings", model="m3", input=TEXTS[0], outputs=["sparse"])["data"][0]
    states = post(server, "/embed_all", model="m3", inputs=TEXTS[0])
    weights = post(server, "/embed_sparse", model="m3", inputs=TEXTS[0])

    terms = sparse["sparse_embedding"]
    assert [(each["index"], pytest.approx(each["value"])) for each in weights[0]] == list(
        zip(terms["indices"], terms["values"], strict=True)
    )
    assert len(states[0]) > 3
    assert len(states[0][0]) == WIDTH
