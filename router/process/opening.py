"""Settings and registry → `BACKEND=process`. Nothing here imports torch or touches a device: children do."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from engines.errors import EngineError, InvalidValue
from engines.failures import error_of, failure_of
from router.hosting import Birth, cores_each, open_real_host, share
from router.process.fleet import ProcessFleet
from router.process.worker import prepare_forkserver
from router.registry import Registry
from router.remote_backend import RemoteBackend
from router.settings import Settings

Answer = Connection


def open_process_backend(settings: Settings, registry: Registry, devices: tuple[str, ...]) -> RemoteBackend:
    """One worker a GPU; on a CPU `CPU_HOSTS` of them, which share its cores and its memory."""
    prepare_forkserver()
    births = [birth for device in devices for birth in _births(device, settings, registry, len(devices))]
    parts = settings.cpu_hosts if devices == ("cpu",) else 1
    return RemoteBackend(ProcessFleet(births, parts, settings.grace_seconds), registry.models)


def _report_devices(answer: Answer, wanted: tuple[str, ...]) -> None:
    from engines.machine import find_devices  # late: in the child alone

    try:
        answer.send(find_devices(wanted))
    except EngineError as error:
        answer.send(failure_of(error))


def find_devices_elsewhere(
    wanted: tuple[str, ...], report: Callable[[Answer, tuple[str, ...]], None] = _report_devices
) -> tuple[str, ...]:
    """As `engines.machine.find_devices`, asked in a child: this process must not touch CUDA before it forks.

    Raises:
        InvalidValue: a GPU is asked for that is not here.
    """
    prepare_forkserver()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(theirs, wanted))
    with theirs:
        process.start()
    try:
        found = ours.recv()
    except EOFError:
        raise InvalidValue("the devices of this machine cannot be read: the process that looked has died") from None
    finally:
        ours.close()
        process.join()
    if not isinstance(found, tuple):
        raise error_of(found)
    return found


def _births(device: str, settings: Settings, registry: Registry, num_devices: int) -> list[Birth]:
    hosts = settings.cpu_hosts if device == "cpu" else 1
    budget = settings.memory_budget or registry.memory_budget
    return [
        Birth(
            host_id=f"{device}:{index}" if device == "cpu" else device,
            device=device,
            cores=cores_each(max(hosts, num_devices)),
            specs=registry.models,
            budget=share(budget, hosts),
            settings=settings,
            open=open_real_host,
        )
        for index in range(hosts)
    ]
