"""Fake dependencies of a host: a manual clock, workers without threads, a device of any size."""

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from engines.device.memory import MemoryReading
from engines.pool.runtime import LoaderTask

Result = TypeVar("Result")

TURNS = 60
"""Enough iterations of the event loop for the longest chain of callbacks in these tests."""


async def let_run(turns: int = TURNS) -> None:
    """Runs the event loop until everything that can run has run."""
    for _ in range(turns):
        await asyncio.sleep(0)


class FakeTimer:
    """Fakes `engines.pool.runtime.Timer`."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeTime:
    """A clock that stands still until `advance` (`engines.pool.runtime.Time`)."""

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
        """Sleeps like `asyncio.sleep`, by this clock."""
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
        """Advances the clock; timers fire in order, and their callbacks finish before the next one."""
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
    """Fakes `engines.device.memory.DeviceMemory`; set `ceiling_bytes` to the memory that other processes leave."""

    def __init__(self, total_bytes: int = 10**9) -> None:
        self.total_bytes = total_bytes
        self.ceiling_bytes: int | None = None
        self.reads = 0

    def read(self) -> MemoryReading:
        self.reads += 1
        return MemoryReading(self.total_bytes, self.ceiling_bytes)


class InlineWorkers:
    """Runs work on the event loop, in its next iteration (`engines.pool.runtime.Workers`).

    Work of a kind (`read_disk`, `query_hub`, `fetch`, `load`) can be held, so that a test decides when it ends.

    Attributes:
        hangs: the return value of `hung`.
        tasks: the tasks of the loader's thread so far.
    """

    def __init__(self) -> None:
        self.hangs = ""
        self.tasks: list[LoaderTask] = []
        self._held: set[str] = set()
        self._gates: dict[str, list[asyncio.Future[None]]] = defaultdict(list)

    def hold(self, kind: str) -> None:
        """Holds work of this kind from now on."""
        self._held.add(kind)

    def release(self, kind: str) -> None:
        """Releases held work of this kind, in order."""
        self._held.discard(kind)
        for gate in self._gates.pop(kind, []):
            if not gate.done():
                gate.set_result(None)

    def waiting(self, kind: str) -> int:
        """Counts the held work of this kind."""
        return len(self._gates[kind])

    async def read_disk(self, work: Callable[[], Result]) -> Result:
        return await self._run("read_disk", work)

    async def query_hub(self, work: Callable[[], Result]) -> Result:
        return await self._run("query_hub", work)

    async def fetch(self, work: Callable[[], Result]) -> Result:
        return await self._run("fetch", work)

    async def load(self, work: Callable[[], Result], task: LoaderTask) -> Result:
        self.tasks.append(task)
        return await self._run("load", work)

    def hung(self, since_pause_s: float) -> str:
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
