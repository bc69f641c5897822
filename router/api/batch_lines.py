"""Answers one line of a batch as its endpoint would: the same decoding, model, vectors or scores, encoding and errors.

A line runs with the key of its batch: its models, and token limits of the same size in a window of their own, so that a
batch does not use up what the key's other requests may.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import msgspec
from litestar import Litestar, Request
from litestar.exceptions import NotAuthorizedException
from litestar.response.base import ASGIResponse
from litestar.types import HTTPScope, Message
from msgspec import structs

from router.api.decoding import INLINE_BYTES, decode_body, decode_large_body
from router.api.embeddings import answer_embeddings
from router.api.inference import SPACE_HEADER, headers_of
from router.api.rerank import answer_rerank
from router.api.score_calls import rerank_call
from router.auth.keys import Key
from router.batches.parts import LineAnswer, LineWork
from router.errors import describe
from router.limits.concurrency import caller_of
from router.limits.limiter import Limiter, RequestPermit
from router.observability.request_context import RequestContext, context_of
from router.schemas.inference import EmbeddingRequest
from router.schemas.scoring import RerankRequest
from router.server.state import ServerState

BULK_FIELDS: Mapping[str, Any] = {"service_tier": "flex"}
"""Fields that every line has, whatever it says: it uses idle capacity only, once requests can ask for that."""

_KEPT_HEADERS = ("x-embed-truncated", SPACE_HEADER)
_TRANSIENT = (429, 503)


class BatchLines:
    """Answers lines; what `BatchRun` calls.

    Args:
        app: the server, whose state and handlers a line uses.
    """

    def __init__(self, app: Litestar) -> None:
        self._app = app
        self._server_state: ServerState = app.state.server_state
        self._limiter: Limiter = app.state.limiter

    async def __call__(self, work: LineWork) -> LineAnswer:
        """Answer one line; errors are answers, too."""
        request = self._request(work)
        try:
            key = self._server_state.keyring.find(work.owner)
            if key is None:
                raise NotAuthorizedException("The key of this batch was removed, or may not run batches")
            self._admit(request, key)
            body = await _answer(request, work)
        except Exception as error:  # noqa: BLE001 - `describe` logs what it does not know, as for any request
            row, envelope = describe(request, error)
            retry_after_s = getattr(error, "retry_after_s", 1.0)
            is_transient = row.status in _TRANSIENT and row.should_retry
            return LineAnswer(row.status, msgspec.json.encode(envelope), retry_after_s if is_transient else None)
        result = context_of(request).answer
        num_truncated = len(result.truncated) if result is not None else 0
        return LineAnswer(200, body, headers=_headers(request), num_truncated=num_truncated)

    def _admit(self, request: Request[Any, Any, Any], key: Key) -> None:
        caller = caller_of(key, "batches", self._limiter.settings)
        caller = structs.replace(caller, name=f"batches:{caller.name}")
        request.scope["state"] |= {"key": key, "permit": RequestPermit(self._limiter, caller, {})}

    def _request(self, work: LineWork) -> Request[Any, Any, Any]:
        """Return a request that has come over no connection: its client never leaves."""
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": work.endpoint,
            "raw_path": work.endpoint.encode(),
            "path_template": work.endpoint,
            "path_params": {},
            "query_string": b"",
            "headers": [(b"x-request-id", work.request_id.encode())],
            "client": None,
            "server": None,
            "scheme": "http",
            "root_path": "",
            "http_version": "1.1",
            "litestar_app": self._app,
            "app": self._app,
            "state": {},
        }
        RequestContext(cast(HTTPScope, scope), _send_nothing)
        scope["state"]["is_batch_line"] = True
        return Request(cast(HTTPScope, scope), receive=_wait_for_ever, send=_send_nothing)


async def _answer(request: Request[Any, Any, Any], work: LineWork) -> bytes:
    if work.endpoint == "/v1/embeddings":
        answer = await answer_embeddings(request, await _decode(work.body, EmbeddingRequest))
        return await body_of(answer, request)
    wanted: RerankRequest = await _decode(work.body, RerankRequest)
    ranking = await answer_rerank(request, wanted, rerank_call(wanted), "1")
    return await _with_id(await body_of(ranking, request), work.request_id)


async def body_of(answer: ASGIResponse, request: Request[Any, Any, Any]) -> bytes:
    """Return the whole body of an answer, which may be encoded while it is sent."""
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])

    await answer(request.scope, request.receive, collect)
    return b"".join(parts)


def _headers(request: Request[Any, Any, Any]) -> dict[str, str]:
    """Return the headers that say what was cut, and in which space the vectors lie; not those that differ each time."""
    result = context_of(request).answer
    headers = {} if result is None else headers_of(result)
    return {name: headers[name] for name in _KEPT_HEADERS if name in headers}


async def _decode(body: bytes, wanted: Any) -> Any:
    given = decode_body(body, wanted) if len(body) <= INLINE_BYTES else await decode_large_body(body, wanted)
    return structs.replace(
        given, **{name: BULK_FIELDS[name] for name in BULK_FIELDS.keys() & {*given.__struct_fields__}}
    )


async def _with_id(body: bytes, request_id: str) -> bytes:
    """Return the body with the id of the line instead of a random one, so that a repeated line answers the same."""

    def replace() -> bytes:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return msgspec.json.encode(fields | {"id": msgspec.Raw(msgspec.json.encode(request_id))})

    return replace() if len(body) <= INLINE_BYTES else await asyncio.to_thread(replace)


async def _wait_for_ever() -> NoReturn:
    await asyncio.Future()
    raise AssertionError("the future never ends")


async def _send_nothing(_: Message) -> None:
    raise AssertionError("a line of a batch is answered into a file")
