"""Tests `/v1/models`: OpenAI's format, ids with slashes, and the additional fields."""

import openai
import pytest

from router.server.application import fold_model_id
from tests.testkit.score_servers import RERANKERS
from tests.testkit.servers import Served, fake_server

READY = {
    "id": "mini", "object": "model", "created": 1_700_000_000, "owned_by": "embedyard", "state": "ready",
    "source": "org/mini", "aliases": ["text-embedding-3-small"], "task": "embed", "outputs": ["dense"],
    "model_type": "embedding", "model_ability": ["embed"], "labels": [], "dimensions": 8, "vocab_size": None,
    "vector_width": None,
    "matryoshka": {"widths": [4], "minimum": None, "layer_norm": False}, "max_tokens": 512,
    "prompts": {"query": "q: "}, "dtype": "float32", "bytes_by_dtype": {}, "shares": [],
    "precision": None, "space": None,
    "output_spaces": None,
    "device": "cpu", "memory_bytes": 300,
    "revision": "f" * 40,
    "trust_remote_code": False, "adapter": None,
}  # fmt: skip
UNKNOWN_YET = {
    "id": "cold", "object": "model", "created": 1_700_000_000, "owned_by": "embedyard", "state": "absent",
    "source": "org/cold", "aliases": [], "task": None, "outputs": [],
    "model_type": "embedding", "model_ability": ["embed"], "labels": [], "dimensions": None, "vocab_size": None,
    "vector_width": None, "matryoshka": None, "max_tokens": 77,
    "prompts": {"query": "q: "}, "dtype": "auto", "bytes_by_dtype": {}, "shares": [], "precision": None, "space": None,
    "output_spaces": None,
    "device": "auto", "memory_bytes": 0,
    "revision": "v1",
    "trust_remote_code": True, "adapter": None,
}  # fmt: skip


def test_the_list_holds_every_model_of_the_registry(served: Served) -> None:
    answer = served.client.get("/v1/models").json()

    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["mini", "BAAI/bge-m3", "cold"]
    assert answer["data"][0] == READY
    assert answer["data"][2] == UNKNOWN_YET


async def test_models_say_what_they_can_do_before_and_after_a_load() -> None:
    fields = ("task", "outputs", "labels", "dimensions")
    in_xinferences_words = [("rerank", ["rerank"]), (None, []), ("embedding", ["embed"]), ("embedding", ["embed"])]
    async with fake_server(registry=RERANKERS) as server:
        before = (await server.client.get("/v1/models")).json()["data"]
        for model in ("ranker", "labeler", "unknown"):
            await server.client.post(f"/admin/models/{model}/preload")
        after = (await server.client.get("/v1/models")).json()["data"]

    assert [(model["model_type"], model["model_ability"]) for model in before] == in_xinferences_words
    assert [tuple(model[field] for field in fields) for model in before] == [
        ("rerank", ["score"], [], None),
        ("classify", ["labels"], [], None),
        ("embed", [], [], None),
        (None, [], [], None),
    ]
    assert [tuple(model[field] for field in fields) for model in after] == [
        ("rerank", ["score"], ["LABEL_0"], None),
        ("classify", ["labels"], ["negative", "neutral", "positive"], None),
        ("embed", [], [], None),
        ("embed", ["dense"], [], 16),
    ]


@pytest.mark.parametrize(
    ("path", "model_id"),
    [
        ("mini", "mini"),
        ("text-embedding-3-small", "mini"),
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("BAAI%2Fbge-m3", "BAAI/bge-m3"),
        ("BAAI%2fbge-m3/", "BAAI/bge-m3"),
        ("org/deep/alias", "BAAI/bge-m3"),
    ],
)
def test_a_model_is_found_by_id_or_alias(served: Served, path: str, model_id: str) -> None:
    answer = served.client.get(f"/v1/models/{path}")

    assert answer.status_code == 200
    assert answer.json()["id"] == model_id


def test_a_folder_is_shown_by_its_name_only(served: Served) -> None:
    answer = served.client.get("/v1/models/BAAI/bge-m3")

    assert answer.json()["source"] == "local:bge-m3"
    assert answer.json()["owned_by"] == "BAAI"
    assert "/secret" not in answer.text


def test_the_openai_client_lists_and_retrieves(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        listed = [model.id for model in client.models.list()]
        one = client.models.retrieve("BAAI/bge-m3")
        with pytest.raises(openai.NotFoundError, match="did you mean mini"):
            client.models.retrieve("mnii")

    assert listed == ["mini", "BAAI/bge-m3", "cold"]
    assert (one.id, one.object, one.owned_by) == ("BAAI/bge-m3", "model", "BAAI")


@pytest.mark.parametrize(
    ("path", "folded"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/", "/v1/models/"),
        ("/v1/models/a", "/v1/models/a"),
        ("/v1/models/a/b/c", "/v1/models/a%2Fb%2Fc"),
        ("/v1/models/a/preload", "/v1/models/a%2Fpreload"),
        ("/admin/models/a/b/preload", "/admin/models/a%2Fb/preload"),
        ("/admin/models/a/evict/", "/admin/models/a/evict"),
        ("/admin/models/preload", "/admin/models/preload"),
        ("/admin/models/a%2Fb", "/admin/models/a%252Fb"),
        ("/v1/embeddings", "/v1/embeddings"),
    ],
)
def test_a_model_id_becomes_one_segment_of_the_path(path: str, folded: str) -> None:
    assert fold_model_id(path) == folded
