"""Tests Ollama's routes beside `/api/embed`, its names, its string errors, and requests as its clients send them."""

import json
from typing import Any

import pytest

from engines.errors import LoadFailed, QueueFull
from router.config.settings import Settings
from tests.testkit.backends import vector
from tests.testkit.servers import Served, bearer, fake_server, limited, serve, write_keys

NO_PAGE = {"accept": "application/json"}


def ask(served: Served, route: str, **body: Any) -> Any:
    return served.client.post(f"/api/{route}", json=body)


def test_the_older_route_answers_with_one_vector(served: Served) -> None:
    answer = ask(served, "embeddings", model="mini:latest", prompt="one", keep_alive="5m", options={"num_ctx": 8})
    (call,) = served.backend.calls

    assert answer.json() == {"embedding": pytest.approx(vector("one"), rel=1e-6)}
    assert (call.model_id, call.texts, call.keep_alive_s) == ("mini", ("one",), 300.0)


@pytest.mark.parametrize("empty", ["", [], None])
def test_nothing_to_embed_gives_no_vectors_and_runs_no_model(served: Served, empty: object) -> None:
    many, one = ask(served, "embed", model="mini", input=empty), ask(served, "embeddings", model="mini", prompt="")

    assert (many.json()["embeddings"], many.json()["model"]) == ([], "mini")
    assert one.json() == {"embedding": []}
    assert served.backend.calls == []


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("embed", {"model": "nothing", "input": "a"}, 404, "Model 'nothing' not found"),
        ("embed", {"model": "nothing", "input": ""}, 404, "Model 'nothing' not found"),
        ("embed", {"model": "mini", "inputs": ["a"]}, 400, "did you mean `input`?"),
        ("embed", {"model": "mini", "input": ["a", ""]}, 400, "input[1] is empty"),
        ("embed", {"model": "mini", "input": 5}, 400, "input is an integer, but must be a string or a list"),
        ("embed", {"model": "mini", "input": "a", "keep_alive": "-soon"}, 400, "keep_alive must be"),
        (
            "embed",
            {"model": "mini", "input": "a", "truncate": 1},
            400,
            "truncate is an integer, but must be true or false",
        ),
        ("embeddings", {"model": "nothing", "prompt": "a"}, 404, "Model 'nothing' not found"),
        ("embeddings", {"model": "mini", "input": "a"}, 400, "did you mean `prompt`?"),
        ("show", {"model": "nothing"}, 404, "Model 'nothing' not found"),
        ("show", {}, 400, "model is required"),
        ("show", {"model": "m" * 1025}, 400, "model must have at most 1024 characters"),
        ("pull", {"name": "nothing"}, 404, "Model 'nothing' not found"),
        ("chat", {"model": "mini"}, 404, "No route POST /api/chat"),
        ("tags", {}, 405, "Method POST is not allowed"),
    ],
)
def test_an_error_is_a_string(served: Served, route: str, body: dict[str, Any], status: int, words: str) -> None:
    answer = ask(served, route, **body)

    assert (answer.status_code, answer.json().keys()) == (status, {"error"})
    assert words in answer.json()["error"]
    assert served.backend.calls == []


def test_a_busy_server_says_when_to_come_again(served: Served) -> None:
    served.backend.failures["mini"] = QueueFull("the queue is full", retry_after_s=2.0)
    answer = ask(served, "embed", model="mini", input="a")

    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (
        429, {"error": "the queue is full"}, "2",
    )  # fmt: skip


def test_errors_are_objects_outside_of_ollamas_paths_and_where_its_api_is_off(served: Served) -> None:
    assert served.client.get("/nothing").json()["error"]["code"] == "not_found"
    for off in serve(Settings(skins=("tei",))):
        assert off.client.post("/api/embed", json={}).json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("field", ["model", "name"])
def test_a_model_is_shown_with_its_limits(served: Served, field: str) -> None:
    shown = ask(served, "show", **{field: "mini:latest"}).json()
    cold = ask(served, "show", **{field: "cold"}).json()

    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["embedyard.embedding_length"] == 8
    assert shown["model_info"]["embedyard.context_length"] == 512
    assert shown["details"]["quantization_level"] == "float32"
    assert cold["model_info"] == {
        "general.architecture": "embedyard", "general.basename": "cold", "embedyard.context_length": 77,
    }  # fmt: skip
    assert served.backend.commands == []


def test_models_are_listed_with_a_tag_a_size_and_a_digest_that_clients_can_cut(served: Served) -> None:
    models = served.client.get("/api/tags").json()["models"]

    assert {model["model"] for model in models} == {"mini:latest", "BAAI/bge-m3:latest", "cold:latest"}
    assert next(model["size"] for model in models if model["name"] == "mini:latest") == 200
    assert all(len(model["digest"]) >= 40 for model in models)


def test_the_version_is_one_that_clients_can_compare(served: Served) -> None:
    version = served.client.get("/api/version").json()["version"]

    assert [part.isdigit() for part in version.split(".")] == [True] * 3


def lines_of(answer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_pull_fetches_and_loads_the_model_and_says_each_step() -> None:
    async with fake_server() as server:
        answer = await server.client.post("/api/pull", json={"model": "mini:latest"})
        slot = await server.slot()

    lines = lines_of(answer)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert lines[0] == {"status": "pulling manifest"}
    assert {"loading", "ready"} <= {line["status"] for line in lines}
    assert lines[-1] == {"status": "success"}
    assert slot["state"] == "ready"


async def test_a_pull_that_is_not_streamed_answers_once() -> None:
    async with fake_server() as server:
        answer = await server.client.post("/api/pull", json={"name": "mini", "stream": False})
        slot = await server.slot()

    assert (answer.json(), slot["state"]) == ({"status": "success"}, "ready")


def test_a_pull_that_fails_ends_with_an_error(served: Served) -> None:
    served.backend.failures["mini"] = LoadFailed("the disk is full", kind="disk_full")
    streamed, whole = ask(served, "pull", model="mini"), ask(served, "pull", model="mini", stream=False)

    assert lines_of(streamed)[-1] == {"error": "the disk is full"}
    assert (whole.status_code, whole.json()) == (503, {"error": "the disk is full"})


@pytest.mark.parametrize(
    ("key", "route", "status"),
    [
        ("web", "pull", 403), ("ops", "pull", 200), (None, "pull", 401), ("web", "show", 200), (None, "show", 401),
        (None, "version", 401), (None, "tags", 401), ("web", "version", 200),
    ],
)  # fmt: skip
def test_only_operators_pull(tmp_path: Any, key: str | None, route: str, status: int) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {}, "ops": {"scopes": ["embed", "admin"]}})
    with limited(Settings(keys_file=keys)) as server:
        headers = bearer(key) if key else {}
        if route in ("pull", "show"):
            answer = server.client.post(f"/api/{route}", json={"model": "mini", "stream": False}, headers=headers)
        else:
            answer = server.client.get(f"/api/{route}", headers=headers)

    assert answer.status_code == status
    assert status == 200 or isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("accept", ["application/json", "text/plain", "text/plain, */*"])
def test_the_root_tells_ollamas_clients_that_the_server_runs(served: Served, accept: str) -> None:
    get, head = (served.client.request(method, "/", headers={"accept": accept}) for method in ("GET", "HEAD"))

    assert (get.status_code, get.text) == (200, "Ollama is running")
    assert get.headers["content-type"].startswith("text/plain")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("accept", ["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "*/*"])
def test_the_root_is_the_page_for_browsers_and_for_all_who_take_anything(served: Served, accept: str) -> None:
    answer = served.client.get("/", headers={"accept": accept})

    assert answer.headers["content-type"].startswith("text/html")


def test_the_root_is_the_page_where_ollamas_api_is_off() -> None:
    for off in serve(Settings(skins=())):
        assert off.client.get("/", headers=NO_PAGE).headers["content-type"].startswith("text/html")


# Requests of clients that are not Python packages, or whose packages are large, as these send them.


def test_a_request_of_ragflow(served: Served) -> None:
    """Its `OllamaEmbed` uses Ollama's client: `embeddings(prompt=, model=, options={"use_mmap": True},
    keep_alive=-1)`, one text at a time, and reads `embedding`."""
    answer = ask(
        served, "embeddings", model="mini", prompt="one", options={"use_mmap": True}, keep_alive=-1, stream=False
    )

    assert answer.json()["embedding"] == pytest.approx(vector("one"), rel=1e-6)


def test_a_request_of_semantic_kernel(served: Served) -> None:
    """Its `OllamaTextEmbedding` calls `embed(model=, input=[...], truncate=True)` without a key, and its .NET
    connector sends `keep_alive: null` and reads `embeddings`."""
    answer = ask(served, "embed", model="mini", input=["one", "three"], truncate=True, keep_alive=None, options=None)

    assert answer.json()["embeddings"] == [pytest.approx(vector(text), rel=1e-6) for text in ("one", "three")]
