"""Every failure has the contract's status, type, code and param, and tells neither paths nor traces."""

from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from engines import errors as engine
from router.errors import TABLE, ClientLeft, classify
from tests.router.conftest import MAX_BODY_BYTES, Served

INVALID = "invalid_request_error"
CODES = {
    400: {
        "invalid_json", "invalid_value", "empty_input", "too_many_inputs", "context_length_exceeded",
        "dimensions_not_supported", "prompt_not_found", "invalid_token_id",
    },
    401: {"invalid_api_key"},
    403: {"insufficient_scope", "model_not_allowed"},
    404: {"model_not_found", "not_found"},
    405: {"method_not_allowed"},
    409: {"model_in_use", "model_pinned"},
    413: {"body_too_large"},
    429: {"rate_limit_exceeded", "queue_full", "too_many_requests"},
    500: {"internal_error", "non_finite_embedding", "model_too_large"},
    503: {"model_loading", "model_load_failed", "shutting_down", "out_of_memory", "device_down", "host_lost"},
}  # fmt: skip
"""The contract's codes by status."""
TYPES = {
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

EMBED = "/v1/embeddings"
BAD_BODIES: list[tuple[str, Any, int, str, str | None]] = [
    ("truncated JSON", b'{"input": "a"', 400, "invalid_json", None),
    ("no JSON at all", b"hello", 400, "invalid_json", None),
    ("an empty body", b"", 400, "invalid_json", None),
    ("bytes that are not UTF-8", b'{"input": "\xff"}', 400, "invalid_json", None),
    ("half a surrogate pair", b'{"input": "\\ud800"}', 400, "invalid_json", None),
    ("something after the JSON", b'{"input": "a"} b', 400, "invalid_json", None),
    ("NaN", b'{"input": "a", "keep_alive": NaN}', 400, "invalid_json", None),
    ("a byte order mark", b'\xef\xbb\xbf{"input": "a"}', 400, "invalid_json", None),
    ("brackets without end", b'{"extra":' + b"[" * 100_000, 400, "invalid_json", None),
    ("deep nesting", b'{"extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json", None),
    ("an array", [1], 400, "invalid_value", None),
    ("null", b"null", 400, "invalid_value", None),
    ("no input", {"model": "mini"}, 400, "invalid_value", "input"),
    ("null as input", {"input": None}, 400, "invalid_value", "input"),
    ("a number as input", {"input": 5}, 400, "invalid_value", "input"),
    ("an object as input", {"input": {"text": "a"}}, 400, "invalid_value", "input"),
    ("an empty list", {"input": []}, 400, "empty_input", "input"),
    ("an empty text", {"input": ""}, 400, "empty_input", "input"),
    ("an empty text among others", {"input": ["a", ""]}, 400, "empty_input", "input"),
    ("empty token ids", {"input": [[]]}, 400, "empty_input", "input"),
    ("empty token ids among others", {"input": [[1], []]}, 400, "empty_input", "input"),
    ("2,049 texts", {"input": ["a"] * 2049}, 400, "too_many_inputs", "input"),
    ("2,049 lists of ids", {"input": [[1]] * 2049}, 400, "too_many_inputs", "input"),
    ("texts and ids", {"input": ["a", 1]}, 400, "invalid_value", "input"),
    ("ids and lists of ids", {"input": [1, [2]]}, 400, "invalid_value", "input"),
    ("texts and lists of ids", {"input": ["a", [1]]}, 400, "invalid_value", "input"),
    ("lists of texts", {"input": [["a"]]}, 400, "invalid_value", "input"),
    ("fractions as ids", {"input": [1.5]}, 400, "invalid_value", "input"),
    ("truth as an id", {"input": [True]}, 400, "invalid_value", "input"),
    ("null among texts", {"input": ["a", None]}, 400, "invalid_value", "input"),
    ("an object among texts", {"input": [{"text": "a"}]}, 400, "invalid_value", "input"),
    ("dimensions as text", {"input": "a", "dimensions": "256"}, 400, "invalid_value", "dimensions"),
    ("no dimensions", {"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
    ("negative dimensions", {"input": "a", "dimensions": -4}, 400, "invalid_value", "dimensions"),
    ("half a dimension", {"input": "a", "dimensions": 1.5}, 400, "invalid_value", "dimensions"),
    ("a truth of dimensions", {"input": "a", "dimensions": True}, 400, "invalid_value", "dimensions"),
    ("an unknown encoding", {"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
    ("a number as encoding", {"input": "a", "encoding_format": 5}, 400, "invalid_value", "encoding_format"),
    ("a number as model", {"input": "a", "model": 5}, 400, "invalid_value", "model"),
    ("an unknown model", {"input": "a", "model": "gpt-4"}, 404, "model_not_found", None),
    ("an empty model", {"input": "a", "model": ""}, 404, "model_not_found", None),
    ("a path as model", {"input": "a", "model": "../../etc/passwd"}, 404, "model_not_found", None),
    ("a number as user", {"input": "a", "user": 5}, 400, "invalid_value", "user"),
    ("a number as input type", {"input": "a", "input_type": 5}, 400, "invalid_value", "input_type"),
    ("a list as instruction", {"input": "a", "instruction": ["x"]}, 400, "invalid_value", "instruction"),
    ("a number as prompt", {"input": "a", "prompt": 5}, 400, "invalid_value", "prompt"),
    ("an unknown truncation", {"input": "a", "truncate": "middle"}, 400, "invalid_value", "truncate"),
    ("a word as truth", {"input": "a", "normalize": "yes"}, 400, "invalid_value", "normalize"),
    ("a number as truth", {"input": "a", "normalize": 1}, 400, "invalid_value", "normalize"),
    ("an unknown dtype", {"input": "a", "output_dtype": "int4"}, 400, "invalid_value", "output_dtype"),
    ("ranges of one vector", {"input": "a", "output_dtype": "int8"}, 400, "invalid_value", "output_dtype"),
    ("an unknown duration", {"input": "a", "keep_alive": "soon"}, 400, "invalid_value", "keep_alive"),
    ("a negative duration", {"input": "a", "keep_alive": -2}, 400, "invalid_value", "keep_alive"),
    ("truth as a duration", {"input": "a", "keep_alive": True}, 400, "invalid_value", "keep_alive"),
    ("prompt and input type", {"input": "a", "prompt": "q", "input_type": "query"}, 400, "invalid_value", "prompt"),
    ("prompt and instruction", {"input": "a", "prompt": "q", "instruction": "t"}, 400, "invalid_value", "prompt"),
    ("a body too large", {"input": "a" * MAX_BODY_BYTES}, 413, "body_too_large", None),
]
BAD_ROUTES: list[tuple[str, str, Any, int, str, str | None]] = [
    ("GET", "/v1/embeddings", None, 405, "method_not_allowed", None),
    ("PUT", "/v1/embeddings", {"input": "a"}, 405, "method_not_allowed", None),
    ("DELETE", "/v1/models/mini", None, 405, "method_not_allowed", None),
    ("POST", "/v1/models", {}, 405, "method_not_allowed", None),
    ("POST", "/v1/embedding", {"input": "a"}, 404, "not_found", None),
    ("POST", "/v1/completions", {}, 404, "not_found", None),
    ("GET", "/v1/embeddings/mini", None, 404, "not_found", None),
    ("GET", "/docs/nothing", None, 404, "not_found", None),
    ("GET", "/docs/assets/nothing.js", None, 404, "not_found", None),
    ("GET", "/docs/assets/..%2f..%2fapp", None, 404, "not_found", None),
    ("GET", "/v1/models/nothing", None, 404, "model_not_found", None),
    ("GET", "/v1/models/BAAI", None, 404, "model_not_found", None),
    ("GET", "/admin/models/no/thing", None, 404, "model_not_found", None),
    ("POST", "/admin/models/no/thing/preload", None, 404, "model_not_found", None),
    ("POST", "/admin/models/no/thing/evict", {}, 404, "model_not_found", None),
    ("GET", "/admin/models/mini/preload", None, 405, "method_not_allowed", None),
    ("POST", "/admin/models/mini", None, 405, "method_not_allowed", None),
    ("POST", "/admin/models/mini/explode", None, 405, "method_not_allowed", None),
    ("POST", "/admin/models/mini/preload", {"wait": "yes"}, 400, "invalid_value", "wait"),
    ("POST", "/admin/models/mini/preload", {"pin": 1}, 400, "invalid_value", "pin"),
    ("POST", "/admin/models/mini/evict", {"timeout": -1}, 400, "invalid_value", "timeout"),
    ("POST", "/admin/models/mini/evict", {"timeout": "30"}, 400, "invalid_value", "timeout"),
    ("POST", "/admin/models/mini/evict", b"{", 400, "invalid_json", None),
    ("GET", "/admin/plan?model=nothing", None, 404, "model_not_found", None),
]
FAILURES: list[tuple[Exception, int, str, str | None, dict[str, str]]] = [
    (engine.InvalidValue("x", param="normalize"), 400, "invalid_value", "normalize", {}),
    (engine.ContextLengthExceeded("x", param="input"), 400, "context_length_exceeded", "input", {}),
    (engine.DimensionsNotSupported("x", param="dimensions"), 400, "dimensions_not_supported", "dimensions", {}),
    (engine.PromptNotFound("x", param="input_type"), 400, "prompt_not_found", "input_type", {}),
    (engine.InvalidTokenId("x", param="input"), 400, "invalid_token_id", "input", {}),
    (engine.ModelNotFound("x"), 404, "model_not_found", None, {}),
    (
        engine.QueueFull("x", retry_after_s=0.25), 429, "queue_full", None,
        {"retry-after": "1", "retry-after-ms": "250"},
    ),
    (
        engine.ModelLoading("x", retry_after_s=2.4), 503, "model_loading", None,
        {"retry-after": "3", "retry-after-ms": "2400"},
    ),
    (
        engine.LoadFailed("x", retry_after_s=40), 503, "model_load_failed", None,
        {"retry-after": "40", "retry-after-ms": "40000"},
    ),
    (
        engine.LoadFailed("x", kind="access_denied"), 503, "model_load_failed", None,
        {"retry-after": "10", "x-should-retry": "false"},
    ),
    (engine.ShuttingDown("x"), 503, "shutting_down", None, {"retry-after": "1"}),
    (engine.OutOfMemory("x"), 503, "out_of_memory", None, {"retry-after": "1"}),
    (engine.ModelTooLarge("x"), 500, "model_too_large", None, {"x-should-retry": "false"}),
    (engine.ModelInUse("x"), 409, "model_in_use", None, {}),
    (engine.ModelPinned("x"), 409, "model_pinned", None, {"x-should-retry": "false"}),
    (engine.NonFiniteEmbedding("x", index=3), 500, "non_finite_embedding", None, {"x-should-retry": "false"}),
    (engine.EngineFailed("x"), 500, "internal_error", None, {}),
]  # fmt: skip


def failure_id(value: object) -> str | None:
    return f"{type(value).__name__}-{getattr(value, 'kind', '')}" if isinstance(value, Exception) else None


def engine_errors(base: type[engine.EngineError] = engine.EngineError) -> set[type[engine.EngineError]]:
    found = {base}
    for child in base.__subclasses__():
        if child.__module__ == engine.__name__:
            found |= engine_errors(child)
    return found


def assert_envelope(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]

    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == TYPES.get(status, INVALID)
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) > 0
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    for secret in ("Traceback", "/secret", "/work", "site-packages", "object at 0x"):
        assert secret not in response.text


def send(served: Served, method: str, path: str, body: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return served.client.request(method, path, content=body)
    return served.client.request(method, path, json=body)


def test_every_engine_error_has_a_row_of_its_own() -> None:
    assert engine_errors() - TABLE.keys() == set()


@pytest.mark.parametrize("error", TABLE, ids=lambda error: error.__name__)
def test_every_row_is_in_the_contract(error: type[Exception]) -> None:
    row = TABLE[error]

    assert error is ClientLeft or row.code in CODES[row.status]
    assert row.type == TYPES.get(row.status, INVALID)


def test_a_new_error_below_a_known_one_is_answered_like_it() -> None:
    class Novel(engine.QueueFull):
        pass

    assert classify(Novel("x")) == TABLE[engine.QueueFull]
    assert classify(ValueError("x")) is None


@pytest.mark.parametrize(
    ("body", "status", "code", "param"), [row[1:] for row in BAD_BODIES], ids=[r[0] for r in BAD_BODIES]
)
def test_a_bad_body_is_answered_with(served: Served, body: Any, status: int, code: str, param: str | None) -> None:
    response = send(served, "POST", EMBED, body)

    assert_envelope(response, status, code, param)
    assert served.backend.calls == []


@pytest.mark.parametrize(("method", "path", "body", "status", "code", "param"), BAD_ROUTES)
def test_a_bad_route_is_answered_with(  # noqa: PLR0913 - one argument a column of the table
    served: Served, method: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    response = send(served, method, path, body)

    assert_envelope(response, status, code, param)
    assert served.backend.commands == []


@pytest.mark.parametrize(("failure", "status", "code", "param", "headers"), FAILURES, ids=failure_id)
def test_an_engine_error_is_answered_with(
    served: Served, failure: Exception, status: int, code: str, param: str | None, headers: dict[str, str]
) -> None:
    served.backend.failures["mini"] = failure
    with capture_logs() as lines:
        response = served.client.post(EMBED, json={"input": "a"})

    assert_envelope(response, status, code, param)
    assert response.json()["error"]["message"] == "x"
    assert {name: response.headers.get(name) for name in headers} == headers
    assert ("x-should-retry" in response.headers) == ("x-should-retry" in headers)
    assert ("retry-after" in response.headers) == ("retry-after" in headers)
    assert all("exc_info" not in line for line in lines)


def test_a_message_holds_both_numbers_and_the_remedy(served: Served) -> None:
    many = served.client.post(EMBED, json={"input": ["a"] * 2049}).json()["error"]["message"]
    large = served.client.post(EMBED, content=b"a" * (MAX_BODY_BYTES + 1)).json()["error"]["message"]
    near = served.client.post(EMBED, json={"input": "a", "model": "mnii"}).json()["error"]["message"]
    method = served.client.post("/admin/models/BAAI/bge-m3").json()["error"]["message"]

    assert many == "input holds 2049 items, and a request 2048 at most: split it"
    assert "1048577 bytes" in large
    assert "1048576" in large
    assert "did you mean mini?" in near
    assert method == "POST is not possible on /admin/models/BAAI/bge-m3; it takes GET."


def test_a_405_names_the_methods_allowed(served: Served) -> None:
    assert "POST" in served.client.get(EMBED).headers["allow"]


def test_a_body_that_grows_past_the_limit_is_refused(served: Served) -> None:
    response = served.client.post(EMBED, content=(b"a" * 2**16 for _ in range(20)))

    assert_envelope(response, 413, "body_too_large", None)


def test_a_foreign_host_header_is_refused(served: Served) -> None:
    response = served.client.get("/health", headers={"host": "a b"})

    assert_envelope(response, 400, "invalid_value", None)


def test_a_crash_is_logged_once_and_answered_without_its_cause(served: Served) -> None:
    served.backend.failures["mini"] = RuntimeError("the key is hunter2, see /secret/place")
    with capture_logs() as lines:
        response = served.client.post(EMBED, json={"input": "a"}, headers={"x-request-id": "r-1"})
    crashes = [line for line in lines if line["event"] == "request.crashed"]

    assert_envelope(response, 500, "internal_error", None)
    assert "hunter2" not in response.text
    assert "request id r-1" in response.json()["error"]["message"]
    assert len(crashes) == 1
    assert isinstance(crashes[0]["exc_info"], RuntimeError)
