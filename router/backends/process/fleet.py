"""`ProcessFleet`: routes calls to worker processes, and handles their crashes."""

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection

import structlog
from msgspec import structs

from engines.errors import EngineError, InvalidValue
from engines.rpc.errors import error_of, error_record_of
from engines.rpc.messages import CommandResult, HostReport, Preload, Reply, Request, Run, RunResult
from engines.spec import ModelSpec, is_same_engine
from engines.types import Budget, Event, HostBudget, HostSnapshot, ModelStatus, Result
from router.backends.event_feed import EventFeed
from router.backends.fleet import RoutedCall
from router.backends.host_directory import HostDirectory, ready_models, without_models
from router.backends.placement import NOT_LOADED
from router.backends.process.crashes import CrashCounter
from router.backends.process.worker import Worker, WorkerCallbacks, prepare_forkserver
from router.backends.remote import RemoteBackend
from router.backends.worker_config import WorkerConfig, divide_budget, divide_cores, memory_rules, open_real_host
from router.config.settings import Settings
from router.registry.generation import DesiredRegistry
from router.registry.registry import Registry


def open_process_backend(settings: Settings, registry: Registry, devices: tuple[str, ...]) -> RemoteBackend:
    """Create one worker per GPU; on a CPU, `CPU_HOSTS` workers that share its cores and memory."""
    prepare_forkserver()
    configs = [config for device in devices for config in _worker_configs(device, settings, registry, len(devices))]
    hosts_per_device = settings.cpu_hosts if devices == ("cpu",) else 1
    return RemoteBackend(ProcessFleet(configs, hosts_per_device, settings.grace_seconds), registry.models)


def _report_devices(answer: Connection, wanted: tuple[str, ...]) -> None:
    from engines.machine import find_devices  # late: in the child alone

    try:
        answer.send(find_devices(wanted))
    except EngineError as error:
        answer.send(error_record_of(error))


def find_devices_elsewhere(
    wanted: tuple[str, ...], report: Callable[[Connection, tuple[str, ...]], None] = _report_devices
) -> tuple[str, ...]:
    """Run `engines.machine.find_devices` in a child: this process must not touch CUDA before it forks.

    Raises:
        InvalidValue: a requested GPU does not exist.
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
        raise InvalidValue("cannot detect the devices of this machine: the probing process crashed") from None
    finally:
        ours.close()
        process.join()
    if not isinstance(found, tuple):
        raise error_of(found)
    return found


def _worker_configs(device: str, settings: Settings, registry: Registry, num_devices: int) -> list[WorkerConfig]:
    hosts = settings.cpu_hosts if device == "cpu" else 1
    rules = memory_rules(settings, registry)
    return [
        WorkerConfig(
            host_id=f"{device}:{index}" if device == "cpu" else device,
            device=device,
            cores=divide_cores(max(hosts, num_devices)),
            specs=registry.models,
            budget=divide_budget(rules.budget, hosts),
            host_budget=rules.host_budget,
            host_parts=hosts * num_devices,
            settings=settings,
            open=open_real_host,
            eviction=rules.eviction,
        )
        for index in range(hosts)
    ]


log = structlog.get_logger()


class ProcessFleet:
    """See `Fleet`.

    Args:
        configs: one per host.
        hosts_per_device: how many hosts share one device's memory.
        grace_s: how long a host that is recycled may take to finish its calls.
    """

    def __init__(self, configs: Sequence[WorkerConfig], hosts_per_device: int, grace_s: float) -> None:
        self.directory = HostDirectory()
        self.feed = EventFeed()
        self._crashes = CrashCounter(time.monotonic)
        self._hosts_per_device = hosts_per_device
        self._grace_s = grace_s
        self._desired = DesiredRegistry({})
        self._specs: Mapping[str, ModelSpec] = {}
        self._bases: dict[str, int] = {}
        self._restarts: Counter[str] = Counter()
        self._on_change: Callable[[], None] = lambda: None
        self._workers = {config.host_id: Worker(config, self._callbacks(config.host_id)) for config in configs}

    @property
    def workers(self) -> Mapping[str, Worker]:
        """The workers by host id."""
        return self._workers

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        self._specs = specs
        self._desired = DesiredRegistry(specs)
        self._on_change = on_change
        for worker in self._workers.values():
            worker.config = structs.replace(worker.config, specs=specs, generation=self._desired.generation)
        starts = (worker.start() for worker in self._workers.values())
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        errors = [outcome for outcome in outcomes if outcome is not None]
        if errors:
            await self.aclose(0.0)
            raise errors[0]

    async def send(self, routed: RoutedCall) -> Result:
        host_id = routed.host_id = self.directory.ranked(routed.spec, routed.avoid)[0]
        with self.directory.in_flight(host_id, routed.spec.model_id):
            reply = await self._workers[host_id].ask(Run(call=routed.call))
        assert isinstance(reply, RunResult), "a call is answered with a result"
        return reply.result

    async def ask(self, host_id: str, request: Request) -> Reply:
        reply = await self._workers[host_id].ask(request)
        if isinstance(reply, CommandResult):
            self.directory.update(structs.replace(reply.snapshot, restarts=self._restarts[host_id]))
        return reply

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None, host_budget: HostBudget | None = None
    ) -> None:
        for model_id, spec in specs.items():
            old = self._specs.get(model_id)
            if old is not None and not is_same_engine(old, spec):
                self._crashes.clear(model_id)
        self._specs = specs
        divided = divide_budget(budget, self._hosts_per_device) if budget is not None else None
        self._desired.change(specs, divided, host_budget)
        message = self._desired.message
        for worker in self._workers.values():
            config = structs.replace(worker.config, specs=specs, generation=message.generation)
            worker.config = structs.replace(
                config,
                budget=message.budget or config.budget,
                host_budget=message.host_budget or config.host_budget,
            )
        await asyncio.gather(*(self._ask_quietly(host_id, message) for host_id in self._workers))

    async def recycle(self, host_id: str) -> None:
        before = self.directory.snapshot(host_id)
        self.directory.close(host_id)
        await self._workers[host_id].restart(self._grace_s)
        for status in ready_models(before):
            await self._ask_quietly(host_id, Preload(model_id=status.model_id, pin=status.pinned, wait=False))

    def faults(self) -> Mapping[str, str]:
        for worker in self._workers.values():
            worker.check()
        return {host_id: worker.fault for host_id, worker in self._workers.items() if worker.fault}

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return tuple(self._with_quarantine(snapshot) for snapshot in self.directory.snapshots())

    def quarantine(self, model_id: str) -> None:
        self._crashes.check(model_id)

    async def aclose(self, grace_s: float) -> None:
        await asyncio.gather(*(worker.aclose(grace_s) for worker in self._workers.values()))

    # ---- callbacks of workers ----

    def _callbacks(self, host_id: str) -> WorkerCallbacks:
        return WorkerCallbacks(
            on_report=partial(self._on_report, host_id),
            on_crash=partial(self._on_crash, host_id),
            on_exit=partial(self._on_exit, host_id),
            on_restart=partial(self._on_restart, host_id),
        )

    def _on_report(self, host_id: str, report: HostReport) -> None:
        """Store the report. Event numbers continue across restarts, so that subscribers miss nothing."""
        self.directory.update(structs.replace(report.snapshot, restarts=self._restarts[host_id]))
        base = self._bases.get(host_id, 0)
        for event in report.events:
            if base + event.seq > self.feed.last_seq(host_id):  # reports of a start overlap
                self.feed.add(structs.replace(event, seq=base + event.seq))

    def _with_quarantine(self, snapshot: HostSnapshot) -> HostSnapshot:
        """Show quarantined models as failed."""
        quarantined = {model_id: left_s for model_id in self._specs if (left_s := self._crashes.left_s(model_id))}
        if not quarantined:
            return snapshot
        models = tuple(
            structs.replace(
                status,
                state="failed",
                last_error=self._crashes.reason(status.model_id),
                retry_at=time.time() + quarantined[status.model_id],
            )
            if status.model_id in quarantined
            else status
            for status in snapshot.models
        )
        return structs.replace(snapshot, models=models)

    def _on_crash(self, host_id: str, running: str) -> None:
        """Count the crash. Three cases: 1. the worker had noted what it ran;  2. it had not, and one model had calls or
        loads there;  3. several had: they may have waited, so none is counted."""
        self._restarts[host_id] += 1
        suspects = running.splitlines() or self._guess_running(host_id)
        model_id = self._crashes.record_crash(suspects if running or len(suspects) == 1 else ())
        if model_id is not None:
            left_s = round(self._crashes.left_s(model_id), 1)
            log.error("model.quarantined", model=model_id, retry_in_s=left_s, reason=self._crashes.reason(model_id))
        snapshot = self.directory.snapshot(host_id)
        if snapshot is not None:
            self.directory.update(structs.replace(snapshot, is_draining=True, restarts=self._restarts[host_id]))

    def _guess_running(self, host_id: str) -> list[str]:
        snapshot = self.directory.snapshot(host_id)
        models = snapshot.models if snapshot is not None else ()
        loading = {status.model_id for status in models if status.state in ("loading", "warming")}
        return list(loading | set(self.directory.running(host_id)))

    def _on_exit(self, host_id: str, ended_by: str) -> None:
        crashed = f"the worker process of host {host_id} crashed ({ended_by})"
        self._mark_unloaded(host_id, crashed if ended_by else f"host {host_id} is restarting")

    def _on_restart(self, host_id: str) -> None:
        log.info("worker.back", host=host_id)
        self._on_change()

    def _mark_unloaded(self, host_id: str, cause: str) -> None:
        """Mark every model of the host as unloaded, and close the host to calls."""
        snapshot = self.directory.snapshot(host_id)
        if snapshot is not None:
            for status in snapshot.models:
                if status.state not in NOT_LOADED:
                    self.feed.add(_loss_event(status, self.feed.last_seq(host_id) + 1, cause))
            self.directory.update(without_models(snapshot))
        self._bases[host_id] = self.feed.last_seq(host_id)

    async def _ask_quietly(self, host_id: str, request: Request) -> None:
        """Send a request, ignoring failures: a worker that restarts gets the current registry with its config."""
        with suppress(EngineError):
            await self.ask(host_id, request)


def _loss_event(status: ModelStatus, seq: int, cause: str) -> Event:
    return Event(
        seq=seq,
        time_s=time.time(),
        host_id=status.host_id,
        model_id=status.model_id,
        kind="state",
        source=status.state,
        target="cold",
        cause=cause,
    )
