"""Settings and registry → hosts in this process. Importing it is cheap; opening imports torch."""

from router.backend import LocalBackend
from router.hosting import machine_config
from router.registry import Registry
from router.settings import Settings, usable_cores


def open_local_backend(settings: Settings, registry: Registry) -> LocalBackend:
    """One host for each device of this machine, not started yet.

    Raises:
        InvalidValue: a device is asked for that is not here.
    """
    from engines.machine import Machine  # late: torch takes seconds to import

    budget = settings.memory_budget or registry.memory_budget
    machine = Machine(machine_config(settings, budget, settings.device, usable_cores()), registry.models)
    return LocalBackend(machine.hosts, registry.models, machine.close)
