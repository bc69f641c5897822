"""Numbers, remembers and logs the events of one host."""

from collections.abc import AsyncIterator
from contextvars import Context

import structlog
from msgspec import structs

from engines.event_ring import EventRing
from engines.pool.messages import Emit
from engines.types import Event, format_bytes

log = structlog.get_logger(__name__)


class EventLog:
    """The last events of a host. `seq` rises by one; a follower that sees a gap must read the snapshot again."""

    def __init__(self, host_id: str, max_events: int = 2048) -> None:
        self._host_id = host_id
        self._ring = EventRing(max_events)

    @property
    def last_seq(self) -> int:
        """Returns the `seq` of the last event; 0 before the first."""
        return self._ring.last

    async def arrived(self, after: int) -> bool:
        """Waits for an event after that `seq`; returns False when there will be none."""
        return await self._ring.arrived(after)

    def record(self, effect: Emit, time_s: float) -> None:
        """Numbers an event, remembers it and wakes the followers, of which it awaits none."""
        event = Event(
            seq=self._ring.last + 1,
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
        Context().run(_log_event, event)

    def close(self) -> None:
        """Ends the followers once they have seen what is remembered."""
        self._ring.close()

    def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Yields events from this call on; with `after`, the remembered ones since that `seq` first.

        A number from an earlier process of the host, larger than any given out here, brings all that is remembered.
        """
        return self._ring.follow(self.last_seq if after is None else self._position(after))

    def since(self, after: int) -> list[Event]:
        """Returns the remembered events after that `seq`."""
        return self._ring.since(self._position(after))

    def _position(self, after: int) -> int:
        return after if after <= self.last_seq else 0


def _log_event(event: Event) -> None:
    """Logs an event. Runs in a context of its own: timers and tasks of the pool are often started by a request, and
    its id would be on lines that have nothing to do with it, an eviction or the shutdown."""
    place = {"model": event.model_id, "host": event.host_id}
    if event.kind == "state":
        write = log.error if event.target == "failed" else log.info
        more: dict[str, object] = {"cause": event.cause} if event.cause else {}
        if event.seconds:
            more["seconds"] = round(event.seconds, 3)
        write("model.state", **place, **{"from": event.source, "to": event.target}, **more)
    if event.missing_bytes:  # memory is too small for the traffic: an operator should see it
        missing = format_bytes(event.missing_bytes)
        log.warning(
            "model.thrash", **place, claimant=event.claimant, missing=missing, missing_bytes=event.missing_bytes
        )
