"""`WorkerConfig`: how a process creates its host. Importing this is cheap; `open_real_host` imports torch."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from engines.affinity import num_usable_cores
from engines.collection import freeze
from engines.host import Host
from engines.rpc.messages import Generation
from engines.spec import Eviction, ModelSpec
from engines.types import Budget, HostBudget
from router.config.settings import Settings
from router.registry.registry import Registry

if TYPE_CHECKING:
    from engines.machine import MachineConfig

_MAX_QUEUE_TEXTS = 8192
"""Texts that may wait for a model, unless MAX_QUEUE_SIZE is more: that one counts requests, of up to 2048 texts."""

CrashNote = Callable[[str], None]
"""Called with the models that a host runs from now on, one a line, so that a crash can be attributed to them."""


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """Everything a worker process or a replica needs to create its one host.

    `device`: `auto` takes the first one found. `cores`: its share of the machine's. `generation`: of `specs`.
    `open`: creates the host, not started; tests pass their own.
    """

    host_id: str
    device: str
    cores: int
    specs: Mapping[str, ModelSpec]
    budget: Budget
    settings: Settings
    open: Callable[["WorkerConfig", CrashNote], Host]
    generation: Generation = Generation()
    eviction: Eviction = "lru"
    host_budget: HostBudget = "auto"
    host_parts: int = 1

    @property
    def memory(self) -> "MemoryRules":
        """The rules of its memory."""
        return MemoryRules(
            budget=self.budget, eviction=self.eviction, host_budget=self.host_budget, host_parts=self.host_parts
        )


class MemoryRules(Struct, frozen=True, kw_only=True):
    """The memory that models may use, and which of them leaves it first.

    `host_budget`, `host_parts`: see `engines.machine.MachineConfig`.
    """

    budget: Budget
    eviction: Eviction = "lru"
    host_budget: HostBudget = "auto"
    host_parts: int = 1


def memory_rules(settings: Settings, registry: Registry) -> MemoryRules:
    """Return the rules of the settings, else of the registry."""
    return MemoryRules(
        budget=settings.memory_budget or registry.memory_budget,
        eviction=registry.eviction,
        host_budget=settings.host_memory_budget or registry.host_memory_budget or "auto",
    )


def machine_config(settings: Settings, memory: MemoryRules, devices: tuple[str, ...], cores: int) -> "MachineConfig":
    """Derive the `MachineConfig` from the settings."""
    from engines.machine import LoaderSettings, MachineConfig, PoolPolicy  # late: torch takes seconds to import

    return MachineConfig(
        devices=devices,
        budget=memory.budget,
        host_budget=memory.host_budget,
        host_parts=memory.host_parts,
        cores=cores,
        tokenizer_threads=settings.thread_pool_size,
        state_folder=settings.state_dir,
        watchdog_s=settings.watchdog_seconds,
        rules=PoolPolicy(eviction=memory.eviction),
        loader=LoaderSettings(
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_items=settings.max_batch_size,
            max_queue_items=max(settings.max_queue_size, _MAX_QUEUE_TEXTS),
            max_queue_requests=settings.max_queue_size,
            batch_timeout_s=settings.batch_timeout_s,
            target_dim=settings.target_dim,
        ),
    )


def open_real_host(config: WorkerConfig, note: CrashNote) -> Host:
    """Create one host on a device of this machine.

    Raises:
        InvalidValue: the device does not exist.
    """
    from engines.machine import Machine, find_devices  # late, as above

    device = find_devices((config.device,))[0]
    machine = machine_config(config.settings, config.memory, (device,), config.cores)
    return Machine(structs.replace(machine, host_id=config.host_id, note=note), config.specs).hosts[0]


async def start_host(host: Host) -> None:
    """Start the one host of this process. What exists then is garbage-collected no more, as in a server."""
    await host.start()
    freeze()


def divide_budget(budget: Budget, parts: int) -> Budget:
    """Divide the budget among hosts that share one device's memory."""
    if budget.size_bytes is not None:
        return Budget(size_bytes=budget.size_bytes // parts)
    return Budget(fraction=(budget.fraction or 0.0) / parts)


def divide_cores(hosts: int) -> int:
    """Divide this process's cores among hosts."""
    return max(1, num_usable_cores() // hosts)
