"""What happens around every request, before Litestar's router and after its answer: visits, folded ids, left clients,
HEAD, refused preflights.

Litestar's own middleware runs behind its router, so it sees neither unknown routes nor the path as it came.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
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

_FOLDED = (
    ("/v1/models/", ()),
    ("/admin/models/", ("/preload", "/evict")),
    ("/m/", ("/v1/embeddings",)),
)
"""Where a path holds a model id, and what may follow it."""
_MAX_PATH_CHARS = 2048
"""Litestar keeps the last 1,024 paths with what they lead to, and a client may choose 64 KiB for each. No path of this
server is as long as this, so what is cut is unknown."""
_PATIENCE_S = 0.25
"""Warm requests are done by then, and do not pay for a task that watches their client (65 µs)."""


class Application(Litestar):
    """Litestar, and around its router: folded model ids, and a visit for whoever observes requests."""

    async def __call__(
        self,
        scope: Scope | LifeSpanScope,
        receive: Receive | LifeSpanReceive,
        send: Send | LifeSpanSend,
    ) -> None:
        if scope["type"] != ScopeType.HTTP:
            await super().__call__(scope, receive, send)
            return
        http = cast(HTTPScope, scope)
        is_head = http["method"] == "HEAD"
        if is_head:
            http = {**http, "method": "GET"}
        http["path"] = fold_model_id(http["path"][:_MAX_PATH_CHARS])
        visit = RequestContext(http, cast(Send, send), is_last=self.state.server_state.draining.is_set)
        observers: Observers = self.state.observers
        observers.begin(visit)
        asked, answer = _without_body(visit.send) if is_head else (cast(Receive, receive), visit.send)
        try:
            if not await self._refuse_preflight(http, asked, answer):
                await super().__call__(http, asked, answer)
        finally:
            if is_head:
                http["method"] = "HEAD"
            visit.finish()
            observers.end(visit)

    async def _refuse_preflight(self, scope: HTTPScope, receive: Receive, send: Send) -> bool:
        """Answer a browser that asks for a page of an origin that may not call; Litestar would, in plain text."""
        if scope["method"] != "OPTIONS" or self.cors_config is None:
            return False
        origin = header(scope, b"origin")
        if not origin or self.cors_config.is_origin_allowed(origin):
            return False
        request = Request[Any, Any, Any](scope, receive, send)
        refusal = ClientException(
            f"Pages of {origin[:100]!r} may not call this server: CORS_ORIGINS names those that may"
        )
        await answer_error(request, refusal).to_asgi_response(app=None, request=request)(scope, receive, send)
        return True


def _without_body(send: Send) -> tuple[Receive, Send]:
    """For HEAD: what GET would answer, and of that the head. After it the client counts as one that has left, which
    ends streams of events."""
    is_over = asyncio.Event()

    async def receive() -> HTTPDisconnectEvent:
        await is_over.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif not is_over.is_set():
            is_over.set()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return receive, send_head


def fold_model_id(path: str) -> str:
    """Percent-encode the model id in a path, slashes too: `/admin/models/BAAI/bge-m3/evict` → `…/BAAI%2Fbge-m3/evict`.

    Litestar's `{id:path}` swallows the rest of a path, so nothing could follow it; a folded id is one plain segment.
    """
    for prefix, verbs in _FOLDED:
        if path.startswith(prefix):
            rest = path.removeprefix(prefix).strip("/")
            verb = next((verb for verb in verbs if rest.endswith(verb)), "")
            return prefix + quote(rest.removesuffix(verb), safe="") + verb
    return path


@asynccontextmanager
async def while_client_stays(request: Request[Any, Any, Any]) -> AsyncIterator[None]:
    """Cancel what runs inside when the client hangs up; Litestar does not. The request's body must have been read.

    Raises:
        ClientLeft: the client is gone.
    """
    loop = asyncio.get_running_loop()
    watchers: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        leave.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as leave:
            timer = loop.call_later(_PATIENCE_S, lambda: watchers.append(loop.create_task(watch())))
            try:
                yield
            finally:
                timer.cancel()
                for watcher in watchers:
                    watcher.cancel()
    except TimeoutError:
        if leave.expired():
            raise ClientLeft from None
        raise
