"""A world for tests: a clock turned by hand, threads that are not, a device of any size."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from engines.device.memory import MemoryReading
from engines.pool.runtime import Task

Result = TypeVar("Result")

TURNS = 60
"""Turns of the event loop that any chain of callbacks in these tests needs at the most."""


async def let_run(turns: int = TURNS) -> None:
    """Let everything that can run, run."""
    for _ in range(turns):
        await asyncio.sleep(0)


class FakeTimer:
    """See `engines.pool.runtime.Timer`."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeTime:
    """A clock that stands still until told to go on (`engines.pool.runtime.Time`)."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._num_timers = 0

    def now_s(self) -> float:
        return self._now_s

    def unix_s(self) -> float:
        return 1_700_000_000.0 + self._now_s

    def call_at(self, at_s: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(callback)
        self._num_timers += 1
        heapq.heappush(self._timers, (at_s, self._num_timers, timer))
        return timer

    async def sleep(self, seconds: float) -> None:
        """As `asyncio.sleep`, by this clock."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_at(self._now_s + seconds, lambda: None if awake.done() else awake.set_result(None))
        try:
            await awake
        finally:
            timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Time passes: timers ring in order, and what they set off runs before the next one."""
        await let_run()
        until_s = self._now_s + seconds
        while self._timers and self._timers[0][0] <= until_s:
            at_s, _, timer = heapq.heappop(self._timers)
            self._now_s = max(self._now_s, at_s)
            if timer.callback is not None:
                timer.callback()
                await let_run()
        self._now_s = until_s


class FakeMemory:
    """Fakes `engines.device.memory.DeviceMemory`; set `ceiling_bytes` to what other processes leave."""

    def __init__(self, total_bytes: int = 10**9) -> None:
        self.total_bytes = total_bytes
        self.ceiling_bytes: int | None = None
        self.reads = 0

    def read(self) -> MemoryReading:
        self.reads += 1
        return MemoryReading(self.total_bytes, self.ceiling_bytes)


class InlineWorkers:
    """Work runs on the event loop, a turn after it was asked for (`engines.pool.runtime.Workers`).

    Work of a kind (`look`, `ask`, `fetch`, `load`) can be held, so that a test decides when it ends.

    Attributes:
        hangs: set it to what is said to hang.
        tasks: what was to be done on the loader's thread.
    """

    def __init__(self) -> None:
        self.hangs = ""
        self.tasks: list[Task] = []
        self._held: set[str] = set()
        self._gates: dict[str, list[asyncio.Future[None]]] = defaultdict(list)

    def hold(self, kind: str) -> None:
        """Work of this kind waits from now on."""
        self._held.add(kind)

    def release(self, kind: str) -> None:
        """Held work of this kind goes on, in order."""
        self._held.discard(kind)
        for gate in self._gates.pop(kind, []):
            if not gate.done():
                gate.set_result(None)

    def waiting(self, kind: str) -> int:
        """How much work of this kind is held now."""
        return len(self._gates[kind])

    async def look(self, work: Callable[[], Result]) -> Result:
        return await self._run("look", work)

    async def ask(self, work: Callable[[], Result]) -> Result:
        return await self._run("ask", work)

    async def fetch(self, work: Callable[[], Result]) -> Result:
        return await self._run("fetch", work)

    async def load(self, work: Callable[[], Result], task: Task) -> Result:
        self.tasks.append(task)
        return await self._run("load", work)

    def hung(self, awake_s: float) -> str:
        return self.hangs

    async def _run(self, kind: str, work: Callable[[], Result]) -> Result:
        await asyncio.sleep(0)
        if kind in self._held:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._gates[kind].append(gate)
            await gate
        return work()

    def close(self) -> None:
        for kind in list(self._gates):
            self.release(kind)
