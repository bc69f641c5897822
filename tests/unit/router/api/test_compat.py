"""Tests the compatibility routes: the calls they make, their answers and their errors."""

import base64
from typing import Any

import numpy as np
import pytest

from engines.types import EmbedCall
from router.app import create_app
from router.config.settings import Settings
from tests.testkit.backends import WIDTH, ScriptedBackend, vector
from tests.testkit.contract import assert_envelope
from tests.testkit.servers import REGISTRY, Served

TWO = ["one", "three"]
ROWS = [pytest.approx(vector(text), rel=1e-6) for text in TWO]
APIS = {
    "tei": ("/embed", "inputs", {}),
    "cohere": ("/v2/embed", "texts", {"model": "mini"}),
    "ollama": ("/api/embed", "input", {"model": "mini"}),
    "infinity": ("/embeddings", "input", {}),
    "azure": ("/openai/deployments/BAAI/bge-m3/embeddings", "input", {}),
    "path": ("/m/BAAI/bge-m3/v1/embeddings", "input", {}),
    "voyage": ("/v1/contextualizedembeddings", "inputs", {}),
}
"""Path, field of the texts, and other required fields of each API."""


def ask(served: Served, api: str, texts: Any, **fields: Any) -> Any:
    path, name, more = APIS[api]
    return served.client.post(path, json={name: texts, **more, **fields})


def call_of(served: Served) -> EmbedCall:
    (call,) = served.backend.calls
    return call


def test_tei_answers_with_the_vectors_alone(served: Served) -> None:
    served.backend.truncated = (1,)
    answer = ask(served, "tei", TWO)

    assert answer.json() == ROWS
    assert answer.headers["x-embed-truncated"] == "1"
    assert "forward;dur=30.5" in answer.headers["server-timing"]


def test_tei_requests_are_translated(served: Served) -> None:
    ask(served, "tei", "one", prompt_name="query", normalize=False, dimensions=4, model="BAAI/bge-m3")
    call = call_of(served)

    assert (call.model_id, call.texts, call.input_type) == ("BAAI/bge-m3", ("one",), "query")
    assert (call.normalize, call.dimensions, call.truncate) == (False, 4, None)


@pytest.mark.parametrize(
    ("fields", "truncate"),
    [
        ({"truncate": False}, "error"),
        ({"truncate": False, "truncation_direction": "Left"}, "error"),
        ({"truncate": True}, "end"),
        ({"truncate": True, "truncation_direction": "left"}, "start"),
        ({"truncation_direction": "Right"}, "end"),
        ({"truncate": None}, None),
    ],
)
def test_teis_truncation_means(served: Served, fields: dict[str, object], truncate: str | None) -> None:
    ask(served, "tei", TWO, **fields)

    assert call_of(served).truncate == truncate


def test_teis_info_is_of_the_default_model(served: Served) -> None:
    info = served.client.get("/info").json()

    assert (info["model_id"], info["model_sha"], info["model_dtype"]) == ("mini", "f" * 40, "float32")
    assert (info["max_input_length"], info["max_client_batch_size"], info["auto_truncate"]) == (512, 2048, True)
    assert info["model_type"] == {"embedding": {"pooling": None}}


def test_cohere_answers_by_type(served: Served) -> None:
    answer = ask(served, "cohere", TWO, embedding_types=["float", "base64", "ubinary", "float"]).json()
    bits = np.packbits(np.array([vector(text) for text in TWO]) > 0, axis=-1)
    raw = [np.frombuffer(base64.b64decode(row), "<f4") for row in answer["embeddings"]["base64"]]

    assert answer["embeddings"].keys() == {"float", "base64", "ubinary"}
    assert answer["embeddings"]["float"] == ROWS
    assert answer["embeddings"]["ubinary"] == bits.tolist()
    assert np.array_equal(raw, np.array([vector(text) for text in TWO], np.float32))
    assert (answer["texts"], answer["response_type"]) == (TWO, "embeddings_by_type")
    assert answer["meta"]["billed_units"] == {"input_tokens": 8}
    assert answer["id"]


@pytest.mark.parametrize(("truncate", "meant"), [("NONE", "error"), ("START", "start"), ("END", "end"), (None, None)])
def test_cohere_requests_are_translated(served: Served, truncate: str | None, meant: str | None) -> None:
    ask(served, "cohere", TWO, input_type="search_query", output_dimension=4, truncate=truncate)
    call = call_of(served)

    assert (call.input_type, call.dimensions, call.truncate) == ("search_query", 4, meant)


def test_ollama_answers_as_ollama(served: Served) -> None:
    answer = ask(served, "ollama", TWO).json()

    assert answer["embeddings"] == ROWS
    assert (answer["model"], answer["prompt_eval_count"], answer["load_duration"]) == ("mini", 8, 500_000_000)
    assert answer["total_duration"] > 0


@pytest.mark.parametrize(
    ("keep_alive", "seconds"), [("5m", 300.0), (0, 0.0), (-1, -1.0), (-5.5, -1.0), ("-1m", -1.0), (None, None)]
)
def test_ollama_requests_are_translated(served: Served, keep_alive: object, seconds: float | None) -> None:
    ask(served, "ollama", "one", model="mini:latest", keep_alive=keep_alive, truncate=False, dimensions=4)
    call = call_of(served)

    assert (call.model_id, call.texts, call.dimensions, call.truncate) == ("mini", ("one",), 4, "error")
    assert call.keep_alive_s == seconds


def test_ollama_lists_what_is_served_and_what_runs(served: Served) -> None:
    tags = served.client.get("/api/tags").json()["models"]
    running = served.client.get("/api/ps").json()["models"]

    assert {model["name"] for model in tags} == {"mini:latest", "BAAI/bge-m3:latest", "cold:latest"}
    assert {model["name"] for model in running} == {"mini:latest", "BAAI/bge-m3:latest"}
    assert running[0] | {"size": 200, "size_vram": 0, "expires_at": None, "context_length": WIDTH * 64} == running[0]
    assert "/secret" not in str([tags, running])


def test_the_model_in_the_path_wins(served: Served) -> None:
    answer = ask(served, "path", TWO, model="text-embedding-3-small").json()
    encoded = served.client.post("/m/BAAI%2Fbge-m3/v1/embeddings", json={"input": TWO})

    assert (answer["model"], [item["embedding"] for item in answer["data"]]) == ("BAAI/bge-m3", ROWS)
    assert (encoded.status_code, encoded.json()["model"]) == (200, "BAAI/bge-m3")


WITH_ENVELOPE = [api for api in APIS if api not in ("ollama", "voyage")]
"""Ollama's errors are strings, and Voyage's inputs are lists of texts (`test_late_chunking.py`)."""


@pytest.mark.parametrize("api", WITH_ENVELOPE)
@pytest.mark.parametrize(
    ("texts", "code"),
    [([], "empty_input"), (["a", ""], "empty_input"), (["a"] * 2049, "too_many_inputs"), (5, "invalid_value")],
    ids=["none", "an empty one", "too many", "a number"],
)
def test_a_compatibility_route_names_the_field_as_its_clients_do(
    served: Served, api: str, texts: object, code: str
) -> None:
    assert_envelope(ask(served, api, texts), 400, code, APIS[api][1])
    assert served.backend.calls == []


def test_cohere_takes_one_text_of_a_calibrated_model(served: Served) -> None:
    fields = {"model": "BAAI/bge-m3", "embedding_types": ["int8", "uint8", "float"]}
    answer = ask(served, "cohere", ["one"], **fields)
    found = answer.json()["embeddings"]

    assert answer.status_code == 200
    assert found["float"] == ROWS[:1]
    assert (np.array(found["int8"]) + 128).tolist() == found["uint8"]
    refused = ask(served, "cohere", ["one"], output_dimension=4, **fields)
    assert_envelope(refused, 400, "invalid_value", "embedding_types")


@pytest.mark.parametrize(
    ("api", "fields", "status", "code", "param"),
    [
        ("tei", {"truncate": "yes"}, 400, "invalid_value", "truncate"),
        ("tei", {"truncation_direction": "up"}, 400, "invalid_value", "truncation_direction"),
        ("tei", {"dimensions": 0}, 400, "invalid_value", "dimensions"),
        ("tei", {"model": "nothing"}, 404, "model_not_found", None),
        ("cohere", {"model": "nothing"}, 404, "model_not_found", None),
        ("cohere", {"model": None}, 400, "invalid_value", "model"),
        ("cohere", {"truncate": "end"}, 400, "invalid_value", "truncate"),
        ("cohere", {"output_dimension": "4"}, 400, "invalid_value", "output_dimension"),
        ("cohere", {"embedding_types": ["int4"]}, 400, "invalid_value", "embedding_types"),
        ("cohere", {"texts": ["a"], "embedding_types": ["uint8"]}, 400, "invalid_value", "embedding_types"),
        ("infinity", {"dimensions": True}, 400, "invalid_value", "dimensions"),
        ("infinity", {"model": "nothing"}, 404, "model_not_found", None),
        ("azure", {"dimensions": True}, 400, "invalid_value", "dimensions"),
        ("path", {"dimensions": True}, 400, "invalid_value", "dimensions"),
    ],
)
def test_a_bad_request_to_a_compatibility_route_is_answered_with(
    served: Served, api: str, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    path, name, more = APIS[api]
    answer = served.client.post(path, json={name: TWO, **more, **fields})

    assert_envelope(answer, status, code, param)
    assert served.backend.calls == []


def test_an_unknown_model_in_the_path_is_not_found(served: Served) -> None:
    answer = served.client.post("/m/no/thing/v1/embeddings", json={"input": "a"})

    assert_envelope(answer, 404, "model_not_found", None)


@pytest.mark.parametrize("api", APIS)
def test_each_compatibility_api_is_off_unless_it_is_listed(api: str) -> None:
    others = tuple(other for other in APIS if other != api)
    routes = {settings: _paths(settings) for settings in [(), others, tuple(APIS)]}
    path = APIS[api][0].replace("BAAI/bge-m3", "{model_id:str}")

    assert path in routes[tuple(APIS)]
    assert path not in routes[others]
    assert {path for path in routes[tuple(APIS)] if path not in routes[()]} == {
        "/embed", "/embed_sparse", "/embed_all", "/tokenize", "/predict", "/info", "/v1/embed",
        "/v2/embed", "/api/embed", "/api/embeddings",
        "/api/tags", "/api/ps", "/api/show", "/api/version", "/api/pull", "/embeddings", "/models",
        "/models/{model_id:str}", "/openai/deployments/{model_id:str}/embeddings", "/m/{model_id:str}/v1/embeddings",
        "/v1/contextualizedembeddings",
    }  # fmt: skip
    assert "/v1/embeddings" in routes[()]


def test_the_root_takes_posts_where_tei_is_enabled_only() -> None:
    methods = {
        apis: {
            method
            for route in create_app(Settings(skins=apis), REGISTRY, ScriptedBackend("mini")).routes
            if route.path == "/"
            for method in getattr(route, "methods", ())
        }
        for apis in [("tei",), ("ollama",)]
    }

    assert methods == {("tei",): {"GET", "POST", "OPTIONS"}, ("ollama",): {"GET", "OPTIONS"}}


def _paths(apis: tuple[str, ...]) -> set[str]:
    return {route.path for route in create_app(Settings(skins=apis), REGISTRY, ScriptedBackend("mini")).routes}
