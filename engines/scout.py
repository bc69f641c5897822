"""What is known of models before anyone loads them: are their files here, and what will they take?"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable

from engines.pool_events import PoolEvent
from engines.pool_work import OutsideWork
from engines.slots import Slot

LOOK_S = 5.0
"""How long a look around is waited for; what has not been seen by then is seen later, or when it is asked for."""


class Scout:
    """Looks on threads, and tells the pool's machine by `step`. `spawn` keeps the tasks until they end."""

    def __init__(
        self,
        work: OutsideWork,
        step: Callable[[PoolEvent], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        self._work = work
        self._step = step
        self._spawn = spawn

    async def look_around(self, slots: Iterable[Slot]) -> None:
        """On disk, without the network, all at once."""
        looks = [self._spawn(self._look(slot)) for slot in slots]
        if looks:
            await asyncio.wait(looks, timeout=LOOK_S)

    async def size(self, slot: Slot) -> None:
        """Where it is not known yet: on disk, else a few kilobytes of the hub's."""
        if slot.need is None:
            await self._look(slot)
        if slot.need is None:
            self._tell(await self._work.size(slot.slot_id, slot.spec))

    async def _look(self, slot: Slot) -> None:
        self._tell(await self._work.look_around(slot.slot_id, slot.spec))

    def _tell(self, event: PoolEvent | None) -> None:
        if event is not None:
            self._step(event)
