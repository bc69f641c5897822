"""The backend's events as a server-sent stream. Knows no routes."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from urllib.parse import parse_qsl, urlencode

import msgspec
from litestar.response.sse import ServerSentEventMessage

from engines.records import Event

HEARTBEAT_S = 15.0
"""Proxies cut connections that are silent for a minute or less."""
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
