"""The last events of a host, numbered; anyone may follow along. A slow follower loses events, never holds one up."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import structlog
from msgspec import structs

from engines.pool.messages import Emit
from engines.types import Event

log = structlog.get_logger(__name__)


class EventLog:
    """A ring of events. `seq` rises by one; a gap in what a follower sees means: read the snapshot again."""

    def __init__(self, host_id: str, max_events: int = 2048) -> None:
        self._host_id = host_id
        self._ring: deque[Event] = deque(maxlen=max_events)
        self._arrival = asyncio.Event()
        self._is_closed = False
        self.last_seq = 0

    async def arrived(self, after: int) -> bool:
        """Wait for an event after that `seq`; False when there will be none."""
        while self.last_seq <= after and not self._is_closed:
            await self._arrival.wait()
        return self.last_seq > after

    def record(self, effect: Emit, time_s: float) -> None:
        """Number it, remember it, wake the followers; nobody is waited for."""
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
            **structs.asdict(effect.facts),
        )
        self._ring.append(event)
        self._wake()
        if event.kind == "state":
            log.info("model.state", model=event.model_id, source=event.source, target=event.target, cause=event.cause)
        if event.missing_bytes:  # memory is too small for the traffic: worth a person's attention
            log.warning("model.thrash", model=event.model_id, claimant=event.claimant, missing=event.missing_bytes)

    def close(self) -> None:
        """Followers end once they have seen what is remembered."""
        self._is_closed = True
        self._wake()

    def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Events from this call on; with `after`, the remembered ones since that `seq` first.

        A number from an earlier life of the host, larger than any given out here, brings all that is remembered.
        """
        seen = self.last_seq if after is None else after if after <= self.last_seq else 0
        return self._follow(seen)

    def since(self, after: int) -> list[Event]:
        """The remembered events after that `seq`, for those who come and look instead of following."""
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
        """A copy: the ring turns while a follower is busy with an event."""
        newer: list[Event] = []
        for event in reversed(self._ring):
            if event.seq <= seen:
                break
            newer.append(event)
        return newer[::-1]

    def _wake(self) -> None:
        self._arrival.set()
        self._arrival.clear()
