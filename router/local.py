"""Settings and registry → hosts in this process. Importing it is cheap; opening imports torch."""

from router.backend import LocalBackend
from router.registry import Registry
from router.settings import Settings, usable_cores


def open_local_backend(settings: Settings, registry: Registry) -> LocalBackend:
    """One host for each device of this machine, not started yet.

    Raises:
        InvalidValue: a device is asked for that is not here.
    """
    from engines.machine import LoaderSettings, Machine, MachineConfig  # late: torch takes seconds to import

    config = MachineConfig(
        devices=settings.device,
        budget=settings.memory_budget or registry.memory_budget,
        cores=usable_cores(),
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
    machine = Machine(config, registry.models)
    return LocalBackend(machine.hosts, registry.models, machine.close)
