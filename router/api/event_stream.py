"""Turns the backend's events into server-sent events."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
from litestar import Request
from litestar.response.sse import ServerSentEventMessage

from engines.types import Event
from router.errors import describe

EVENT_STREAM = "text/event-stream"
_MAX_EVENTS = 1024

_LINGER_S = 0.1
"""How long the stream stays open after the preload has ended, for events still in transit."""


def wants_stream(request: Request[Any, Any, Any]) -> bool:
    """Whether the client accepts `text/event-stream` explicitly; `*/*` does not count."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


async def _forward(events: AsyncIterator[Event], queue: asyncio.Queue[Event | None]) -> None:
    async for event in events:
        _put(queue, event)


def _put(queue: asyncio.Queue[Event | None], event: Event | None) -> None:
    """Add an event; if the queue is full, drop the oldest, as on `/admin/events`."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)


def _final_message(request: Request[Any, Any, Any], loading: asyncio.Task[msgspec.Struct]) -> ServerSentEventMessage:
    try:
        return _message("done", loading.result())
    except Exception as error:  # noqa: BLE001  # answered like the errors of every route
        return _message("error", describe(request, error)[1])


def _message(name: str, content: msgspec.Struct) -> ServerSentEventMessage:
    return ServerSentEventMessage(event=name, data=msgspec.json.encode(content).decode())


HEARTBEAT_S = 15.0
"""Proxies close connections that are idle for a minute or less."""


Loading = asyncio.Task[msgspec.Struct]


async def follow_preload(
    events: AsyncIterator[Event], preload: Callable[[], Coroutine[Any, Any, msgspec.Struct]], heartbeat_s: float
) -> AsyncGenerator[Event | Loading | None]:
    """Run `preload`; yield `events`, None after each `heartbeat_s` without one, and last the task that has ended.

    A client that disconnects cancels the waiting, not the load.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | None] = asyncio.Queue(_MAX_EVENTS)
    forwarder = loop.create_task(_forward(events, queue))
    await asyncio.sleep(0)  # lets `events` subscribe before the load starts
    loading = loop.create_task(preload())
    loading.add_done_callback(lambda _: loop.call_later(_LINGER_S, _put, queue, None))
    try:
        yield None
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), heartbeat_s)
            except TimeoutError:
                yield None
                continue
            if event is None:
                break
            yield event
        yield loading
    finally:
        forwarder.cancel()
        loading.cancel()
        await asyncio.gather(forwarder, loading, return_exceptions=True)


async def preload_messages(
    request: Request[Any, Any, Any],
    events: AsyncIterator[Event],
    preload: Callable[[], Coroutine[Any, Any, msgspec.Struct]],
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[ServerSentEventMessage]:
    """Stream `events`, then one `done` with the result of `preload`, or one `error`."""
    comment = "open"
    async with aclosing(follow_preload(events, preload, heartbeat_s)) as steps:
        async for step in steps:
            if step is None:
                yield ServerSentEventMessage(data=None, comment=comment)
                comment = "still here"
            elif isinstance(step, Event):
                yield _message(step.kind, step)
            else:
                yield _final_message(request, step)


async def events_of_model(events: AsyncIterator[Event], model_id: str) -> AsyncIterator[Event]:
    """Yield the events of one model."""
    async for event in events:
        if event.model_id == model_id:
            yield event


_MAX_ID_CHARS = 2**14
"""The id is repeated with each event; 256 hosts take half of this."""

_SEQ = re.compile(r"[0-9]{1,18}", re.ASCII)
"""At most 18 digits, so that the number fits into 64 bits."""


def parse_last_event_id(text: str) -> dict[str, int]:
    """Parse the id that `event_messages` wrote: the last `seq` of each host. Invalid parts are ignored."""
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
    """Stream each event with an id that holds the last `seq` of every host, and a comment as heartbeat.

    Ends when `closing` is set: an open stream would delay the server's shutdown.
    """
    seen = dict(after)
    closed = asyncio.create_task(closing.wait())
    upcoming = asyncio.ensure_future(anext(events))
    try:
        await asyncio.sleep(0)  # lets `events` subscribe before the client gets the first byte
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
