"""What a host is told at its birth: its settings, and the parts of the world that a test may replace."""

import random
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from engines.clock import LoopTime, Time
from engines.measurements import Measurements
from engines.memory import DeviceMemory, device_memory
from engines.pulse import Pulse, ReadPulse
from engines.slots import Rules
from engines.units import Budget
from engines.workers import Threads, Workers


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
    rules: Rules = Rules()
    max_events: int = 2048
    num_fetchers: int = 4
    measurements: Path | None = None
    conditions: str = ""
    watchdog_s: float = 120.0

    @property
    def hang_s(self) -> float:
        """As long as the self-check of a load may take (`engines/pulse.py`)."""
        return 5.0 * self.watchdog_s


class World(Struct, frozen=True, kw_only=True):
    """Clock, threads, device memory, chance. `measurements` is shared by all hosts of a process.

    `pulse`: how the device's lane goes.
    """

    time: Time
    workers: Workers
    memory: DeviceMemory
    measurements: Measurements
    jitter: Callable[[], float] = random.random
    pulse: ReadPulse = Pulse


def real_world(config: HostConfig, measurements: Measurements | None = None) -> World:
    """The world as it is."""
    return World(
        time=LoopTime(),
        workers=Threads(config.host_id, config.num_fetchers),
        memory=device_memory(config.device),
        measurements=measurements or Measurements(config.measurements),
    )


def suits(device: str, wish: str) -> bool:
    """Whether a model whose registry entry says `device: wish` may run on `device`: `auto`, a kind, or one device."""
    return wish in ("auto", device, device.partition(":")[0])
