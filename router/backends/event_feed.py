"""Events of hosts that live elsewhere, remembered here for whoever follows. Knows no transport."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping

from engines.types import Event

MAX_EVENTS = 8192


class EventFeed:
    """The last events of all hosts, in the order of arrival. A slow follower loses events, never holds one up."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._ring: deque[tuple[int, Event]] = deque(maxlen=max_events)
        self._count = 0
        self._last_seqs: dict[str, int] = {}
        self._arrival = asyncio.Event()
        self._is_closed = False

    def last_seq(self, host_id: str) -> int:
        """Of the host's last event here; 0 before the first."""
        return self._last_seqs.get(host_id, 0)

    def add(self, event: Event) -> None:
        """Remember it and wake the followers."""
        self._count += 1
        self._ring.append((self._count, event))
        self._last_seqs[event.host_id] = event.seq
        self._wake()

    def close(self) -> None:
        """Followers end once they have seen what is remembered."""
        self._is_closed = True
        self._wake()

    def follow(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        """Events from this call on; first, of the hosts in `after`, the remembered ones since that `seq`.

        A number larger than any given out here, from another life of the server, brings all that is remembered.
        """
        since = {host_id: seq if seq <= self.last_seq(host_id) else 0 for host_id, seq in (after or {}).items()}
        missed = [event for _, event in self._ring if event.seq > since.get(event.host_id, event.seq)]
        return self._follow(missed, self._count)

    async def _follow(self, missed: list[Event], seen: int) -> AsyncIterator[Event]:
        for event in missed:
            yield event
        while True:
            for at, event in [entry for entry in self._ring if entry[0] > seen]:
                seen = at
                yield event
            if self._count > seen:
                continue
            if self._is_closed:
                return
            await self._arrival.wait()

    def _wake(self) -> None:
        self._arrival.set()
        self._arrival.clear()
