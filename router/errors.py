"""Maps every exception to an error response: status, `type`, `code`, and whether a retry can succeed.

All errors leave the server through `answer_error`, in one envelope. No other module knows the status of an error.
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
"""For a registry, whose mistakes are all listed."""


class InvalidJson(engine.InvalidRequest):
    """The request body is not valid JSON."""


class EmptyInput(engine.InvalidRequest):
    """The input is an empty string or list."""


class TooManyInputs(engine.InvalidRequest):
    """The request has more inputs than the maximum."""


class ModelNotAllowed(engine.EngineError):
    """This key may not use this model."""


class RateLimitExceeded(engine.Busy):
    """The caller has used all requests or tokens of the current window."""


class RequestExceedsLimit(engine.EngineError):
    """One request has more tokens than the limit of a whole window, so a retry would fail again."""


class TooManyRequests(engine.Busy):
    """The caller or the server has reached its limit of concurrent requests."""


class FileTooLarge(engine.EngineError):
    """The uploaded file has more bytes than MAX_FILE_BYTES."""


class QuotaExceeded(engine.EngineError):
    """The key has as many files, stored bytes or unfinished batches as it may have."""


class FileInUse(engine.Conflict):
    """An unfinished batch reads this file."""


class BatchFinished(engine.Conflict):
    """The batch cannot be cancelled any more."""


class ObjectNotFound(engine.EngineError):
    """This key has no file or batch with this id."""


class BatchesDisabled(engine.EngineError):
    """This server keeps no files and runs no batches, because DATA_DIR is not set."""


class StorageUnavailable(engine.Unavailable):
    """The disk or the database of files and batches cannot be used now."""


class ClientLeft(Exception):
    """The client disconnected before its answer was ready. Nothing is sent; the log shows status 499."""


class ErrorRow(NamedTuple):
    """The response to an exception. `should_retry` false tells SDKs not to retry where they otherwise would."""

    status: int
    type: str
    code: str
    should_retry: bool = True


def _invalid(code: str, status: int = 400) -> ErrorRow:
    return ErrorRow(status, "invalid_request_error", code)


def _server(status: int, code: str, *, should_retry: bool = True) -> ErrorRow:
    return ErrorRow(status, "server_error", code, should_retry)


INTERNAL_ERROR = _server(500, "internal_error")
_LOAD_FAILED = _server(503, "model_load_failed")
_LOAD_FAILED_FOR_GOOD = _server(503, "model_load_failed", should_retry=False)

TABLE: dict[type[Exception], ErrorRow] = {
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
    engine.SpaceMismatch: ErrorRow(409, "conflict_error", "space_mismatch", should_retry=False),
    engine.TaskNotSupported: _invalid("task_not_supported"),
    engine.ModelNotFound: _invalid("model_not_found", 404),
    engine.HostNotFound: _invalid("not_found", 404),
    ModelNotAllowed: ErrorRow(403, "permission_error", "model_not_allowed"),
    RateLimitExceeded: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded"),
    RequestExceedsLimit: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded", should_retry=False),
    TooManyRequests: ErrorRow(429, "rate_limit_error", "too_many_requests"),
    FileTooLarge: _invalid("body_too_large", 413),
    QuotaExceeded: ErrorRow(429, "rate_limit_error", "quota_exceeded", should_retry=False),
    FileInUse: ErrorRow(409, "conflict_error", "file_in_use", should_retry=False),
    BatchFinished: ErrorRow(409, "conflict_error", "batch_finished", should_retry=False),
    ObjectNotFound: _invalid("not_found", 404),
    BatchesDisabled: _invalid("not_found", 404),
    StorageUnavailable: _server(503, "storage_unavailable"),
    engine.QueueFull: ErrorRow(429, "rate_limit_error", "queue_full"),
    engine.ModelLoading: _server(503, "model_loading"),
    engine.LoadFailed: _LOAD_FAILED,
    engine.ShuttingDown: _server(503, "shutting_down"),
    engine.DeviceDown: _server(503, "device_down"),
    engine.HostLost: _server(503, "host_lost"),
    engine.OutOfMemory: _server(503, "out_of_memory"),
    engine.ModelTooLarge: _server(500, "model_too_large", should_retry=False),
    engine.ModelInUse: ErrorRow(409, "conflict_error", "model_in_use"),
    engine.ModelPinned: ErrorRow(409, "conflict_error", "model_pinned", should_retry=False),
    engine.NonFiniteEmbedding: _server(500, "non_finite_embedding", should_retry=False),
    engine.EngineFailed: INTERNAL_ERROR,
    engine.UnsupportedModel: _LOAD_FAILED_FOR_GOOD,
    engine.BrokenFiles: _LOAD_FAILED,
    engine.FilesChanged: _LOAD_FAILED,
    engine.SelfCheckFailed: _LOAD_FAILED_FOR_GOOD,
    engine.SourceNotFound: _LOAD_FAILED_FOR_GOOD,
    engine.AccessDenied: _LOAD_FAILED_FOR_GOOD,
    engine.HubUnreachable: _LOAD_FAILED,
    engine.OfflineMode: _LOAD_FAILED_FOR_GOOD,
    engine.DiskFull: _LOAD_FAILED_FOR_GOOD,
    ClientException: _invalid("invalid_value"),
    ValidationException: _invalid("invalid_value"),
    NotAuthorizedException: _invalid("invalid_api_key", 401),
    PermissionDeniedException: ErrorRow(403, "permission_error", "insufficient_scope"),
    NotFoundException: _invalid("not_found", 404),
    MethodNotAllowedException: _invalid("method_not_allowed", 405),
    RequestEntityTooLarge: _invalid("body_too_large", 413),
    TooManyRequestsException: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded"),
    ServiceUnavailableException: _server(503, "shutting_down"),
    # Base classes, for subclasses that are added later.
    engine.EngineError: INTERNAL_ERROR,
    engine.InvalidRequest: _invalid("invalid_value"),
    engine.Busy: ErrorRow(429, "rate_limit_error", "too_many_requests"),
    engine.Unavailable: _server(503, "model_loading"),
    engine.Conflict: ErrorRow(409, "conflict_error", "model_in_use"),
    engine.BadModel: _LOAD_FAILED,
    engine.SourceError: _LOAD_FAILED,
}  # fmt: skip

_KINDS_NOT_TO_RETRY = {"no_device"} | {
    error.kind for error, row in TABLE.items() if issubclass(error, engine.BadModel) and not row.should_retry
}


def classify(error: Exception) -> ErrorRow | None:
    """Return the row of the nearest base class; None for an unexpected exception."""
    if isinstance(error, engine.LoadFailed) and error.kind in _KINDS_NOT_TO_RETRY:
        return _LOAD_FAILED_FOR_GOOD
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorEnvelope]:
    """Return the error response for any exception."""
    row, envelope = describe(request, error)
    context_of(request).refuse(row.code, envelope.error.param, envelope.error.message)
    return Response(envelope, status_code=row.status, headers=_headers(row, error))


def describe(request: Request[Any, Any, Any], error: Exception) -> tuple[ErrorRow, ErrorEnvelope]:
    """Return the row and the envelope for any exception. Logs an unexpected one, once, with its traceback."""
    row = classify(error)
    if row is None:
        log.error("request.crashed", exc_info=error)
        row = INTERNAL_ERROR
        message = f"Internal error: see the server's log for {_request_id(request)}"
    else:
        message = _message(request, error)
    limit = _MAX_LIST_CHARS if isinstance(error, RegistryError) else _MAX_MESSAGE_CHARS
    detail = ErrorDetail(message=message[:limit], type=row.type, param=_param(error), code=row.code)
    return row, ErrorEnvelope(error=detail)


def _headers(row: ErrorRow, error: Exception) -> Mapping[str, str]:
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
        return f"Method {request.method} is not allowed for {unquote(request.url.path)}: use {' or '.join(allowed)}"
    if rejected := _rejected_params(error):
        return "; ".join(f"{entry.get('key', 'request')}: {entry['message']}" for entry in rejected)
    if isinstance(error, NotFoundException):
        return f"No route {request.method} {unquote(request.url.path)}: see /docs for all routes"
    return error.detail if isinstance(error, HTTPException) else str(error)


def _too_large(request: Request[Any, Any, Any]) -> str:
    limit = request.route_handler.resolve_request_max_body_size()
    sent = request.headers.get("content-length", f"more than {limit}")
    return f"Request body too large: {sent} bytes (MAX_BODY_BYTES={limit}); send fewer inputs per request"


def _rejected_params(error: Exception) -> list[dict[str, str]]:
    """Return the parameters that Litestar could not convert, which it lists in `extra`."""
    return error.extra if isinstance(error, ValidationException) and isinstance(error.extra, list) else []


def _param(error: Exception) -> str | None:
    if isinstance(error, engine.InvalidRequest):
        return error.param
    return next((entry.get("key") for entry in _rejected_params(error)), None)


def _request_id(request: Request[Any, Any, Any]) -> str:
    return f"request id {request.scope['state'].get('request_id', 'unknown')}"
