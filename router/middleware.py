"""What happens around every request, before Litestar's router and after its answer: visits, folded ids, left clients.

Litestar's own middleware runs behind its router, so it sees neither unknown routes nor the path as it came.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import quote

from litestar import Litestar, Request
from litestar.enums import ScopeType
from litestar.types import HTTPScope, LifeSpanReceive, LifeSpanScope, LifeSpanSend, Receive, Scope, Send

from router.errors import ClientLeft
from router.observers import Observers
from router.visit import Visit

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


class Edge(Litestar):
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
        http["path"] = fold_model_id(http["path"][:_MAX_PATH_CHARS])
        visit = Visit(http, cast(Send, send), is_last=self.state.yard.draining.is_set)
        observers: Observers = self.state.observers
        observers.begin(visit)
        try:
            await super().__call__(http, receive, visit.send)
        finally:
            visit.end()
            observers.end(visit)


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
