"""Tests that every error has the contract's status, type, code and param, and shows no path or traceback."""

from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from engines import errors as engine
from router.errors import TABLE, ClientLeft, classify
from tests.testkit.contract import BAD_BODIES, CODES, EMBED, INVALID, TYPES, assert_envelope
from tests.testkit.servers import MAX_BODY_BYTES, Served

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

    assert many == "input has 2049 items (maximum 2048 per request); split the request"
    assert "1048577 bytes" in large
    assert "1048576" in large
    assert "did you mean mini?" in near
    assert method == "Method POST is not allowed for /admin/models/BAAI/bge-m3: use GET"


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
