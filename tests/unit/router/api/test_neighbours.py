"""Tests the words of TEI, Cohere, Infinity, Azure, OpenAI and vLLM beside their plain embedding routes."""

import json
from typing import Any

import numpy as np
import pytest

from engines.errors import PromptNotFound
from router.config.settings import Settings
from tests.testkit.backends import vector
from tests.testkit.contract import EMBED, assert_envelope
from tests.testkit.servers import Served, fake_server, limited

TWO = ["one", "three"]
ROWS = [pytest.approx(vector(text), rel=1e-6) for text in TWO]


def test_tei_takes_requests_at_the_root(served: Served) -> None:
    assert served.client.post("/", json={"inputs": TWO}).json() == ROWS
    assert_envelope(served.client.post("/", json={"inputs": []}), 400, "empty_input", "inputs")


@pytest.mark.parametrize(
    ("inputs", "rows"), [([7, 8, 9], ((7, 8, 9),)), ([[7, 8], [9]], ((7, 8), (9,))), ([[7] * 40_000], ((7,) * 40_000,))]
)
def test_tei_takes_token_ids(served: Served, inputs: list[Any], rows: tuple[tuple[int, ...], ...]) -> None:
    answer = served.client.post("/embed", json={"inputs": inputs})
    (call,) = served.backend.calls

    assert (call.texts, call.token_ids) == ((), rows)
    assert answer.json() == [pytest.approx(vector(row), rel=1e-6) for row in rows]


@pytest.mark.parametrize(
    ("inputs", "code"), [([7, "a"], "invalid_value"), ([[]], "empty_input"), ([2**64], "invalid_token_id")]
)
def test_tei_refuses_what_is_neither_texts_nor_ids(served: Served, inputs: list[Any], code: str) -> None:
    assert_envelope(served.client.post("/embed", json={"inputs": inputs}), 400, code, "inputs")


async def test_tei_lists_the_tokens_of_texts() -> None:
    async with fake_server() as server:
        both = await server.client.post("/tokenize", json={"inputs": ["a bcd", "x"]})
        bare = await server.client.post("/tokenize", json={"inputs": "a bcd", "add_special_tokens": False})
        prompted = await server.client.post(
            "/tokenize", json={"inputs": "é", "prompt_name": "query", "add_special_tokens": False}
        )

    first = {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None}
    words = [
        {"id": 1, "text": "a", "special": False, "start": 0, "stop": 1},
        {"id": 3, "text": "bcd", "special": False, "start": 2, "stop": 5},
    ]
    assert bare.json() == [words]
    assert both.json()[0][:3] == [first, *words]
    assert [token["text"] for token in both.json()[1]] == ["[CLS]", "x", "[SEP]"]
    assert [(token["text"], token["start"]) for token in prompted.json()[0]] == [("find:", 0), ("é", 6)]


async def test_tei_names_the_field_of_a_prompt_as_its_clients_do() -> None:
    async with fake_server() as server:
        answer = await server.client.post("/tokenize", json={"inputs": "a", "prompt_name": "poem"})

    assert_envelope(answer, 400, "prompt_not_found", "prompt_name")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"inputs": []}, 400, "empty_input", "inputs"),
        ({"inputs": ""}, 400, "empty_input", "inputs"),
        ({"inputs": ["a"] * 2049}, 400, "too_many_inputs", "inputs"),
        ({"inputs": [1]}, 400, "invalid_value", "inputs"),
        ({"inputs": "a", "prompt_name": "p" * 1025}, 400, "invalid_value", "prompt_name"),
        ({"inputs": "a", "model": "nothing"}, 404, "model_not_found", None),
        ({"input": "a"}, 400, "invalid_value", "inputs"),
    ],
)
def test_tei_tokenizes_no_bad_request(
    served: Served, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    assert_envelope(served.client.post("/tokenize", json=body), status, code, param)
    assert served.backend.tokenize_calls == []


def test_teis_info_has_every_field_that_its_clients_require(served: Served) -> None:
    info = served.client.get("/info").json()
    numbers = ["max_input_length", "max_batch_tokens", "max_concurrent_requests", "max_client_batch_size",
               "tokenization_workers"]  # fmt: skip

    assert {type(info[name]) for name in numbers} == {int}
    assert {"served_model_name", "max_batch_requests", "sha", "docker_label", "version", "auto_truncate"} <= info.keys()
    assert served.backend.tokenize_calls == []


async def test_teis_info_waits_for_a_model_that_was_never_in_memory() -> None:
    async with fake_server() as server:
        info = (await server.client.get("/info")).json()
        slot = await server.slot()

    assert (info["max_input_length"], slot["state"]) == (5, "ready")


def test_cohere_v1_answers_with_a_list_of_vectors(served: Served) -> None:
    answer = served.client.post("/v1/embed", json={"texts": TWO}).json()

    assert answer["embeddings"] == ROWS
    assert (answer["response_type"], answer["texts"]) == ("embeddings_floats", TWO)
    assert answer["meta"] == {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 8}}


def test_cohere_v1_answers_by_type_when_types_are_named(served: Served) -> None:
    answer = served.client.post("/v1/embed", json={"texts": TWO, "embedding_types": ["float", "ubinary"]}).json()

    assert answer["embeddings"]["float"] == ROWS
    assert answer["embeddings"]["ubinary"] == np.packbits(np.array([vector(text) for text in TWO]) > 0, -1).tolist()
    assert answer["response_type"] == "embeddings_by_type"


def as_inputs(*texts: str) -> list[dict[str, Any]]:
    return [{"content": [{"type": "text", "text": text}]} for text in texts]


@pytest.mark.parametrize("filler", ["", "x" * 2**17], ids=["small", "decoded in stages"])
def test_cohere_takes_inputs_instead_of_texts(served: Served, filler: str) -> None:
    body = {"model": "mini", "inputs": as_inputs(*TWO), "user_data": filler}
    answer = served.client.post("/v2/embed", json=body).json()

    assert (answer["embeddings"]["float"], answer["texts"]) == (ROWS, TWO)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "texts", "texts is required"),
        ({"inputs": [], }, "inputs", "input is empty"),
        ({"inputs": as_inputs("a", "")}, "inputs", "inputs[1] is empty"),
        ({"inputs": as_inputs("a"), "texts": ["a"]}, "inputs", "send one of them"),
        ({"inputs": [{"content": []}]}, "inputs", "inputs[0].content must have at least 1 item"),
        ({"inputs": [{"content": 2 * [{"type": "text", "text": "a"}]}]}, "inputs", "must have at most 1 item"),
        ({"inputs": [{"content": [{"type": "image_url", "text": "a"}]}]}, "inputs", "'image_url': use text"),
    ],
)  # fmt: skip
def test_cohere_refuses(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    answer = served.client.post("/v2/embed", json={"model": "mini", **fields})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("task", ["classification", "clustering"])
async def test_coheres_tasks_need_no_prompt(task: str) -> None:
    async with fake_server() as server:
        body = {"texts": ["a"], "model": "mini", "input_type": task}
        answer = await server.client.post("/v2/embed", json=body)
        plain = await server.client.post("/v2/embed", json={"texts": ["a"], "model": "mini"})
        poem = await server.client.post("/v2/embed", json=body | {"input_type": "poem"})

    assert answer.json()["embeddings"] == plain.json()["embeddings"]
    assert_envelope(poem, 400, "prompt_not_found", "input_type")


async def test_a_prompt_that_the_model_has_for_a_task_of_coheres_is_used() -> None:
    async with fake_server() as server:
        body = {"texts": ["a"], "model": "mini"}
        query = await server.client.post("/v2/embed", json=body | {"input_type": "query"})
        plain = await server.client.post("/v2/embed", json=body)

    assert query.json()["embeddings"] != plain.json()["embeddings"]


def test_a_limit_of_tokens_is_charged_once_for_a_task_without_a_prompt() -> None:
    with limited(Settings(rate_limit_tokens=100)) as server:
        failures = iter([PromptNotFound("no such prompt", param="input_type")])
        run = server.backend.run

        async def refuse_first(call: Any) -> Any:
            for failure in failures:
                raise failure
            return await run(call)

        server.backend.run = refuse_first  # type: ignore[method-assign]  # a backend whose first call has no prompt
        body = {"texts": TWO, "model": "mini", "input_type": "clustering"}
        answer = server.client.post("/v2/embed", json=body)

    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100 - sum(map(len, TWO)))


def test_infinity_and_base_urls_without_v1_are_openais_api(served: Served) -> None:
    body = {"input": TWO, "model": "BAAI/bge-m3"}
    answer, ours = served.client.post("/embeddings", json=body), served.client.post(EMBED, json=body)

    assert answer.content == ours.content
    infinitys, openais = served.client.get("/models").json()["data"], served.client.get("/v1/models").json()["data"]
    stats = {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": 0, "batch_size": 512}
    more = {"owned_by": "infinity", "stats": stats, "backend": "torch"}
    assert infinitys == [model | more | {"capabilities": [model["task"]] if model["task"] else []} for model in openais]
    assert served.client.get("/models/BAAI/bge-m3").json() == served.client.get("/v1/models/BAAI/bge-m3").json()
    assert_envelope(served.client.get("/models/no/thing"), 404, "model_not_found", None)


def test_the_defaults_of_infinitys_client_mean_that_nothing_is_given(served: Served) -> None:
    body = {"input": TWO, "model": "default/not-specified", "dimensions": 0, "modality": "text"}
    answer = served.client.post("/embeddings", json=body)

    assert (answer.status_code, answer.json()["model"]) == (200, "mini")
    assert_envelope(
        served.client.post("/embeddings", json=body | {"dimensions": -1}), 400, "invalid_value", "dimensions"
    )
    assert_envelope(served.client.post(EMBED, json={"input": "a", "dimensions": 0}), 400, "invalid_value", "dimensions")


def test_a_deployment_of_azure_is_a_model(served: Served) -> None:
    path = "/openai/deployments/BAAI/bge-m3/embeddings?api-version=2024-10-21"
    answer = served.client.post(path, json={"input": TWO, "model": "text-embedding-3-large"})

    assert answer.json()["model"] == "BAAI/bge-m3"
    unknown = served.client.post("/openai/deployments/no/thing/embeddings", json={"input": "a"})
    assert_envelope(unknown, 404, "model_not_found", None)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"api-key": "k"}, 200), ({"api-key": "wrong"}, 401), ({"api-key": ""}, 401), ({}, 401),
        ({"api-key": "wrong", "authorization": "Bearer k"}, 200), ({"api-key": "k", "authorization": "Bearer x"}, 401),
    ],
)  # fmt: skip
def test_a_key_may_be_in_azures_header(headers: dict[str, str], status: int) -> None:
    with limited(Settings(api_key="k")) as server:
        path = "/openai/deployments/mini/embeddings"
        statuses = [server.client.post(path, json={"input": "a"}, headers=headers).status_code]
        statuses.append(server.client.get("/admin/models", headers=headers).status_code)

    assert statuses == [status] * 2


def test_openais_headers_are_there_and_its_clients_own_are_no_trouble(served: Served) -> None:
    headers = {"openai-organization": "org-1", "openai-project": "proj-1", "openai-beta": "x=y"}
    answer = served.client.post(EMBED, json={"input": "a"}, headers=headers)

    assert answer.status_code == 200
    assert (answer.headers["openai-processing-ms"], answer.headers["openai-version"]) == ("532", "2020-10-01")


@pytest.mark.parametrize(
    ("fields", "max_tokens", "truncate"),
    [
        ({"truncate_prompt_tokens": 5}, 5, "end"),
        ({"truncate_prompt_tokens": 5, "truncate": "start"}, 5, "start"),
        ({"truncate_prompt_tokens": 5, "truncate": "error"}, 5, "error"),
        ({"truncate_prompt_tokens": -1}, None, "end"),
        ({"truncate_prompt_tokens": None}, None, None),
        ({}, None, None),
    ],
)
def test_vllms_limit_of_tokens_means(
    served: Served, fields: dict[str, Any], max_tokens: int | None, truncate: str | None
) -> None:
    served.client.post(EMBED, json={"input": "a", **fields})
    (call,) = served.backend.calls

    assert (call.max_tokens, call.truncate) == (max_tokens, truncate)


@pytest.mark.parametrize("limit", [-2, 2**31, 1.5, "5", True])
def test_vllms_limit_of_tokens_is_a_number(served: Served, limit: object) -> None:
    answer = served.client.post(EMBED, json={"input": "a", "truncate_prompt_tokens": limit})

    assert_envelope(answer, 400, "invalid_value", "truncate_prompt_tokens")


LONG = "y" * 2**17


@pytest.mark.parametrize(
    ("path", "body", "field", "given"),
    [
        (EMBED, {"inputs": "a"}, "input", "inputs"),
        (EMBED, {"inptu": "a", "model": "mini"}, "input", "inptu"),
        (EMBED, {"texts": ["a"]}, "input", "texts"),
        (EMBED, {"model": "mini", "inputs": [LONG], "encoding_format": "float"}, "input", "inputs"),
        (EMBED, {"model": "mini", "prompt": LONG, "prompts": "x"}, "input", ""),
        (EMBED, {"model": "mini", "user": '"inputs": 5'}, "input", ""),
        (EMBED, {}, "input", ""),
        ("/embed", {"input": "a"}, "inputs", "input"),
        ("/v2/embed", {"texts": ["a"], "modle": "mini"}, "model", "modle"),
        ("/v1/rerank", {"qurey": "a", "documents": ["a"]}, "query", "qurey"),
    ],
)
def test_a_misspelt_field_is_told_how_it_is_spelt(
    served: Served, path: str, body: dict[str, Any], field: str, given: str
) -> None:
    answer = served.client.post(path, json=body)
    hint = f", and {given} is no field of this route: did you mean `{field}`?" if given else ""

    assert_envelope(answer, 400, "invalid_value", field)
    assert answer.json()["error"]["message"] == f"{field} is required{hint}"


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (EMBED, {"encoding_format": "hex"}, "encoding_format is 'hex': use float or base64"),
        (EMBED, {"truncate": "middle"}, "truncate is 'middle': use end, start or error"),
        (EMBED, {"truncate": "m" * 10**5}, f"truncate is '{'m' * 50}': use end, start or error"),
        ("/v2/embed", {"texts": ["a"], "model": "mini", "embedding_types": ["float", "int4"]},
         "embedding_types[1] is 'int4': use float, int8, uint8, binary, ubinary or base64"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"},
         "truncation_direction is 'up': use left, right, Left or Right"),
    ],
)  # fmt: skip
def test_a_word_that_is_not_allowed_is_answered_with_those_that_are(
    served: Served, path: str, fields: dict[str, Any], message: str
) -> None:
    answer = served.client.post(path, json={"input": "a", **fields})

    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def test_the_names_of_fields_are_read_at_both_ends_of_a_body_only(served: Served) -> None:
    """A hint must cost as little for the largest body as for the smallest."""
    filler = {f"f{index}": 0 for index in range(20_000)}
    body = json.dumps({**filler, "inputs": "a", **{f"g{index}": 0 for index in range(20_000)}})
    answer = served.client.post(EMBED, content=body, headers={"content-type": "application/json"})

    assert answer.json()["error"]["message"] == "input is required"
