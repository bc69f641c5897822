"""Runs a model for a request: the path that OpenAI's route and all compatibility routes share."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import structlog
from litestar import Litestar, Request
from litestar.datastructures import ResponseHeader
from litestar.exceptions import PermissionDeniedException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import ResponseSpec
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, ExceptionHandlersMap
from msgspec import Struct, structs

from engines.errors import (
    EngineFailed,
    InvalidRequest,
    InvalidValue,
    NonFiniteEmbedding,
    SpaceMismatch,
    TaskNotSupported,
)
from engines.space import MAX_SPACE_CHARS
from engines.spec import Calibration, ModelSpec, Task
from engines.types import BaseResult, ContextualCall, Embeddings, ModelCall, ModelInfo, ModelStatus, Result, TextCall
from router.api.decoding import StrictRequest, decode_token_ids, embed_call
from router.api.encoding import check_ranges, is_scalar
from router.api.openapi import BEARER, EMBEDDING, failures
from router.auth.guards import Connection, Guard, key_of, requires
from router.auth.model_access import may_use, resolve
from router.errors import ClientLeft
from router.limits.limiter import RATE_HEADERS, acquire_permit, estimate_tokens, permit_of
from router.observability.request_context import context_of
from router.schemas.inference import EmbeddingRequest
from router.server.application import while_client_stays
from router.server.state import ServerState, state_of

log = structlog.get_logger()

_KEEP_ALIVE_REFUSED = (
    "This key may not set keep_alive, because other keys use the same models: omit it, or set `keep_alive: true` for "
    "the key in KEYS_FILE"
)
"""Refused rather than ignored: the client would rely on it."""
_SHORT = 256
"""Characters, or token ids. Every model reads inputs of this length whole, so its limit need not be looked up."""
_MAX_HEADER_CHARS = 4096
"""Most characters of `x-embed-truncated`; proxies refuse longer headers."""
_USES: dict[Task, str] = {
    "embed": "embed (POST /v1/embeddings)",
    "rerank": "rerank (POST /v1/rerank, /v1/score)",
    "classify": "classify (POST /v1/classify, /predict)",
}

SPACE_HEADER = "x-embedding-space"
_EXPECT_SPACE = b"x-expect-space"
"""The request header for clients that cannot add fields; the field `expect_space` comes before it."""

AnyCall = TypeVar("AnyCall", bound=ModelCall)

_HEADERS = (
    ResponseHeader(
        name="Server-Timing",
        description="Where the time went: load, tokenize, queue, forward, in milliseconds.",
        documentation_only=True,
    ),
    ResponseHeader(
        name="x-embed-truncated",
        description="Indexes and ranges of the truncated inputs, as in `0,3,7-19`; absent if none was.",
        documentation_only=True,
    ),
    ResponseHeader(
        name=SPACE_HEADER,
        description="The space that the vectors lie in: those of equal spaces may be compared. Absent without vectors.",
        documentation_only=True,
    ),
    *(ResponseHeader(name=name, description=words, documentation_only=True) for name, words in RATE_HEADERS.items()),
)
_GUARDS = (requires("embed"), acquire_permit)
_TRUNCATION = '"truncate": "end"'
"""How a request asks for truncation, as messages write it."""
TEI_TRUNCATION = '"truncate": true'
"""The same for clients of text-embeddings-inference."""


class InferenceRoute(HTTPRouteHandler):
    """Decorates a POST route that runs a model, and gives it what all of them share.

    That is: a key with the scope `embed`, a permit of the limiter, strict decoding of the body, status 200, and the
    headers and errors of the OpenAPI document. Guards get this handler itself. Litestar copies the handler for each
    guard of each request, which costs 17 µs a guard, and ours do not write to it.

    Args:
        path: below the controller's path.
        summary: title in the OpenAPI document.
        returns: type of the answer in the OpenAPI document.
        description: of the answer.
        errors: its error responses.
    """

    def __init__(
        self,
        path: str | Sequence[str] | None = None,
        *,
        summary: str,
        returns: Any,
        description: str = "Vectors in input order",
        errors: Mapping[int, ResponseSpec] = failures(*EMBEDDING),
    ) -> None:
        super().__init__(
            path,
            http_method="POST",
            status_code=200,
            guards=_GUARDS,
            request_class=StrictRequest,
            response_headers=_HEADERS,
            security=BEARER,
            include_in_schema=True,
            summary=summary,
            responses={200: ResponseSpec(returns, generate_examples=False, description=description)} | dict(errors),
        )

    async def authorize_connection(self, connection: Connection) -> None:
        """Run all guards in order."""
        for guard in self._own_guards:
            await guard(connection, self)

    def on_registration(self, app: Litestar) -> None:
        """Keep guards and exception handlers, which Litestar collects from all layers for each request, and leave out
        its check of the arguments where `StrictRequest` gives them all: 11 calls."""
        super().on_registration(app)
        if self.parsed_fn_signature.parameters.keys() == {"request", "data"}:
            self.signature_model.parse_values_from_connection_kwargs = lambda connection, kwargs: kwargs  # type: ignore[method-assign]  # as said
        self._own_guards = cast(Sequence[Guard], self.resolve_guards())
        self._exception_handlers = super().resolve_exception_handlers()

    def resolve_exception_handlers(self) -> ExceptionHandlersMap:
        """Return the handlers of all layers once the route is registered; until then a layer may be added."""
        kept = getattr(self, "_exception_handlers", None)
        return super().resolve_exception_handlers() if kept is None else kept

    async def to_response(self, app: Litestar, data: Any, request: Request[Any, Any, Any]) -> ASGIApp:
        """Return a response that is ready as it is."""
        return data if isinstance(data, ASGIResponse) else await super().to_response(app, data, request)


class Answer(Struct, frozen=True):
    """The vectors, the id of the model that computed them (never an alias), and its calibration."""

    model_id: str
    embeddings: Embeddings
    calibration: Calibration | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens run through the model, special tokens included."""
        return sum(self.embeddings.token_counts)

    @property
    def headers(self) -> dict[str, str]:
        """See `headers_of`."""
        return headers_of(self.embeddings)


def headers_of(result: BaseResult) -> dict[str, str]:
    """Return `Server-Timing` in milliseconds, the space of the vectors, and the indexes of truncated inputs, if any."""
    spent = result.timings
    begin = f"load;dur={spent.load_s * 1000:.1f}, tokenize;dur={spent.tokenize_s * 1000:.1f}, queue"
    headers = {"server-timing": f"{begin};dur={spent.queue_s * 1000:.1f}, forward;dur={spent.forward_s * 1000:.1f}"}
    if result.space:
        headers[SPACE_HEADER] = result.space
    if result.truncated:
        headers["x-embed-truncated"] = format_indexes(result.truncated)
    return headers


def format_indexes(indexes: Sequence[int], max_chars: int = _MAX_HEADER_CHARS) -> str:
    """Format rising indexes with ranges: `0,3,7-19`. What exceeds `max_chars` is replaced by `...`."""
    ranges: list[list[int]] = []
    for index in indexes:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return text if len(text) <= max_chars else text[: text.rindex(",", 0, max_chars - 3) + 1] + "..."


async def embed(request: Request[Any, Any, Any], wanted: EmbeddingRequest, pieces: tuple[int, ...] = ()) -> Answer:
    """Embed the inputs of `wanted`; compatibility routes translate their requests into it.

    A model that is not in memory is loaded first. The work is cancelled if the client disconnects.

    Args:
        pieces: how many of the inputs each document has, if these are pieces of documents.
    """
    server_state = state_of(request)
    spec = resolve(request, server_state.registry, wanted.model)
    if spec.task is not None and spec.task != "embed":
        refuse_task(spec.model_id, spec.task, "embed")
    call = embed_call(wanted, spec.model_id, load_timeout_s=server_state.settings.load_timeout_s)
    call = admit_call(request, server_state, call)
    has_dense = wanted.outputs is not None or bool(pieces) or _has_dense(server_state, spec, wanted)
    if has_dense:
        check_ranges(spec, (wanted.output_dtype,), call.num_items, wanted.normalize)
    if call.token_ids and spec.token_encoding is not None:
        texts = await decode_token_ids(spec.token_encoding, call.token_ids)
        call = structs.replace(call, texts=texts, token_ids=())
    began_s = time.perf_counter()
    pieces = (call.num_items,) if wanted.late_chunking else pieces
    work = ContextualCall(**structs.asdict(call), pieces=pieces) if pieces else call
    try:
        embeddings = await run_call(request, server_state, spec, work)
    except TaskNotSupported:
        info = next(infos_of(server_state, spec.model_id), None)
        if info is not None and info.task == "embed" and "dense" not in info.outputs:
            refuse_outputs(spec.model_id, info.outputs, ("dense",), "model")
        raise
    assert isinstance(embeddings, Embeddings), "both kinds of calls are answered by Embeddings"
    if not has_dense:
        check_ranges(spec, (wanted.output_dtype,), call.num_items, wanted.normalize)
    record_result(request, embeddings, began_s)
    return Answer(spec.model_id, embeddings, spec.calibration)


def _has_dense(server_state: ServerState, spec: ModelSpec, wanted: EmbeddingRequest) -> bool:
    """Return whether vectors to quantize are known to be dense: those of tokens need no range of their own."""
    if not is_scalar(wanted.output_dtype):
        return True
    return any("dense" in info.outputs for info in infos_of(server_state, spec.model_id))


def refuse_task(model_id: str, can: Task, wanted: str) -> NoReturn:
    """Raise TaskNotSupported for a model that computes something else."""
    raise TaskNotSupported(f"{model_id} cannot {wanted}: it can {_USES[can]}", param="model")


def refuse_outputs(model_id: str, has: Sequence[str], wanted: Sequence[str], param: str) -> NoReturn:
    """Raise TaskNotSupported for outputs that an embedding model lacks; the message names those that it has."""
    listed = ", ".join(f'"{output}"' for output in has)
    rerank = "; POST /v1/rerank" if {"dense", "multi_vector"} & {*has} else ""
    raise TaskNotSupported(
        f"{model_id} has no {' or '.join(output for output in wanted if output not in has)} output: it has "
        f"{' and '.join(has)} (POST /v1/embeddings with outputs [{listed}]{rerank})",
        param=param,
    )


def admit_call(request: Request[Any, Any, Any], server_state: ServerState, call: AnyCall) -> AnyCall:
    """Return the call with its caller, and with the space that a header expects.

    A flex call no longer takes a place among the running requests.

    Raises:
        PermissionDeniedException: the key may not set `keep_alive`.
        InvalidValue: the header is too long.
        TooManyRequests: too many flex requests run.
    """
    expected = _expected_space(request)
    if expected is not None and isinstance(call, TextCall) and call.expect_space is None:
        call = cast(AnyCall, structs.replace(call, expect_space=expected))
    if caller := server_state.keyring.caller_of(key_of(request)):
        call = structs.replace(call, caller=caller)
    if call.keep_alive_s is not None and not server_state.keyring.may_keep_alive(key_of(request)):
        raise PermissionDeniedException(_KEEP_ALIVE_REFUSED)
    if call.is_flex:
        permit_of(request).become_flex()
    return call


def _expected_space(request: Request[Any, Any, Any]) -> str | None:
    """Return the request header `x-expect-space`. Reads the raw headers: no object is made of them."""
    for name, value in request.scope["headers"]:
        if name == _EXPECT_SPACE:
            if len(value) > MAX_SPACE_CHARS:
                raise InvalidValue(
                    f"x-expect-space has {len(value)} characters (maximum {MAX_SPACE_CHARS}): send the "
                    "x-embedding-space of an earlier answer",
                    param="x-expect-space",
                )
            return value.decode("latin-1")
    return None


def record_result(request: Request[Any, Any, Any], result: BaseResult, began_s: float) -> None:
    """Record the result of a request whose work began at `began_s`, for metrics, log and trace."""
    context_of(request).record_result(result, began_s)
    if result.truncated and "is_batch_line" not in request.scope["state"]:  # a batch logs the sum of its lines
        log.warning("inputs.truncated", inputs=len(result.token_counts), truncated=len(result.truncated))


async def run_call(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, call: ModelCall
) -> Result:
    """Run a call within the limits of its caller; cancelled if the client disconnects."""
    run = _run_counted if permit_of(request).counts_tokens else _run
    return await run(request, server_state, spec, call)


async def _run(request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, call: ModelCall) -> Result:
    async with while_client_stays(request):
        try:
            return await server_state.backend.run(call)
        except SpaceMismatch as error:
            _hide_other_model(request, server_state, error)
            raise


def _hide_other_model(request: Request[Any, Any, Any], server_state: ServerState, error: SpaceMismatch) -> None:
    """Remove a model that the key may not use from the message of an error."""
    if (other := error.other_model) is not None and not may_use(key_of(request), server_state.registry, other):
        error.args = (str(error).replace(f"that space is {other}", "that space is another model's"),)


async def _run_counted(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, call: ModelCall
) -> Result:
    """Run a call of a caller with a token limit, and charge its tokens. Four cases:

    1. answered: the tokens that the model read, whether or not the answer arrives.
    2. the client disconnected: the tokens reserved, because the progress of its work is unknown; none if the model was
       not in memory.
    3. the forward pass failed: the tokens reserved, or a text that makes it fail would be computed for free.
    4. refused, or failed before the forward pass: none.
    """
    permit = permit_of(request)
    max_tokens = _max_tokens(server_state, spec, call)
    await permit.reserve(estimate_tokens(call, max_tokens), is_certain=max_tokens is not None)
    used = 0
    try:
        result = await _run(request, server_state, spec, call)
        used = sum(result.token_counts)  # (1)
        return result
    except (ClientLeft, asyncio.CancelledError):
        used = permit.reserved_tokens if _is_ready(server_state, spec.model_id) else 0  # (2)
        raise
    except (EngineFailed, NonFiniteEmbedding):
        used = permit.reserved_tokens  # (3)
        raise
    finally:
        await permit.settle(used)


def _max_tokens(server_state: ServerState, spec: ModelSpec, call: ModelCall) -> int | None:
    """Return the most tokens that the model reads of one input; None if unknown.

    It is unknown if an input is long, and the model has never been in memory.
    """
    if spec.max_tokens is not None:
        return spec.max_tokens
    if _longest(call) <= _SHORT:
        return _SHORT
    return next((info.max_tokens for info in infos_of(server_state, spec.model_id)), None)


def _longest(call: ModelCall) -> int:
    """Return the length of the longest input, of pairs that of both texts: in characters, or token ids."""
    if isinstance(call, TextCall):
        return max(map(len, call.texts or call.token_ids))
    return max(map(len, call.texts)) + max(map(len, call.queries), default=0)


def infos_of(server_state: ServerState, model_id: str) -> Iterator[ModelInfo]:
    """Yield what the hosts know of a model that is in memory."""
    return (status.info for status in _statuses(server_state, model_id) if status.info is not None)


def _is_ready(server_state: ServerState, model_id: str) -> bool:
    return any(status.state == "ready" for status in _statuses(server_state, model_id))


def _statuses(server_state: ServerState, model_id: str) -> Iterator[ModelStatus]:
    hosts = server_state.backend.snapshots()
    return (status for host in hosts for status in host.models if status.model_id == model_id)


@contextmanager
def rename_error_params(truncation: str = _TRUNCATION, /, **names: str) -> Iterator[None]:
    """Rename `param` in errors raised inside the block to the names of a compatibility API: `input="texts"`.

    A message that begins with an item of the field, as `input[3] has ...`, is renamed too.

    Args:
        truncation: how a request of that API asks for truncation, for messages that advise it.
        names: ours to theirs.
    """
    try:
        yield
    except InvalidRequest as error:
        message, old = str(error), error.param or ""
        new = names.get(old, old)
        if message.startswith(f"{old}["):
            message = new + message.removeprefix(old)
        error.args = (message.replace(_TRUNCATION, truncation),)
        error.param = new or None
        raise
