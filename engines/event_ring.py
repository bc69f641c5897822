"""Remembers the last events in a ring, which any number of followers read at their own pace."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice

from engines.types import Event


class EventRing:
    """The last events in the order of arrival, at positions that rise by one from 1. Lives on one event loop.

    A follower that is slow loses events and holds nothing up.

    Attributes:
        last: position of the last event; 0 before the first.
    """

    def __init__(self, max_events: int) -> None:
        self._events: deque[Event] = deque(maxlen=max_events)
        self._arrival = asyncio.Event()
        self._is_closed = False
        self.last = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def append(self, event: Event) -> None:
        """Remembers an event and wakes the followers."""
        self.last += 1
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Ends the followers once they have seen what is remembered."""
        self._is_closed = True
        self._wake()

    def since(self, position: int) -> list[Event]:
        """Returns the remembered events after a position, the oldest first."""
        newer = [*islice(reversed(self._events), max(0, self.last - position))]
        return newer[::-1]

    async def arrived(self, position: int) -> bool:
        """Waits for an event after a position; returns False when there will be none."""
        while self.last <= position and not self._is_closed:
            await self._arrival.wait()
        return self.last > position

    async def follow(self, position: int, first: Iterable[Event] = ()) -> AsyncIterator[Event]:
        """Yields `first`, then the events after a position as they arrive."""
        for event in first:
            yield event
        while True:
            newer = self.since(position)  # a copy: the ring changes while a follower is busy with an event
            position = self.last - len(newer)
            for event in newer:
                position += 1
                yield event
            if self.last <= position and not await self.arrived(position):
                return

    def _wake(self) -> None:
        self._arrival.set()
        self._arrival.clear()
