"""Retains the last events of a host for any number of followers. A slow follower loses events; it never blocks."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import structlog
from msgspec import structs

from engines.pool.messages import Emit
from engines.types import Event

log = structlog.get_logger(__name__)


class EventLog:
    """A ring buffer of events. `seq` rises by one; a follower that sees a gap has to read the snapshot again."""

    def __init__(self, host_id: str, max_events: int = 2048) -> None:
        self._host_id = host_id
        self._ring: deque[Event] = deque(maxlen=max_events)
        self._arrival = asyncio.Event()
        self._is_closed = False
        self.last_seq = 0

    async def arrived(self, after: int) -> bool:
        """Waits for an event with a `seq` higher than `after`; returns False if the log is closed first."""
        while self.last_seq <= after and not self._is_closed:
            await self._arrival.wait()
        return self.last_seq > after

    def record(self, effect: Emit, time_s: float) -> None:
        """Numbers and retains an event and wakes the followers, without waiting for them."""
        self.last_seq += 1
        event = Event(
            seq=self.last_seq,
            time_s=time_s,
            host_id=self._host_id,
            model_id=effect.model_id,
            kind=effect.kind,
            source=effect.source,
            target=effect.target,
            cause=effect.cause,
            claimant=effect.claimant,
            done_bytes=effect.done_bytes,
            total_bytes=effect.total_bytes,
            missing_bytes=effect.missing_bytes,
            **structs.asdict(effect.details),
        )
        self._ring.append(event)
        self._wake()
        if event.kind == "state":
            log.info("model.state", model=event.model_id, source=event.source, target=event.target, cause=event.cause)
        if event.missing_bytes:  # memory is too small for the traffic: an operator should see it
            log.warning("model.thrash", model=event.model_id, claimant=event.claimant, missing=event.missing_bytes)

    def close(self) -> None:
        """Closes the log; followers end after the retained events."""
        self._is_closed = True
        self._wake()

    def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Yields events from this call on; with `after`, the retained events with a higher `seq` first.

        An `after` larger than any number of this log, from before a restart of the host, yields all retained events.
        """
        seen = self.last_seq if after is None else after if after <= self.last_seq else 0
        return self._follow(seen)

    def since(self, after: int) -> list[Event]:
        """Returns the retained events with a higher `seq`, for callers that poll."""
        return self._since(after if after <= self.last_seq else 0)

    async def _follow(self, seen: int) -> AsyncIterator[Event]:
        while True:
            for event in self._since(seen):
                seen = event.seq
                yield event
            if self._ring and self._ring[-1].seq > seen:
                continue
            if self._is_closed:
                return
            await self._arrival.wait()

    def _since(self, seen: int) -> list[Event]:
        """Copies the newer events, as the ring changes while a follower handles one."""
        newer: list[Event] = []
        for event in reversed(self._ring):
            if event.seq <= seen:
                break
            newer.append(event)
        return newer[::-1]

    def _wake(self) -> None:
        self._arrival.set()
        self._arrival.clear()
