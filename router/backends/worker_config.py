"""Settings → hosts with real devices, wherever they run. Importing it is cheap; what it opens imports torch."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from engines.host import Host
from engines.rpc.messages import Generation
from engines.spec import ModelSpec
from engines.types import Budget
from router.config.settings import Settings, usable_cores

if TYPE_CHECKING:
    from engines.machine import MachineConfig

CrashNote = Callable[[str], None]
"""Told which models a host runs from now on, one a line: the last word of a process that dies of one of them."""


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """All that a process or a replica is told to make its one host.

    `device`: `auto` takes the first there is. `cores`: its share of the machine's. `generation`: of `specs`.
    `open`: makes the host, not started; a test gives its own.
    """

    host_id: str
    device: str
    cores: int
    specs: Mapping[str, ModelSpec]
    budget: Budget
    settings: Settings
    open: Callable[["WorkerConfig", CrashNote], Host]
    generation: Generation = Generation()


def machine_config(settings: Settings, budget: Budget, devices: tuple[str, ...], cores: int) -> "MachineConfig":
    """What the settings say about this machine."""
    from engines.machine import LoaderSettings, MachineConfig  # late: torch takes seconds to import

    return MachineConfig(
        devices=devices,
        budget=budget,
        cores=cores,
        tokenizer_threads=settings.thread_pool_size,
        state_folder=settings.state_dir,
        watchdog_s=settings.watchdog_seconds,
        loader=LoaderSettings(
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_items=settings.max_batch_size,
            max_queue_items=settings.max_queue_size,
            batch_timeout_s=settings.batch_timeout_s,
            target_dim=settings.target_dim,
        ),
    )


def open_real_host(birth: WorkerConfig, note: CrashNote) -> Host:
    """One host on a device of this machine.

    Raises:
        InvalidValue: the device is not here.
    """
    from engines.machine import Machine, find_devices  # late, as above

    device = find_devices((birth.device,))[0]
    config = machine_config(birth.settings, birth.budget, (device,), birth.cores)
    return Machine(structs.replace(config, host_id=birth.host_id, note=note), birth.specs).hosts[0]


def share(budget: Budget, parts: int) -> Budget:
    """The budget of each of so many hosts that share one device's memory."""
    if budget.size_bytes is not None:
        return Budget(size_bytes=budget.size_bytes // parts)
    return Budget(fraction=(budget.fraction or 0.0) / parts)


def cores_each(hosts: int) -> int:
    """The share of this process's cores for each of so many hosts."""
    return max(1, usable_cores() // hosts)
