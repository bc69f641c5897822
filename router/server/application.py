"""`Application`: wraps Litestar's router: request contexts, model ids in paths, disconnects, HEAD, CORS preflights.

Litestar's own middleware runs behind its router, so it sees neither unknown routes nor the original path.
"""

import asyncio
from typing import Any
from urllib.parse import quote

from litestar import Litestar, Request
from litestar.enums import ScopeType
from litestar.exceptions import ClientException
from litestar.types import (
    HTTPDisconnectEvent,
    HTTPScope,
    LifeSpanReceive,
    LifeSpanScope,
    LifeSpanSend,
    Message,
    Receive,
    Scope,
    Send,
)

from router.errors import ClientLeft, answer_error
from router.observability.observers import Observers
from router.observability.request_context import RequestContext, header

_MODEL_ID_ROUTES = (
    ("/v1/models/", ()),
    ("/models/", ()),
    ("/admin/models/", ("/preload", "/evict")),
    ("/m/", ("/v1/embeddings",)),
    ("/openai/deployments/", ("/embeddings",)),
)
"""Path prefixes before a model id, and the suffixes that may follow it."""
_MODEL_ID_PREFIXES = tuple(prefix for prefix, _ in _MODEL_ID_ROUTES)
_MAX_PATH_CHARS = 2048
"""Litestar caches the routes of the last 1,024 paths, and a client may send 64 KiB for each. No route of this server is
as long as this, so a truncated path leads to a 404."""
_WATCH_AFTER_S = 0.25
"""Warm requests have ended by then, and save the task that watches for a disconnect (65 µs)."""


class Application(Litestar):
    """Litestar with encoded model ids in paths, and a `RequestContext` for the observers."""

    async def __call__(
        self,
        scope: Scope | LifeSpanScope,
        receive: Receive | LifeSpanReceive,
        send: Send | LifeSpanSend,
    ) -> None:
        if scope["type"] != ScopeType.HTTP:
            await super().__call__(scope, receive, send)
            return
        http: HTTPScope = scope  # type: ignore[assignment]  # its type was just checked; `cast` is a call
        to_client: Send = send  # type: ignore[assignment]  # as above
        is_head = http["method"] == "HEAD"
        if is_head:
            http = {**http, "method": "GET"}
        http["path"] = fold_model_id(http["path"][:_MAX_PATH_CHARS])
        state = self.state
        observers: Observers = state.observers
        context = RequestContext(http, to_client, is_last=state.server_state.draining.is_set)
        observers.begin(context)
        receive_body: Receive = receive  # type: ignore[assignment]  # as above
        answer: Send = context.send
        if is_head:
            receive_body, answer = _without_body(answer)
        try:
            if http["method"] != "OPTIONS" or not await self._refuse_preflight(http, receive_body, answer):
                await super().__call__(http, receive_body, answer)
        finally:
            if is_head:
                http["method"] = "HEAD"
            if context.message:
                context.message = self.state.server_state.keyring.redact(context.message)
            context.finish()
            observers.end(context)

    async def _refuse_preflight(self, scope: HTTPScope, receive: Receive, send: Send) -> bool:
        """Answer a preflight of a forbidden origin with the JSON envelope; Litestar would answer in plain text."""
        if self.cors_config is None:
            return False
        origin = header(scope, b"origin")
        if not origin or self.cors_config.is_origin_allowed(origin):
            return False
        request = Request[Any, Any, Any](scope, receive, send)
        refusal = ClientException(f"Origin {origin[:100]!r} is not allowed; add it to CORS_ORIGINS")
        await answer_error(request, refusal).to_asgi_response(app=None, request=request)(scope, receive, send)
        return True


def _without_body(send: Send) -> tuple[Receive, Send]:
    """Wrap `send` for HEAD: pass the head of GET's response only. After it `receive` reports a disconnect, which ends
    event streams."""
    has_ended = asyncio.Event()

    async def receive() -> HTTPDisconnectEvent:
        await has_ended.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif not has_ended.is_set():
            has_ended.set()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return receive, send_head


def fold_model_id(path: str) -> str:
    """Percent-encode the model id in a path, slashes too: `/admin/models/BAAI/bge-m3/evict` → `…/BAAI%2Fbge-m3/evict`.

    Litestar's `{id:path}` matches the rest of a path, so nothing could follow it; an encoded id is a single segment.
    """
    if not path.startswith(_MODEL_ID_PREFIXES):
        return path
    for prefix, verbs in _MODEL_ID_ROUTES:
        if path.startswith(prefix):
            rest = path.removeprefix(prefix).strip("/")
            verb = next((verb for verb in verbs if rest.endswith(verb)), "")
            return prefix + quote(rest.removesuffix(verb), safe="") + verb
    return path


class while_client_stays:  # noqa: N801  # a context manager, named as `asyncio.timeout` is
    """Cancel the block when the client disconnects; Litestar does not. The request's body must have been read.

    Does what `asyncio.timeout` does, whose deadline would be the disconnect. A class, because the generator of
    `asynccontextmanager` and a timeout that hardly ever ends take 25 more calls a request.

    Raises:
        ClientLeft: the client disconnected.
    """

    __slots__ = ("_cancels_before", "_has_left", "_request", "_task", "_timer", "_watcher")

    def __init__(self, request: Request[Any, Any, Any]) -> None:
        self._request = request
        self._has_left = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "a request is served by a task"
        self._task, self._cancels_before = task, task.cancelling()
        self._timer = loop.call_later(_WATCH_AFTER_S, self._start_watching)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if not self._has_left:
            return
        is_own = self._task.uncancel() <= self._cancels_before
        if is_own and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientLeft from None

    def _start_watching(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()
