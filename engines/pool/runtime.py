"""Settings of a host (`HostConfig`) and its replaceable dependencies (`HostRuntime`): clock, threads, device memory."""

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
from engines.form_cache import FormCache
from engines.pool.estimates import Measurements
from engines.pool.pool_group import PoolGroup
from engines.pool.slot import PoolPolicy
from engines.precision import PrecisionStore
from engines.types import Budget


class Timer(Protocol):
    """A scheduled callback."""

    def cancel(self) -> None:
        """Cancels the callback; no effect once it has run."""


class Time(Protocol):
    """A monotonic clock, timers, and the wall clock."""

    def now_s(self) -> float:
        """Returns monotonic seconds since an arbitrary start."""

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        """Runs `callback` on the event loop at `at_s` of this clock, or soon if that has passed."""

    def unix_s(self) -> float:
        """Returns Unix seconds, for people and event streams."""


class LoopTime:
    """The clock and timers of the running event loop."""

    now_s = staticmethod(time.monotonic)  # as asyncio's loops; uvloop caches its own time, too coarse for timings

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0.0, at_s - self.now_s()), callback)

    def unix_s(self) -> float:
        return time.time()


Result = TypeVar("Result")


class LoaderTask(Struct, frozen=True):
    """Work for the loader's thread: a name for messages, and the seconds after which it counts as hanging."""

    name: str
    limit_s: float


class LoadLock:
    """A lock that records its task, to report one that hangs: a thread cannot be stopped.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._holder: tuple[LoaderTask, float] | None = None
        self._reported: tuple[LoaderTask, float] | None = None

    @contextmanager
    def held(self, task: LoaderTask) -> Iterator[None]:
        """Holds the lock for the task inside the block."""
        with self._lock:
            self._holder = (task, self._clock())
            try:
                yield
            finally:
                self._holder = None

    def locked(self) -> bool:
        """Tells whether a task runs."""
        return self._lock.locked()

    def hung(self, since_pause_s: float = inf) -> str:
        """Describes the task if it has exceeded its limit, else returns an empty string. Callable from any thread.

        A task that was described once is described until it ends: a pause afterwards does not make it run again.

        Args:
            since_pause_s: seconds since the last pause of this process (`PauseDetector`); earlier time does not count,
                as the task did not run.
        """
        holder = self._holder
        if holder is None:
            return ""
        if holder is not self._reported and min(self._clock() - holder[1], since_pause_s) <= holder[0].limit_s:
            return ""
        self._reported = holder
        return f"{holder[0].name} has been running for more than {holder[0].limit_s:.0f} s"


LOAD_LOCK = LoadLock()
"""One load at a time in a process, for all hosts: of 100 loads on four threads 88 failed and 4 were silently wrong.

Unloads hold it too, so that they do not distort the memory that a load measures.
"""

_NUM_HUB_THREADS = 16
"""Queries are small, but a hub that does not respond blocks each of them for most of a minute."""


class Workers(Protocol):
    """Runs blocking work."""

    async def read_disk(self, work: Callable[[], Result]) -> Result:
        """Runs short disk work, never queued behind downloads or hub queries."""

    async def query_hub(self, work: Callable[[], Result]) -> Result:
        """Runs a query to the hub."""

    async def fetch(self, work: Callable[[], Result]) -> Result:
        """Runs a download, concurrently with others."""

    async def load(self, work: Callable[[], Result], task: LoaderTask) -> Result:
        """Runs a load, an unload or a reading of the device; one at a time for all hosts of this process, in order."""

    def hung(self, since_pause_s: float) -> str:
        """Describes the task that hangs and blocks all loads of this process; empty if none does.

        Args:
            since_pause_s: seconds since the last pause of this process.
        """

    def close(self) -> None:
        """Accepts no more work; does not wait for running work."""


class Threads:
    """Thread pools, whose threads start when first needed."""

    def __init__(self, name: str, num_fetch_threads: int = 4, load_lock: LoadLock = LOAD_LOCK) -> None:
        self._name = name
        self._disk_threads = ThreadPoolExecutor(4, thread_name_prefix=f"disk-{name}")
        self._hub_threads = ThreadPoolExecutor(_NUM_HUB_THREADS, thread_name_prefix=f"hub-{name}")
        self._fetch_threads = ThreadPoolExecutor(num_fetch_threads, thread_name_prefix=f"fetch-{name}")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix=f"load-{name}")
        self._load_lock = load_lock

    async def read_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, work)

    async def query_hub(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._hub_threads, work)

    async def fetch(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._fetch_threads, work)

    async def load(self, work: Callable[[], Result], task: LoaderTask) -> Result:
        named = LoaderTask(f"{task.name} on {self._name}", task.limit_s)
        return await asyncio.get_running_loop().run_in_executor(self._load_thread, partial(self._locked, work, named))

    def hung(self, since_pause_s: float) -> str:
        return self._load_lock.hung(since_pause_s)

    def _locked(self, work: Callable[[], Result], task: LoaderTask) -> Result:
        with self._load_lock.held(task):
            return work()

    def close(self) -> None:
        for threads in (self._disk_threads, self._hub_threads, self._fetch_threads, self._load_thread):
            threads.shutdown(wait=False, cancel_futures=True)


_GUESSED_BATCH_BYTES = 512 * 2**20
"""What a batch is guessed to need where no load has measured it; on a CPU, the batches of all cores together."""

GPU_THREADS = 2
"""Batches that run at once on a GPU: while one waits for its results, the next one is prepared and queued there."""


def guessed_workspace_bytes(device: str) -> int:
    """Returns the guess for a model without a measurement: a batch for each that runs at once."""
    return _GUESSED_BATCH_BYTES * (1 if device == "cpu" else GPU_THREADS)


class HostConfig(Struct, frozen=True, kw_only=True):
    """Settings of a host.

    Args:
        device: `cpu` or `cuda:N`.
        host_budget_bytes: main memory for parked models; 0 parks none. `default_host_bytes`: where nobody has set it.
            Hosts of one machine, `host_parts` of them, have equal parts of a budget that is set later.
        workspace_bytes: the guess for a model without a measurement.
        measurements: the file that stores measurements; None keeps them in memory only.
        conditions: the settings that measured bytes depend on, as opaque text that is only compared.
        watchdog_s: how long a forward pass may run before the device counts as down. Work on the loader's thread may
            run for `hang_s`, and a load for longer, by its bytes.
    """

    host_id: str
    device: str = "cpu"
    budget: Budget = Budget(fraction=0.8)
    host_budget_bytes: int = 0
    default_host_bytes: int = 0
    host_parts: int = 1
    workspace_bytes: int = _GUESSED_BATCH_BYTES
    rules: PoolPolicy = PoolPolicy()
    max_events: int = 2048
    num_fetch_threads: int = 4
    measurements: Path | None = None
    conditions: str = ""
    watchdog_s: float = 120.0

    @property
    def hang_s(self) -> float:
        """The limit for work on the loader's thread, as for self-checks (`engines/device/health.py`)."""
        return 5.0 * self.watchdog_s


class HostRuntime(Struct, frozen=True, kw_only=True):
    """The dependencies of a host that tests replace. `measurements` is shared by all hosts of a process.

    `jitter`: random numbers in [0, 1). `health`: reads the health of the device's scheduler. `precisions`: the loader's
    knowledge of reduced dtypes, and `form_cache`: its quantised weights on disk; see `ReducedForms`. `group`: the pools
    over whose devices models may be split; None: this one alone.
    """

    time: Time
    workers: Workers
    memory: DeviceMemory
    measurements: Measurements
    jitter: Callable[[], float] = random.random
    health: ReadHealth = DeviceHealth
    precisions: PrecisionStore | None = None
    form_cache: FormCache | None = None
    group: PoolGroup | None = None


def default_runtime(config: HostConfig, measurements: Measurements | None = None) -> HostRuntime:
    """Builds the production dependencies."""
    return HostRuntime(
        time=LoopTime(),
        workers=Threads(config.host_id, config.num_fetch_threads),
        memory=device_memory(config.device),
        measurements=measurements or Measurements(config.measurements),
    )


def device_matches(device: str, wish: str) -> bool:
    """Tells whether a model whose `device` is `wish` (`auto`, a kind or a device) may run on `device`."""
    return wish in ("auto", device, device.partition(":")[0])
