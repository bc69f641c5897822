"""Tests `POST /v1/embeddings` over real sockets: answers, access, and clients that disconnect."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from litestar import Litestar
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from engines import errors as engine
from tests.testkit.backends import WIDTH, ScriptedBackend, vector
from tests.testkit.contract import assert_envelope
from tests.testkit.servers import Served, serving

EMBED = "/v1/embeddings"


@pytest.fixture
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def as_float32(numbers: list[float]) -> list[float]:
    """Round numbers to float32, as a client does that stores vectors so; the result is exactly what was sent."""
    return [float(component) for component in np.array(numbers, np.float32)]


def test_the_answer_is_openais(served: Served) -> None:
    answer = served.client.post(EMBED, json={"input": ["one", "three"], "model": "mini"})

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": pytest.approx(vector("one"), rel=1e-6)},
            {"object": "embedding", "index": 1, "embedding": pytest.approx(vector("three"), rel=1e-6)},
        ],
        "model": "mini",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("one", ["one"]),
        (["one", "two", "three"], ["one", "two", "three"]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["a"] * 2048, ["a"] * 2048),
        (" ", [" "]),
        ("\x00 😀 中文", ["\x00 😀 中文"]),
    ],
    ids=["text", "texts", "ids", "lists of ids", "as many as allowed", "a space", "any character"],
)
def test_every_form_of_input_is_understood(served: Served, given: object, items: list[str | tuple[int, ...]]) -> None:
    answer = served.client.post(EMBED, json={"input": given}).json()
    (call,) = served.backend.calls

    assert [*call.texts, *call.token_ids] == items
    assert [item["index"] for item in answer["data"]] == list(range(len(items)))
    assert as_float32(answer["data"][-1]["embedding"]) == vector(items[-1])


def test_base64_holds_the_float32_bytes(served: Served) -> None:
    answer = served.client.post(EMBED, json={"input": "one", "encoding_format": "base64"}).json()
    raw = base64.b64decode(answer["data"][0]["embedding"])

    assert np.frombuffer(raw, "<f4").tolist() == vector("one")


def test_every_field_reaches_the_engine(served: Served) -> None:
    body = {
        "input": "a", "model": "BAAI/bge-m3", "dimensions": 4, "user": "u", "input_type": "query",
        "instruction": "find", "truncate": "start", "normalize": False, "keep_alive": "10m", "unknown": {"field": 1},
    }  # fmt: skip
    served.client.post(EMBED, json=body).raise_for_status()
    (call,) = served.backend.calls

    assert (call.model_id, call.texts, call.dimensions) == ("BAAI/bge-m3", ("a",), 4)
    assert (call.input_type, call.instruction, call.prompt) == ("query", "find", None)
    assert (call.truncate, call.normalize, call.keep_alive_s) == ("start", False, 600.0)
    assert call.load_timeout_s == 300.0


def test_what_is_not_given_is_the_models_to_decide(served: Served) -> None:
    nothing = dict.fromkeys(("dimensions", "input_type", "prompt", "truncate", "normalize", "keep_alive", "model"))
    for body in ({"input": "a"}, {"input": "a", **nothing, "encoding_format": None, "output_dtype": None}):
        served.client.post(EMBED, json=body).raise_for_status()
    first, second = served.backend.calls

    assert first == second
    assert {getattr(first, name) for name in ("dimensions", "truncate", "normalize", "keep_alive_s")} == {None}


@pytest.mark.parametrize(("given", "seconds"), [(0, 0.0), (-1, -1.0), (1.5, 1.5), ("1h30m", 5400.0), ("90", 90.0)])
def test_keep_alive_is_seconds_or_a_duration(served: Served, given: object, seconds: float) -> None:
    served.client.post(EMBED, json={"input": "a", "keep_alive": given}).raise_for_status()

    assert served.backend.calls[0].keep_alive_s == seconds


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (None, "mini"),
        ("text-embedding-3-small", "mini"),
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("org/deep/alias", "BAAI/bge-m3"),
    ],
)
def test_the_answer_names_the_model_that_computed_it(served: Served, asked: str | None, answered: str) -> None:
    answer = served.client.post(EMBED, json={"input": "a", **({"model": asked} if asked else {})}).json()

    assert answer["model"] == answered
    assert served.backend.calls[0].model_id == answered


@pytest.mark.parametrize(("dtype", "width"), [("int8", WIDTH), ("uint8", WIDTH), ("binary", 1), ("ubinary", 1)])
def test_quantised_vectors_are_whole_numbers_or_their_bytes(served: Served, dtype: str, width: int) -> None:
    body = {"input": ["one", "two"], "output_dtype": dtype}
    numbers = served.client.post(EMBED, json=body).json()["data"]
    encoded = served.client.post(EMBED, json=body | {"encoding_format": "base64"}).json()["data"]
    kind = np.uint8 if dtype.startswith("u") else np.int8

    for number, code in zip(numbers, encoded, strict=True):
        assert len(number["embedding"]) == width
        assert all(type(component) is int for component in number["embedding"])
        assert np.frombuffer(base64.b64decode(code["embedding"]), kind).tolist() == number["embedding"]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_of_a_calibrated_model_mean_the_same_in_every_request(served: Served, dtype: str) -> None:
    body = {"model": "BAAI/bge-m3", "output_dtype": dtype}
    alone = served.client.post(EMBED, json=body | {"input": "two"}).json()["data"]
    among = served.client.post(EMBED, json=body | {"input": ["one", "two", "three"]}).json()["data"]
    own_ranges = served.client.post(EMBED, json=body | {"model": "mini", "input": ["one", "two"]}).json()["data"]

    assert alone[0]["embedding"] == among[1]["embedding"] != own_ranges[1]["embedding"]
    zero = 0 if dtype == "int8" else 128
    assert [code >= zero for code in alone[0]["embedding"]] == [component >= 0 for component in vector("two")]


@pytest.mark.parametrize(
    ("fields", "words", "is_work_done"),
    [
        ({"normalize": False}, "made with normalize=true", False),
        ({"dimensions": 4}, "calibration of this model has 8 components, the vectors have 4", True),
    ],
)
def test_a_calibration_is_of_one_kind_of_vectors(
    served: Served, fields: dict[str, object], words: str, is_work_done: bool
) -> None:
    body = {"model": "BAAI/bge-m3", "input": ["a", "b"], "output_dtype": "int8", **fields}
    answer = served.client.post(EMBED, json=body)

    assert_envelope(answer, 400, "invalid_value", "output_dtype")
    assert words in answer.json()["error"]["message"]
    assert bool(served.backend.calls) == is_work_done


def test_headers_say_where_the_time_went_and_what_was_cut(served: Served) -> None:
    plain = served.client.post(EMBED, json={"input": "a"})
    served.backend.truncated = (0, 3)
    with capture_logs() as lines:
        cut = served.client.post(EMBED, json={"input": ["a", "b", "c", "d"]})

    assert plain.headers["server-timing"] == "load;dur=500.0, tokenize;dur=1.2, queue;dur=0.0, forward;dur=30.5"
    assert "x-embed-truncated" not in plain.headers
    assert cut.headers["x-embed-truncated"] == "0,3"
    assert [line for line in lines if line["event"] == "inputs.truncated"] == [
        {"event": "inputs.truncated", "inputs": 4, "truncated": 2, "log_level": "warning"}
    ]


def test_a_request_id_is_kept_when_sane_and_made_when_not(served: Served) -> None:
    kept = served.client.post(EMBED, json={"input": "a"}, headers={"x-request-id": "trace-1:2/3"})
    odd = served.client.post(EMBED, json={"input": "a"}, headers={"x-request-id": 'a"b c'})
    made = served.client.get("/nowhere")

    assert kept.headers.get_list("x-request-id") == ["trace-1:2/3"]
    assert len(odd.headers["x-request-id"]) == 32
    assert len(made.headers["x-request-id"]) == 32


def test_one_log_line_a_request_without_texts_or_keys(served: Served) -> None:
    headers = {"authorization": "Bearer hunter2", "x-request-id": "r-7"}
    with capture_logs(processors=[merge_contextvars]) as lines:
        served.client.post(EMBED, json={"input": "my diary", "model": "BAAI/bge-m3", "user": "me"}, headers=headers)
        served.client.get("/v1/models/BAAI/bge-m3", headers=headers)
        served.client.get("/health", headers=headers)
        while len(own := [line for line in lines if line["request_id"] == "r-7"]) < 3:
            time.sleep(0.002)  # the log line is written after the answer
    embed, model, health = own

    assert embed.pop("ms") >= 0
    assert embed.pop("auth_ms") >= 0
    assert embed.pop("encode_ms") >= 0
    assert embed == {
        "event": "request.done", "log_level": "info", "request_id": "r-7", "method": "POST", "route": EMBED,
        "model": "BAAI/bge-m3", "status": 200, "texts": 1, "tokens": 8,
        "lease_ms": 500.0, "tokenize_ms": 1.2, "queue_ms": 0.0, "forward_ms": 30.5,
    }  # fmt: skip
    assert model["route"] == "/v1/models/{model_id}"
    assert health["log_level"] == "debug"
    assert "diary" not in str(lines)
    assert "hunter2" not in str(lines)


def test_a_large_answer_is_whole(served: Served) -> None:
    answer = served.client.post(EMBED, json={"input": [str(i) for i in range(2048)], "dimensions": 128}).json()

    assert [item["index"] for item in answer["data"]] == list(range(2048))
    assert as_float32(answer["data"][2047]["embedding"]) == vector("2047", 128)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_the_openai_client_reads_every_encoding(sdk: openai.OpenAI, encoding: str | None) -> None:
    chosen = {"encoding_format": encoding} if encoding else {}
    answer = sdk.embeddings.create(model="text-embedding-3-small", input=["one", "two"], **chosen)  # type: ignore[arg-type]  # the table's str is one of its literals
    got = answer.data[1].embedding
    if encoding == "base64":
        got = np.frombuffer(base64.b64decode(str(got)), "<f4").tolist()

    assert as_float32(got) == vector("two")
    assert answer.usage.prompt_tokens == 6
    assert answer.model == "mini"


def test_the_openai_client_sends_token_ids_and_dimensions(sdk: openai.OpenAI, served: Served) -> None:
    answer = sdk.embeddings.create(model="mini", input=[[1, 2], [3]], dimensions=4, user="u")

    assert len(answer.data[0].embedding) == 4
    assert served.backend.calls[0].token_ids == ((1, 2), (3,))


SDK_ERRORS: list[tuple[Exception, type[openai.APIStatusError]]] = [
    (engine.DimensionsNotSupported("x", param="dimensions"), openai.BadRequestError),
    (engine.ModelNotFound("x"), openai.NotFoundError),
    (engine.QueueFull("x"), openai.RateLimitError),
    (engine.ModelLoading("x"), openai.InternalServerError),
    (engine.ModelTooLarge("x"), openai.InternalServerError),
    (RuntimeError("x"), openai.InternalServerError),
]


@pytest.mark.parametrize(("failure", "raised"), SDK_ERRORS, ids=[type(row[0]).__name__ for row in SDK_ERRORS])
def test_failures_are_the_openai_clients_own_errors(
    sdk: openai.OpenAI, served: Served, failure: Exception, raised: type[openai.APIStatusError]
) -> None:
    served.backend.failures["mini"] = failure
    with pytest.raises(raised) as caught:
        sdk.embeddings.create(model="mini", input="a")

    assert caught.value.code
    assert caught.value.type
    assert caught.value.param == getattr(failure, "param", None)
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [(engine.ModelLoading("x", retry_after_s=0.01), 3), (engine.ModelTooLarge("x"), 1), (engine.InvalidValue("x"), 1)],
    ids=["may help", "cannot help", "bad request"],
)
def test_the_openai_client_retries_only_where_it_helps(served: Served, failure: Exception, attempts: int) -> None:
    served.backend.failures["mini"] = failure
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=2) as client,
        pytest.raises(openai.APIStatusError),
    ):
        client.embeddings.create(model="mini", input="a")

    assert len(served.backend.calls) == attempts


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true; the timeout of the test suite is the limit."""
    while not condition():  # noqa: ASYNC110 - what is waited for happens inside the server and has no event
        await asyncio.sleep(0.005)


def send_raw(url: str, body: bytes, length: int) -> socket.socket:
    """Open a connection, send a request, and read nothing."""
    address = urlsplit(url)
    head = f"POST {EMBED} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    connection = socket.create_connection((str(address.hostname), int(address.port or 0)))
    connection.sendall(head.encode() + body)
    return connection


async def test_a_client_that_leaves_is_not_worked_for(app: Litestar, backend: ScriptedBackend) -> None:
    backend.gates["cold"] = asyncio.Event()
    body = json.dumps({"input": "a", "model": "cold"}).encode()
    with capture_logs() as lines:
        async with serving(app) as url:
            connection = await asyncio.to_thread(send_raw, url, body, len(body))
            await eventually(lambda: len(backend.calls) == 1)
            connection.close()
            await eventually(lambda: backend.cancelled == ["cold"])
            await eventually(lambda: any(line["event"] == "request.done" for line in lines))

    assert [line["status"] for line in lines if line["event"] == "request.done"] == [499]
    assert all(line["event"] != "request.crashed" for line in lines)


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_crash(
    app: Litestar, backend: ScriptedBackend
) -> None:
    with capture_logs() as lines:
        async with serving(app) as url:
            connection = await asyncio.to_thread(send_raw, url, b'{"input":', 100)
            await asyncio.sleep(0.05)
            connection.close()
            await eventually(lambda: any(line["event"] == "request.done" for line in lines))

    assert [(line["event"], line["status"]) for line in lines] == [("request.done", 499)]
    assert backend.calls == []


async def test_a_client_that_stays_gets_its_answer_after_the_watch_began(
    app: Litestar, backend: ScriptedBackend
) -> None:
    gate = backend.gates["cold"] = asyncio.Event()
    asyncio.get_running_loop().call_later(0.4, gate.set)
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        first = await client.post(EMBED, json={"input": "a", "model": "cold"})
        second = await client.post(EMBED, json={"input": "a", "model": "cold"})

    assert (first.status_code, second.status_code) == (200, 200)
    assert backend.cancelled == []


async def test_a_time_out_of_the_backend_is_not_taken_for_a_client_that_left(
    app: Litestar, backend: ScriptedBackend
) -> None:
    backend.failures["mini"] = TimeoutError("inside")
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(EMBED, json={"input": "a"})

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"


async def test_requests_are_served_side_by_side(app: Litestar, backend: ScriptedBackend) -> None:
    gate = backend.gates["cold"] = asyncio.Event()
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        waiting = asyncio.create_task(client.post(EMBED, json={"input": "a", "model": "cold"}))
        await eventually(lambda: len(backend.calls) == 1)
        warm = await client.post(EMBED, json={"input": "a", "model": "mini"})
        was_done = waiting.done()
        gate.set()
        cold = await waiting

    assert warm.status_code == 200
    assert not was_done
    assert cold.status_code == 200
