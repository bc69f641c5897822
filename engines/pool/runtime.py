"""What a host is told at its birth: its settings, and the parts of the world that a test may replace."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Protocol, TypeVar

from msgspec import Struct

from engines.device.health import DeviceHealth, ReadHealth
from engines.device.memory import DeviceMemory, device_memory
from engines.pool.estimates import Measurements
from engines.pool.slot import PoolPolicy
from engines.types import Budget


class Timer(Protocol):
    """A callback that has not run yet."""

    def cancel(self) -> None:
        """Forget it; no effect once it ran."""


class Time(Protocol):
    """Monotonic seconds, callbacks at a moment, and the wall clock."""

    def now_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` on the event loop at `at_s` of this clock, or soon when that is past."""

    def unix_s(self) -> float:
        """Seconds since 1970, for people and event streams."""


class LoopTime:
    """The running event loop's own clock."""

    def now_s(self) -> float:
        return (
            time.monotonic()
        )  # what asyncio's loops count in; uvloop's own time is cached, and too coarse for timings

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0.0, at_s - self.now_s()), callback)

    def unix_s(self) -> float:
        return time.time()


Result = TypeVar("Result")


class Task(Struct, frozen=True):
    """What a loader's thread is to do, in words, and for how long it may be at it before it counts as hanging."""

    name: str
    limit_s: float


class LoadLock:
    """A lock that knows what it is held for. A thread cannot be stopped, so all that can be done is to say so.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._holder: tuple[Task, float] | None = None

    @contextmanager
    def held(self, task: Task) -> Iterator[None]:
        """Inside, the task runs, and no other."""
        with self._lock:
            self._holder = (task, self._clock())
            try:
                yield
            finally:
                self._holder = None

    def locked(self) -> bool:
        """Whether a task runs."""
        return self._lock.locked()

    def hung(self, awake_s: float = inf) -> str:
        """Names the task that has been running for longer than it may; empty when none has. Thread-safe.

        Args:
            awake_s: seconds since this process last stood still; a task did nothing before, so no more of it count.
        """
        holder = self._holder
        if holder is None or min(self._clock() - holder[1], awake_s) <= holder[0].limit_s:
            return ""
        return f"{holder[0].name} has been running for more than {holder[0].limit_s:.0f} s"


LOAD_LOCK = LoadLock()
"""One load at a time in a process, whatever the host: of 100 loads on four threads 88 failed and 4 were silently wrong.

Unloads take it too, so that none of them blurs what a load measures.
"""


_NUM_ASKERS = 16
"""Questions are small, and a hub that is silent holds each of them for most of a minute."""


class Workers(Protocol):
    """Where blocking work is done."""

    async def look(self, work: Callable[[], Result]) -> Result:
        """Short work on disk: never behind a download, or a hub that does not answer."""

    async def ask(self, work: Callable[[], Result]) -> Result:
        """A question to the hub."""

    async def fetch(self, work: Callable[[], Result]) -> Result:
        """A download, beside others."""

    async def load(self, work: Callable[[], Result], task: Task) -> Result:
        """Run after the loads, unloads and readings asked for before, of whatever host of this process."""

    def hung(self, awake_s: float) -> str:
        """Names what keeps every load of this process waiting, because it does not end; empty when nothing does.

        Args:
            awake_s: seconds since this process last stood still.
        """

    def close(self) -> None:
        """Take no more work; what runs is not waited for."""


class Threads:
    """Real threads, started when first needed."""

    def __init__(self, name: str, num_fetchers: int = 4, load_lock: LoadLock = LOAD_LOCK) -> None:
        self._name = name
        self._lookers = ThreadPoolExecutor(4, thread_name_prefix=f"look-{name}")
        self._askers = ThreadPoolExecutor(_NUM_ASKERS, thread_name_prefix=f"ask-{name}")
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix=f"fetch-{name}")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix=f"load-{name}")
        self._load_lock = load_lock

    async def look(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._lookers, work)

    async def ask(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._askers, work)

    async def fetch(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, work)

    async def load(self, work: Callable[[], Result], task: Task) -> Result:
        named = Task(f"{task.name} on {self._name}", task.limit_s)
        return await asyncio.get_running_loop().run_in_executor(self._loader, partial(self._locked, work, named))

    def hung(self, awake_s: float) -> str:
        return self._load_lock.hung(awake_s)

    def _locked(self, work: Callable[[], Result], task: Task) -> Result:
        with self._load_lock.held(task):
            return work()

    def close(self) -> None:
        for threads in (self._lookers, self._askers, self._fetchers, self._loader):
            threads.shutdown(wait=False, cancel_futures=True)


class HostConfig(Struct, frozen=True, kw_only=True):
    """One device.

    Args:
        device: `cpu` or `cuda:N`.
        workspace_bytes: the guess for a model that never ran here.
        measurements: the file that remembers what models took; None forgets at the end.
        conditions: settings on which the measured bytes depend, in any words; compared, and never read.
        watchdog_s: how long a forward pass may run before the device counts as down; a load, and all else that its
            thread does, has `hang_s`, and more for its bytes.
    """

    host_id: str
    device: str = "cpu"
    budget: Budget = Budget(fraction=0.8)
    workspace_bytes: int = 512 * 2**20
    rules: PoolPolicy = PoolPolicy()
    max_events: int = 2048
    num_fetchers: int = 4
    measurements: Path | None = None
    conditions: str = ""
    watchdog_s: float = 120.0

    @property
    def hang_s(self) -> float:
        """As long as the self-check of a load may take (`engines/device/health.py`)."""
        return 5.0 * self.watchdog_s


class HostRuntime(Struct, frozen=True, kw_only=True):
    """Clock, threads, device memory, chance. `measurements` is shared by all hosts of a process.

    `pulse`: how the device's lane goes.
    """

    time: Time
    workers: Workers
    memory: DeviceMemory
    measurements: Measurements
    jitter: Callable[[], float] = random.random
    health: ReadHealth = DeviceHealth


def default_runtime(config: HostConfig, measurements: Measurements | None = None) -> HostRuntime:
    """The world as it is."""
    return HostRuntime(
        time=LoopTime(),
        workers=Threads(config.host_id, config.num_fetchers),
        memory=device_memory(config.device),
        measurements=measurements or Measurements(config.measurements),
    )


def device_matches(device: str, wish: str) -> bool:
    """Whether a model whose registry entry says `device: wish` may run on `device`: `auto`, a kind, or one device."""
    return wish in ("auto", device, device.partition(":")[0])
