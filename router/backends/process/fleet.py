"""`ProcessFleet`: all workers together. Which of them gets a call, and what the death of one means."""

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
from engines.types import Budget, Event, HostSnapshot, ModelStatus, Result
from router.backends.event_feed import EventFeed
from router.backends.fleet import RoutedCall
from router.backends.host_directory import HostDirectory, emptied, hot
from router.backends.placement import AWAY
from router.backends.process.crashes import CrashCounter
from router.backends.process.worker import Worker, WorkerCallbacks, prepare_forkserver
from router.backends.remote import RemoteBackend
from router.backends.worker_config import WorkerConfig, cores_each, open_real_host, share
from router.config.settings import Settings
from router.registry.generation import DesiredRegistry
from router.registry.registry import Registry

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
        answer.send(error_record_of(error))


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


def _births(device: str, settings: Settings, registry: Registry, num_devices: int) -> list[WorkerConfig]:
    hosts = settings.cpu_hosts if device == "cpu" else 1
    budget = settings.memory_budget or registry.memory_budget
    return [
        WorkerConfig(
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


log = structlog.get_logger()


class ProcessFleet:
    """See `Fleet`.

    Args:
        births: one for each host.
        parts: how many of them share one device's memory.
        grace_s: how long a host that is recycled may finish what it has.
    """

    def __init__(self, births: Sequence[WorkerConfig], parts: int, grace_s: float) -> None:
        self.directory = HostDirectory()
        self.feed = EventFeed()
        self._charges = CrashCounter(time.monotonic)
        self._parts = parts
        self._grace_s = grace_s
        self._desired = DesiredRegistry({})
        self._specs: Mapping[str, ModelSpec] = {}
        self._bases: dict[str, int] = {}
        self._restarts: Counter[str] = Counter()
        self._on_change: Callable[[], None] = lambda: None
        self._workers = {birth.host_id: Worker(birth, self._ears(birth.host_id)) for birth in births}

    @property
    def workers(self) -> Mapping[str, Worker]:
        """By host id."""
        return self._workers

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        self._specs = specs
        self._desired = DesiredRegistry(specs)
        self._on_change = on_change
        for worker in self._workers.values():
            worker.birth = structs.replace(worker.birth, specs=specs, generation=self._desired.generation)
        starts = (worker.start() for worker in self._workers.values())
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        errors = [outcome for outcome in outcomes if outcome is not None]
        if errors:
            await self.aclose(0.0)
            raise errors[0]

    async def send(self, ticket: RoutedCall) -> Result:
        host_id = ticket.host_id = self.directory.ranked(ticket.spec, ticket.avoid)[0]
        with self.directory.in_flight(host_id, ticket.spec.model_id):
            reply = await self._workers[host_id].ask(Run(call=ticket.call))
        assert isinstance(reply, RunResult), "a call is answered with a result"
        return reply.result

    async def ask(self, host_id: str, request: Request) -> Reply:
        reply = await self._workers[host_id].ask(request)
        if isinstance(reply, CommandResult):
            self.directory.update(structs.replace(reply.snapshot, restarts=self._restarts[host_id]))
        return reply

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None) -> None:
        for model_id, spec in specs.items():
            old = self._specs.get(model_id)
            if old is not None and not is_same_engine(old, spec):
                self._charges.clear(model_id)
        self._specs = specs
        self._desired.change(specs, share(budget, self._parts) if budget is not None else None)
        message = self._desired.message
        for worker in self._workers.values():
            told = structs.replace(worker.birth, specs=specs, generation=message.generation)
            worker.birth = structs.replace(told, budget=message.budget or told.budget)
        await asyncio.gather(*(self._tell(host_id, message) for host_id in self._workers))

    async def recycle(self, host_id: str) -> None:
        before = self.directory.snapshot(host_id)
        self.directory.close(host_id)
        await self._workers[host_id].restart(self._grace_s)
        for status in hot(before):
            await self._tell(host_id, Preload(model_id=status.model_id, pin=status.pinned, wait=False))

    def faults(self) -> Mapping[str, str]:
        for worker in self._workers.values():
            worker.check()
        return {host_id: worker.fault for host_id, worker in self._workers.items() if worker.fault}

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return tuple(self._with_quarantine(snapshot) for snapshot in self.directory.snapshots())

    def quarantine(self, model_id: str) -> None:
        self._charges.check(model_id)

    async def aclose(self, grace_s: float) -> None:
        await asyncio.gather(*(worker.aclose(grace_s) for worker in self._workers.values()))

    # ---- what workers tell ----

    def _ears(self, host_id: str) -> WorkerCallbacks:
        return WorkerCallbacks(
            on_report=partial(self._seen, host_id),
            on_crash=partial(self._died, host_id),
            on_exit=partial(self._ended, host_id),
            on_restart=partial(self._back, host_id),
        )

    def _seen(self, host_id: str, seen: HostReport) -> None:
        """Numbers go on from one life to the next, so that followers miss nothing."""
        self.directory.update(structs.replace(seen.snapshot, restarts=self._restarts[host_id]))
        base = self._bases.get(host_id, 0)
        for event in seen.events:
            self.feed.add(structs.replace(event, seq=base + event.seq))

    def _with_quarantine(self, snapshot: HostSnapshot) -> HostSnapshot:
        """Models that no host is asked for now are shown as failed."""
        kept_out = {model_id: left_s for model_id in self._specs if (left_s := self._charges.left_s(model_id))}
        if not kept_out:
            return snapshot
        models = tuple(
            structs.replace(
                status,
                state="failed",
                last_error=self._charges.reason(status.model_id),
                retry_at=time.time() + kept_out[status.model_id],
            )
            if status.model_id in kept_out
            else status
            for status in snapshot.models
        )
        return structs.replace(snapshot, models=models)

    def _died(self, host_id: str, running: str) -> None:
        """Three cases: 1. it had noted what it ran;  2. not, and one model had calls or loads there;  3. several had:
        they waited, or were loaded, and nobody is charged."""
        self._restarts[host_id] += 1
        suspects = running.splitlines() or self._suspects(host_id)
        self._charges.record_crash(suspects if running or len(suspects) == 1 else ())
        snapshot = self.directory.snapshot(host_id)
        if snapshot is not None:
            self.directory.update(structs.replace(snapshot, is_draining=True, restarts=self._restarts[host_id]))

    def _suspects(self, host_id: str) -> list[str]:
        snapshot = self.directory.snapshot(host_id)
        models = snapshot.models if snapshot is not None else ()
        loading = {status.model_id for status in models if status.state in ("loading", "warming")}
        return list(loading | set(self.directory.running(host_id)))

    def _ended(self, host_id: str, death: str) -> None:
        died = f"the worker process of host {host_id} died ({death})"
        self._empty(host_id, died if death else f"host {host_id} is started anew")

    def _back(self, host_id: str) -> None:
        log.info("worker.back", host=host_id)
        self._on_change()

    def _empty(self, host_id: str, cause: str) -> None:
        """Nothing is in memory there any more, and nothing can be had there for the moment."""
        snapshot = self.directory.snapshot(host_id)
        if snapshot is not None:
            for status in snapshot.models:
                if status.state not in AWAY:
                    self.feed.add(_loss(status, self.feed.last_seq(host_id) + 1, cause))
            self.directory.update(emptied(snapshot))
        self._bases[host_id] = self.feed.last_seq(host_id)

    async def _tell(self, host_id: str, request: Request) -> None:
        """A worker that is between two lives learns it at its next birth, or has nothing to be told any more."""
        with suppress(EngineError):
            await self.ask(host_id, request)


def _loss(status: ModelStatus, seq: int, cause: str) -> Event:
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
