"""Tests `x-embedding-space`, `expect_space` and the spaces of `/v1/models`, on every route that embeds."""

from typing import Any

import httpx
import pytest
from msgspec import structs

from engines.errors import SpaceMismatch
from engines.testing.engine import WIDTH
from engines.testing.spaces import fake_space
from router.config.settings import Settings
from tests.testkit.contract import EMBED, assert_envelope
from tests.testkit.output_servers import OUTPUTS, output_server
from tests.testkit.servers import FAKE_REGISTRY, Served, bearer, fake_server, limited, serving, write_keys

HEADER = "x-embedding-space"
MODEL = next(iter(FAKE_REGISTRY.models))
SPEC = FAKE_REGISTRY.models[MODEL]
PROMPT = SPEC.prompts["query"]
PLAIN = fake_space(SPEC, width=WIDTH, native_width=WIDTH)
QUERY = fake_space(SPEC, width=WIDTH, native_width=WIDTH, before=PROMPT)

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenAI": (EMBED, {"model": MODEL, "input": "a"}),
    "TEI": ("/embed", {"model": MODEL, "inputs": "a"}),
    "TEI at the root": ("/", {"model": MODEL, "inputs": "a"}),
    "Ollama": ("/api/embed", {"model": MODEL, "input": "a"}),
    "Ollama, older": ("/api/embeddings", {"model": MODEL, "prompt": "a"}),
    "Cohere": ("/v2/embed", {"model": MODEL, "texts": ["a"]}),
    "Cohere, older": ("/v1/embed", {"model": MODEL, "texts": ["a"]}),
    "Infinity": ("/embeddings", {"model": MODEL, "input": "a"}),
    "Azure": (f"/openai/deployments/{MODEL}/embeddings", {"input": "a"}),
    "the path": (f"/m/{MODEL}/v1/embeddings", {"input": "a"}),
}


@pytest.mark.parametrize(("path", "body"), ROUTES.values(), ids=ROUTES)
async def test_every_route_that_embeds_says_the_space_and_obeys_the_header(path: str, body: dict[str, Any]) -> None:
    async with fake_server() as server:
        answer = await server.client.post(path, json=body)
        same = await server.client.post(path, json=body, headers={"x-expect-space": PLAIN})
        other = await server.client.post(path, json=body, headers={"X-Expect-Space": QUERY})

    assert (answer.status_code, answer.headers[HEADER]) == (200, PLAIN)
    assert (same.status_code, same.headers[HEADER]) == (200, PLAIN)
    assert (other.status_code, other.headers["x-should-retry"], HEADER in other.headers) == (409, "false", False)
    assert QUERY in other.text
    assert PLAIN in other.text


async def test_the_space_is_that_of_the_prompt_and_the_width() -> None:
    async with fake_server() as server:
        prompted = await server.client.post(EMBED, json={"model": MODEL, "input": "a", "input_type": "query"})
        listed = (await server.client.get(f"/v1/models/{MODEL}")).json()["space"]

    assert prompted.headers[HEADER] == QUERY
    assert (listed[""][str(WIDTH)], listed["query"][str(WIDTH)]) == (PLAIN, QUERY)


async def test_spaces_are_null_until_the_model_is_loaded() -> None:
    async with fake_server() as server:
        before = (await server.client.get(f"/v1/models/{MODEL}")).json()["space"]
        await server.client.post(EMBED, json={"model": MODEL, "input": "a"})
        after = (await server.client.get("/v1/models")).json()["data"]

    assert before is None
    assert {model["id"]: model["space"] is None for model in after} == {
        name: name != MODEL for name in FAKE_REGISTRY.models
    }


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("name", ["bge-m3", "splade", "colbert"])
async def test_the_spaces_of_every_output_are_listed(name: str, side: str) -> None:
    async with output_server() as server:
        model = f"/v1/models/{name}"
        before = (await server.client.get(model)).json()["output_spaces"]
        body = {"model": name, "input": "a", "input_type": side}
        await server.client.post(EMBED, json=body)
        listed = (await server.client.get(model)).json()["output_spaces"]
        answers = {key: await server.client.post(EMBED, json={**body, "outputs": key.split("+")}) for key in listed}

    assert before is None
    assert {key for key in listed if "+" not in key} == {*OUTPUTS[name]} - {"dense"}
    assert {key: answer.headers[HEADER] for key, answer in answers.items()} == {
        key: prompts[""][side] for key, prompts in listed.items()
    }


async def test_a_request_for_another_output_obeys_the_expected_space() -> None:
    async with output_server() as server:
        body = {"model": "bge-m3", "input": "a", "outputs": ["sparse"]}
        await server.client.post(EMBED, json=body)
        listed = (await server.client.get("/v1/models/bge-m3")).json()["output_spaces"]
        right = await server.client.post(EMBED, json=body | {"expect_space": listed["sparse"][""]["document"]})
        wrong = await server.client.post(EMBED, json=body | {"expect_space": listed["sparse"][""]["query"]})

    assert (right.status_code, wrong.status_code) == (200, 409)


async def test_a_field_comes_before_the_header_and_is_refused_with_its_name() -> None:
    async with fake_server() as server:
        body = {"model": MODEL, "input": "a", "expect_space": PLAIN}
        right = await server.client.post(EMBED, json=body, headers={"x-expect-space": QUERY})
        wrong = await server.client.post(EMBED, json=body | {"input_type": "query"})
        null = await server.client.post(EMBED, json=body | {"expect_space": None})

    assert (right.status_code, null.status_code) == (200, 200)
    error = wrong.json()["error"]
    assert (wrong.status_code, error["type"], error["code"], error["param"]) == (
        409, "conflict_error", "space_mismatch", "expect_space",
    )  # fmt: skip


@pytest.mark.parametrize("length", [65, 5000])
def test_a_space_that_is_too_long_is_refused_before_any_work(served: Served, length: int) -> None:
    field = served.client.post(EMBED, json={"input": "a", "expect_space": "s" * length})
    header = served.client.post(EMBED, json={"input": "a"}, headers={"x-expect-space": "s" * length})

    assert_envelope(field, 400, "invalid_value", "expect_space")
    assert_envelope(header, 400, "invalid_value", "x-expect-space")
    assert served.backend.calls == []


def test_an_answer_without_a_space_has_no_header(served: Served) -> None:
    answer = served.client.post(EMBED, json={"input": "a", "expect_space": "s1-x"})

    assert (answer.status_code, HEADER in answer.headers) == (200, False)
    assert [call.expect_space for call in served.backend.calls] == ["s1-x"]


@pytest.mark.parametrize(("key", "named"), [("all", True), ("mini", False)])
def test_a_model_that_the_key_may_not_use_is_not_named(key: str, named: bool, tmp_path: Any) -> None:  # a parameter
    path = write_keys(tmp_path / "keys.yaml", {"all": {}, "mini": {"models": ["mini"]}})
    with limited(Settings(keys_file=path)) as server:
        server.backend.failures["mini"] = SpaceMismatch("no: that space is BAAI/bge-m3", other_model="BAAI/bge-m3")
        answer = server.client.post(EMBED, json={"model": "mini", "input": "a"}, headers=bearer(key))

    message = answer.json()["error"]["message"]
    assert message == ("no: that space is BAAI/bge-m3" if named else "no: that space is another model's")


async def test_browsers_may_read_the_header(app: Any) -> None:
    from router.app import create_app
    from tests.testkit.backends import ScriptedBackend
    from tests.testkit.servers import REGISTRY

    settings = structs.replace(Settings(), cors_origins=("https://a.example",))
    async with serving(create_app(settings, REGISTRY, ScriptedBackend("mini"))) as url, httpx.AsyncClient() as client:
        answer = await client.post(url + EMBED, json={"input": "a"}, headers={"origin": "https://a.example"})

    assert HEADER in answer.headers["access-control-expose-headers"]
