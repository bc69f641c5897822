"""A preload as a server-sent stream: the model's own events while it is on its way, and how it ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
from litestar import Request
from litestar.response.sse import ServerSentEventMessage

from engines.records import Event
from router.controllers.events import HEARTBEAT_S
from router.errors import describe

EVENT_STREAM = "text/event-stream"

_MAX_EVENTS = 1024
_LAST_EVENTS_S = 0.1
"""How long the stream waits for events that were on their way when the preload ended."""


def wants_stream(request: Request[Any, Any, Any]) -> bool:
    """Whether the client asks for events by name; `*/*` does not."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


async def preload_messages(
    request: Request[Any, Any, Any],
    events: AsyncIterator[Event],
    preload: Callable[[], Coroutine[Any, Any, msgspec.Struct]],
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[ServerSentEventMessage]:
    """`events` as `/admin/events` tells them; then one `done` with what `preload` gave, or one `error`.

    A client that leaves ends the waiting, and not the load.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | None] = asyncio.Queue(_MAX_EVENTS)
    follower = loop.create_task(_follow(events, queue))
    await asyncio.sleep(0)  # lets `events` subscribe before anything happens
    loading = loop.create_task(preload())
    loading.add_done_callback(lambda _: loop.call_later(_LAST_EVENTS_S, _put, queue, None))
    try:
        yield ServerSentEventMessage(data=None, comment="open")
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), heartbeat_s)
            except TimeoutError:
                yield ServerSentEventMessage(data=None, comment="still here")
                continue
            if event is None:
                break
            yield _message(event.kind, event)
        yield _ending(request, loading)
    finally:
        follower.cancel()
        loading.cancel()
        await asyncio.gather(follower, loading, return_exceptions=True)


async def _follow(events: AsyncIterator[Event], queue: asyncio.Queue[Event | None]) -> None:
    async for event in events:
        _put(queue, event)


def _put(queue: asyncio.Queue[Event | None], event: Event | None) -> None:
    """A client that reads slowly loses the oldest events, as on `/admin/events`."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)


def _ending(request: Request[Any, Any, Any], loading: asyncio.Task[msgspec.Struct]) -> ServerSentEventMessage:
    try:
        return _message("done", loading.result())
    except Exception as error:  # noqa: BLE001  # told as every route tells its errors
        return _message("error", describe(request, error)[1])


def _message(name: str, content: msgspec.Struct) -> ServerSentEventMessage:
    return ServerSentEventMessage(event=name, data=msgspec.json.encode(content).decode())
