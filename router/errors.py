"""The one table: exception → status, `type`, `code`, and whether asking again can help.

Every failure leaves the server through `answer_error`, in one envelope. Nothing else here writes a response, and
no other module knows a status code of a failure.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import structlog
from litestar import Request, Response
from litestar.exceptions import (
    ClientException,
    HTTPException,
    MethodNotAllowedException,
    NotAuthorizedException,
    NotFoundException,
    PermissionDeniedException,
    ServiceUnavailableException,
    TooManyRequestsException,
    ValidationException,
)
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from engines import errors as engine
from router.observability.request_context import context_of
from router.registry.registry import RegistryError
from router.schemas.inference import ErrorDetail, ErrorEnvelope

log = structlog.get_logger()

_MAX_MESSAGE_CHARS = 1000
_MAX_LIST_CHARS = 40_000
"""For the mistakes of a registry: an operator wants all of them."""


class InvalidJson(engine.InvalidRequest):
    """The body is not JSON."""


class EmptyInput(engine.InvalidRequest):
    """An empty string or list where a text is needed."""


class TooManyInputs(engine.InvalidRequest):
    """More inputs than one request may hold."""


class ModelNotAllowed(engine.EngineError):
    """The key may not use this model."""


class RateLimitExceeded(engine.Busy):
    """The caller has used up its requests or tokens of this window."""


class RequestExceedsLimit(engine.EngineError):
    """One request has more tokens than a whole window admits; no waiting helps."""


class TooManyRequests(engine.Busy):
    """The caller, or the whole server, has as many requests running as it may have."""


class ClientLeft(Exception):
    """The client hung up before its answer was ready; the answer goes nowhere, the log line says 499."""


class Row(NamedTuple):
    """How one exception is answered. `should_retry` false tells SDKs not to try again where they otherwise would."""

    status: int
    type: str
    code: str
    should_retry: bool = True


def _invalid(code: str, status: int = 400) -> Row:
    return Row(status, "invalid_request_error", code)


def _server(status: int, code: str, *, should_retry: bool = True) -> Row:
    return Row(status, "server_error", code, should_retry)


CRASH = _server(500, "internal_error")
_LOAD_FAILED = _server(503, "model_load_failed")
_LOAD_HOPELESS = _server(503, "model_load_failed", should_retry=False)

TABLE: dict[type[Exception], Row] = {
    InvalidJson: _invalid("invalid_json"),
    EmptyInput: _invalid("empty_input"),
    TooManyInputs: _invalid("too_many_inputs"),
    RegistryError: _invalid("invalid_value"),
    ClientLeft: _invalid("client_closed_request", 499),
    engine.InvalidValue: _invalid("invalid_value"),
    engine.ContextLengthExceeded: _invalid("context_length_exceeded"),
    engine.DimensionsNotSupported: _invalid("dimensions_not_supported"),
    engine.PromptNotFound: _invalid("prompt_not_found"),
    engine.InvalidTokenId: _invalid("invalid_token_id"),
    engine.ModelNotFound: _invalid("model_not_found", 404),
    engine.HostNotFound: _invalid("not_found", 404),
    ModelNotAllowed: Row(403, "permission_error", "model_not_allowed"),
    RateLimitExceeded: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    RequestExceedsLimit: Row(429, "rate_limit_error", "rate_limit_exceeded", should_retry=False),
    TooManyRequests: Row(429, "rate_limit_error", "too_many_requests"),
    engine.QueueFull: Row(429, "rate_limit_error", "queue_full"),
    engine.ModelLoading: _server(503, "model_loading"),
    engine.LoadFailed: _LOAD_FAILED,
    engine.ShuttingDown: _server(503, "shutting_down"),
    engine.DeviceDown: _server(503, "device_down"),
    engine.HostLost: _server(503, "host_lost"),
    engine.OutOfMemory: _server(503, "out_of_memory"),
    engine.ModelTooLarge: _server(500, "model_too_large", should_retry=False),
    engine.ModelInUse: Row(409, "conflict_error", "model_in_use"),
    engine.ModelPinned: Row(409, "conflict_error", "model_pinned", should_retry=False),
    engine.NonFiniteEmbedding: _server(500, "non_finite_embedding", should_retry=False),
    engine.EngineFailed: CRASH,
    engine.UnsupportedModel: _LOAD_HOPELESS,
    engine.BrokenFiles: _LOAD_FAILED,
    engine.FilesChanged: _LOAD_FAILED,
    engine.SelfCheckFailed: _LOAD_HOPELESS,
    engine.SourceNotFound: _LOAD_HOPELESS,
    engine.AccessDenied: _LOAD_HOPELESS,
    engine.HubUnreachable: _LOAD_FAILED,
    engine.OfflineMode: _LOAD_HOPELESS,
    engine.DiskFull: _LOAD_HOPELESS,
    ClientException: _invalid("invalid_value"),
    ValidationException: _invalid("invalid_value"),
    NotAuthorizedException: _invalid("invalid_api_key", 401),
    PermissionDeniedException: Row(403, "permission_error", "insufficient_scope"),
    NotFoundException: _invalid("not_found", 404),
    MethodNotAllowedException: _invalid("method_not_allowed", 405),
    RequestEntityTooLarge: _invalid("body_too_large", 413),
    TooManyRequestsException: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    ServiceUnavailableException: _server(503, "shutting_down"),
    # Parents: for what is added below them one day.
    engine.EngineError: CRASH,
    engine.InvalidRequest: _invalid("invalid_value"),
    engine.Busy: Row(429, "rate_limit_error", "too_many_requests"),
    engine.Unavailable: _server(503, "model_loading"),
    engine.Conflict: Row(409, "conflict_error", "model_in_use"),
    engine.BadModel: _LOAD_FAILED,
    engine.SourceError: _LOAD_FAILED,
}  # fmt: skip

_HOPELESS_KINDS = {"no_device"} | {
    error.kind for error, row in TABLE.items() if issubclass(error, engine.BadModel) and not row.should_retry
}


def classify(error: Exception) -> Row | None:
    """The row of the nearest class; None for what nobody foresaw: a crash."""
    if isinstance(error, engine.LoadFailed) and error.kind in _HOPELESS_KINDS:
        return _LOAD_HOPELESS
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorEnvelope]:
    """The contract's answer to any exception."""
    row, envelope = describe(request, error)
    context_of(request).code = row.code
    return Response(envelope, status_code=row.status, headers=_headers(row, error))


def describe(request: Request[Any, Any, Any], error: Exception) -> tuple[Row, ErrorEnvelope]:
    """Any exception in the contract's words; a crash is logged here, once, with its traceback."""
    row = classify(error)
    if row is None:
        log.error("request.crashed", exc_info=error)
        row = CRASH
        message = f"The server failed on this request. Its log has the details under {_request_id(request)}."
    else:
        message = _message(request, error)
    limit = _MAX_LIST_CHARS if isinstance(error, RegistryError) else _MAX_MESSAGE_CHARS
    detail = ErrorDetail(message=message[:limit], type=row.type, param=_param(error), code=row.code)
    return row, ErrorEnvelope(error=detail)


def _headers(row: Row, error: Exception) -> Mapping[str, str]:
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers |= {"retry-after": str(max(1, math.ceil(retry_after_s))), "retry-after-ms": _ms(retry_after_s)}
    if not row.should_retry:
        headers["x-should-retry"] = "false"
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def _ms(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def _message(request: Request[Any, Any, Any], error: Exception) -> str:
    if isinstance(error, RequestEntityTooLarge):
        return _too_large(request)
    if isinstance(error, MethodNotAllowedException):
        allowed = [name for name in (error.headers or {}).get("allow", "").split(", ") if name != "OPTIONS"]
        return f"{request.method} is not possible on {unquote(request.url.path)}; it takes {' or '.join(allowed)}."
    if rejected := _rejected(error):
        return "; ".join(f"{entry.get('key', 'request')}: {entry['message']}" for entry in rejected)
    if isinstance(error, NotFoundException):
        return f"There is no {request.method} {unquote(request.url.path)} here; /docs lists the routes."
    return error.detail if isinstance(error, HTTPException) else str(error)


def _too_large(request: Request[Any, Any, Any]) -> str:
    limit = request.route_handler.resolve_request_max_body_size()
    sent = request.headers.get("content-length", f"more than {limit}")
    return f"The body has {sent} bytes, and this server reads {limit} at most: send fewer inputs a request."


def _rejected(error: Exception) -> list[dict[str, str]]:
    """Litestar lists the parameters that did not convert under `extra`."""
    return error.extra if isinstance(error, ValidationException) and isinstance(error.extra, list) else []


def _param(error: Exception) -> str | None:
    if isinstance(error, engine.InvalidRequest):
        return error.param
    return next((entry.get("key") for entry in _rejected(error)), None)


def _request_id(request: Request[Any, Any, Any]) -> str:
    return f"request id {request.scope['state'].get('request_id', 'unknown')}"
