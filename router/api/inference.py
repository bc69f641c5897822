"""Runs a model for a request: the path that OpenAI's route and all compatibility routes share."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import structlog
from litestar import Request
from litestar.datastructures import ResponseHeader
from litestar.exceptions import PermissionDeniedException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import ResponseSpec
from msgspec import Struct, structs

from engines.errors import EngineFailed, InvalidRequest, NonFiniteEmbedding
from engines.spec import Calibration, ModelSpec
from engines.types import EmbedCall, Embeddings, ModelStatus
from router.api.decoding import StrictRequest, decode_token_ids, embed_call
from router.api.encoding import check_ranges
from router.api.openapi import BEARER, EMBEDDING, failures
from router.auth.guards import Connection, Guard, key_of, requires
from router.auth.model_access import resolve
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

_HEADERS = (
    ResponseHeader(
        name="Server-Timing",
        description="Where the time went: load, tokenize, queue, forward, in milliseconds.",
        documentation_only=True,
    ),
    ResponseHeader(
        name="x-embed-truncated",
        description="Indexes of the truncated inputs; absent if none was.",
        documentation_only=True,
    ),
    *(ResponseHeader(name=name, description=words, documentation_only=True) for name, words in RATE_HEADERS.items()),
)
_GUARDS = (requires("embed"), acquire_permit)


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
    """

    def __init__(
        self, path: str | None = None, *, summary: str, returns: Any, description: str = "Vectors in input order"
    ) -> None:
        super().__init__(
            path,
            http_method="POST",
            status_code=200,
            guards=_GUARDS,
            request_class=StrictRequest,
            response_headers=_HEADERS,
            security=BEARER,
            summary=summary,
            responses={200: ResponseSpec(returns, generate_examples=False, description=description)}
            | failures(*EMBEDDING),
        )

    async def authorize_connection(self, connection: Connection) -> None:
        """Run all guards in order."""
        for guard in self.resolve_guards():
            await cast(Guard, guard)(connection, self)


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
        """`Server-Timing` in milliseconds, and the indexes of truncated inputs, if any."""
        spent = self.embeddings.timings
        parts = {"load": spent.load_s, "tokenize": spent.tokenize_s, "queue": spent.queue_s, "forward": spent.forward_s}
        headers = {"server-timing": ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in parts.items())}
        if self.embeddings.truncated:
            headers["x-embed-truncated"] = ",".join(map(str, self.embeddings.truncated))
        return headers


async def embed(request: Request[Any, Any, Any], wanted: EmbeddingRequest) -> Answer:
    """Embed the inputs of `wanted`; compatibility routes translate their requests into it.

    A model that is not in memory is loaded first. The work is cancelled if the client disconnects.
    """
    server_state = state_of(request)
    spec = resolve(request, server_state.registry, wanted.model)
    call = embed_call(wanted, spec.model_id, load_timeout_s=server_state.settings.load_timeout_s)
    caller = server_state.keyring.caller_of(key_of(request))
    if caller:
        call = structs.replace(call, caller=caller)
    if call.keep_alive_s is not None and not server_state.keyring.may_keep_alive(key_of(request)):
        raise PermissionDeniedException(_KEEP_ALIVE_REFUSED)
    check_ranges(spec, (wanted.output_dtype,), call.num_items, wanted.normalize)
    if call.token_ids and spec.token_encoding is not None:
        texts = await decode_token_ids(spec.token_encoding, call.token_ids)
        call = structs.replace(call, texts=texts, token_ids=())
    began_s = time.perf_counter()
    run = _run_counted if permit_of(request).counts_tokens else _run
    embeddings = await run(request, server_state, spec, call)
    context_of(request).record_result(embeddings, began_s)
    if embeddings.truncated:
        log.warning("inputs.truncated", inputs=call.num_items, truncated=len(embeddings.truncated))
    return Answer(spec.model_id, embeddings, spec.calibration)


async def _run(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, call: EmbedCall
) -> Embeddings:
    async with while_client_stays(request):
        result = await server_state.backend.run(call)
    assert isinstance(result, Embeddings), "an EmbedCall is answered by Embeddings"
    return result


async def _run_counted(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, call: EmbedCall
) -> Embeddings:
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
        embeddings = await _run(request, server_state, spec, call)
        used = sum(embeddings.token_counts)  # (1)
        return embeddings
    except (ClientLeft, asyncio.CancelledError):
        used = permit.reserved_tokens if _is_ready(server_state, spec.model_id) else 0  # (2)
        raise
    except (EngineFailed, NonFiniteEmbedding):
        used = permit.reserved_tokens  # (3)
        raise
    finally:
        await permit.settle(used)


def _max_tokens(server_state: ServerState, spec: ModelSpec, call: EmbedCall) -> int | None:
    """Return the most tokens that the model reads of one input; None if unknown.

    It is unknown if an input is long, and the model has never been in memory.
    """
    if spec.max_tokens is not None:
        return spec.max_tokens
    if max(map(len, call.texts or call.token_ids)) <= _SHORT:
        return _SHORT
    return next(
        (status.info.max_tokens for status in _statuses(server_state, spec.model_id) if status.info is not None), None
    )


def _is_ready(server_state: ServerState, model_id: str) -> bool:
    return any(status.state == "ready" for status in _statuses(server_state, model_id))


def _statuses(server_state: ServerState, model_id: str) -> Iterator[ModelStatus]:
    return (
        status for host in server_state.backend.snapshots() for status in host.models if status.model_id == model_id
    )


@contextmanager
def rename_error_params(**names: str) -> Iterator[None]:
    """Rename `param` in errors raised inside the block to the names of a compatibility API: `input="texts"`."""
    try:
        yield
    except InvalidRequest as error:
        error.param = names.get(error.param or "", error.param)
        raise
