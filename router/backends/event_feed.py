"""Remembers events of hosts in other processes, in the order of arrival. Knows no transport."""

from collections.abc import AsyncIterator, Mapping

from engines.event_ring import EventRing
from engines.types import Event

MAX_EVENTS = 8192


class EventFeed:
    """The last events of all hosts. A slow follower loses events and holds nothing up."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._ring = EventRing(max_events)
        self._last_seqs: dict[str, int] = {}

    def last_seq(self, host_id: str) -> int:
        """Returns the `seq` of the host's last event here; 0 before the first."""
        return self._last_seqs.get(host_id, 0)

    def add(self, event: Event) -> None:
        """Remembers an event and wakes the followers."""
        self._last_seqs[event.host_id] = event.seq
        self._ring.append(event)

    def close(self) -> None:
        """Ends the followers once they have seen what is remembered."""
        self._ring.close()

    def follow(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        """Yields events from this call on; first, of the hosts in `after`, the remembered ones since that `seq`.

        A number larger than any given out here, from an earlier process of the server, brings all that is remembered.
        """
        since = {host_id: seq if seq <= self.last_seq(host_id) else 0 for host_id, seq in (after or {}).items()}
        missed = [event for event in self._ring if event.seq > since.get(event.host_id, event.seq)]
        return self._ring.follow(self._ring.last, missed)
