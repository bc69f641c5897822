"""The backend's events as a server-sent stream. Knows no routes."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
from litestar import Request
from litestar.response.sse import ServerSentEventMessage

from engines.types import Event
from router.errors import describe

EVENT_STREAM = "text/event-stream"


_MAX_EVENTS = 1024


_LAST_EVENTS_S = 0.1
"""How long the stream waits for events that were on their way when the preload ended."""


def wants_stream(request: Request[Any, Any, Any]) -> bool:
    """Whether the client asks for events by name; `*/*` does not."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


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


HEARTBEAT_S = 15.0
"""Proxies cut connections that are silent for a minute or less."""


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


_MAX_ID_CHARS = 2**14
"""It is said again with each event; 256 hosts take half of it."""


_SEQ = re.compile(r"[0-9]{1,18}", re.ASCII)
"""A number that every host can be told: it has 64 bits."""


def parse_last_event_id(text: str) -> dict[str, int]:
    """The last `seq` seen of each host, as `event_messages` wrote it. What cannot be read is left out."""
    if len(text) > _MAX_ID_CHARS:
        return {}
    return {host_id: int(seq) for host_id, seq in parse_qsl(text) if _SEQ.fullmatch(seq)}


async def event_messages(
    events: AsyncIterator[Event],
    after: Mapping[str, int],
    closing: asyncio.Event,
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[ServerSentEventMessage]:
    """Each event under an id that names the last `seq` of every host; a comment when nothing happens.

    Ends when `closing` is set: a stream that stayed open would hold the server's shutdown.
    """
    seen = dict(after)
    closed = asyncio.create_task(closing.wait())
    upcoming = asyncio.ensure_future(anext(events))
    try:
        await asyncio.sleep(0)  # lets `events` subscribe before the client hears from us
        yield ServerSentEventMessage(data=None, comment="open")
        while not closed.done():
            await asyncio.wait({upcoming, closed}, timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                yield ServerSentEventMessage(data=None, comment="still here")
                continue
            event = upcoming.result()
            upcoming = asyncio.ensure_future(anext(events))
            seen[event.host_id] = event.seq
            yield ServerSentEventMessage(id=urlencode(seen), event=event.kind, data=msgspec.json.encode(event).decode())
    except StopAsyncIteration:
        return
    finally:
        upcoming.cancel()
        closed.cancel()
