"""Runs calls on hosts in this process: the `Backend` of one process, with one host a device."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from msgspec import structs

from engines.errors import EngineError, InvalidValue
from engines.host import Host
from engines.spec import ModelSpec
from engines.types import Budget, Call, Event, HostSnapshot, ModelStatus, Plan, Result, State
from router.backends.base import SIZE_S, no_host, no_model
from router.backends.placement import (
    eligible_hosts,
    is_newly_wanted,
    is_wanted,
    most_hopeful,
    moves_on,
    not_resident,
    ranked_hosts,
    replica_host,
)
from router.backends.worker_config import machine_config
from router.config.settings import Settings, usable_cores
from router.registry.registry import Registry

Answer = TypeVar("Answer")


class LocalBackend:
    """One host per device, all in this process and on this event loop.

    The hosts share one `Files`, so a model is fetched once for all of them.

    A placement is on record as soon as it is chosen: the host's slot has the claim before this loop does anything else,
    and `rank` reads slots.

    Args:
        hosts: at least one.
        specs: the models to serve, as the hosts know them.
        on_close: called when all hosts are closed, for what they shared.
    """

    def __init__(
        self, hosts: Sequence[Host], specs: Mapping[str, ModelSpec], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._hosts = {host.config.host_id: host for host in hosts}
        self._specs = dict(specs)
        self._on_close = on_close

    async def start(self) -> None:
        await asyncio.gather(*(host.start() for host in self._hosts.values()))
        await self._load_wanted(spec for spec in self._specs.values() if is_wanted(spec))

    async def run(self, call: Call) -> Result:
        """On the host where it is ready, else on the best; a host that cannot have it passes the call on."""
        hosts = self._suitable(call.model_id)
        if self._specs[call.model_id].replicas > 1:
            await self._spread(call.model_id, hosts)
        if len(hosts) == 1:
            return await hosts[0].run(call)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + call.load_timeout_s

        async def run(host: Host, may_move: bool) -> Result:
            left_s = max(0.0, until_s - loop.time())
            return await host.run(structs.replace(call, load_timeout_s=left_s, may_move=may_move))

        return await self._at_the_first_that_can(call.model_id, hosts, run)

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        async def preload(host: Host, may_move: bool) -> ModelStatus:
            return await host.preload(model_id, pin=pin, wait=wait, may_move=may_move)

        return await self._at_the_first_that_can(model_id, self._suitable(model_id, host_id), preload)

    async def evict(self, model_id: str, *, force: bool = False, timeout_s: float = 30.0) -> tuple[ModelStatus, ...]:
        """Everywhere at once; all hosts are heard before one's refusal is raised."""
        evictions = (host.evict(model_id, force=force, timeout_s=timeout_s) for host in self._suitable(model_id))
        outcomes = await asyncio.gather(*evictions, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return tuple(outcome for outcome in outcomes if isinstance(outcome, ModelStatus))

    async def plan(self, model_id: str) -> Plan:
        hosts = self._suitable(model_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(host.estimate_size(model_id) for host in hosts)), SIZE_S)
        return self._ranked(model_id, hosts)[0].plan(model_id)

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None = None) -> None:
        """A model that was wanted before, and left, is not loaded again because another one changed."""
        before, self._specs = self._specs, dict(specs)
        for host in self._hosts.values():
            await host.reload(specs, budget)
        await self._load_wanted(spec for spec in specs.values() if is_newly_wanted(before.get(spec.model_id), spec))

    async def recycle(self, host_id: str) -> None:
        """Never possible: who ends the process ends the server."""
        if host_id not in self._hosts:
            no_host(host_id, self._hosts)
        raise InvalidValue(
            f"host {host_id!r} runs in the server's own process, so it cannot be started anew alone: restart the "
            "server, or serve with BACKEND=process"
        )

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return tuple(host.snapshot() for host in self._hosts.values())

    def check(self) -> Mapping[str, str]:
        return {host_id: fault for host_id, host in self._hosts.items() if (fault := host.check())}

    def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        known = after or {}
        return merged([host.events(known.get(host_id)) for host_id, host in self._hosts.items()])

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        await asyncio.gather(*(host.aclose(grace_s=grace_s) for host in self._hosts.values()))
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    # ---- choosing ----

    def _suitable(self, model_id: str, host_id: str | None = None) -> list[Host]:
        """Hosts on whose device the registry lets the model run; those that are down only when there is no other."""
        spec = self._specs.get(model_id)
        if spec is None:
            no_model(model_id)
        if host_id is not None and host_id not in self._hosts:
            no_host(host_id, self._hosts)
        devices = {name: host.config.device for name, host in self._hosts.items() if host_id in (None, name)}
        hosts = [self._hosts[name] for name in eligible_hosts(spec, devices)]
        return [host for host in hosts if not host.fault] or hosts

    async def _at_the_first_that_can(
        self, model_id: str, hosts: Sequence[Host], ask: Callable[[Host, bool], Awaitable[Answer]]
    ) -> Answer:
        """Ask the best host, and the next one where that cannot have the model; nobody is told before all have failed.

        They are ranked anew each time, for much may have happened during a load that failed.
        """
        left = list(hosts)
        refusal: EngineError | None = None
        while left:
            host = self._ranked(model_id, left)[0]
            left.remove(host)
            try:
                return await ask(host, bool(left))
            except EngineError as error:
                if not moves_on(error):
                    raise
                refusal = most_hopeful(refusal, error)
        assert refusal is not None, "there is at least one host"
        raise refusal

    def _ranked(self, model_id: str, hosts: Sequence[Host]) -> list[Host]:
        """Returns hosts for a call, best first."""
        return [self._hosts[host_id] for host_id in ranked_hosts(model_id, [HostInProcess(host) for host in hosts])]

    async def _spread(self, model_id: str, hosts: Sequence[Host]) -> None:
        """Begins to load one more copy when all that are ready are busy, and does not wait for it."""
        views = [HostInProcess(host) for host in hosts]
        num_busy = sum(view.state(model_id) == "ready" and view.load(model_id) > (0,) for view in views)
        host_id = replica_host(self._specs[model_id], views, num_busy)
        if host_id is not None:
            with suppress(EngineError):  # the model is ready elsewhere
                await self._hosts[host_id].preload(model_id, wait=False)

    async def _load_wanted(self, specs: Iterable[ModelSpec]) -> None:
        """Loads those that no host has or is about to have, in the registry's order."""
        hosts = list(self._hosts.values())
        for spec in not_resident(specs, [HostInProcess(host) for host in hosts]):
            serving = [host for host in hosts if host.state(spec.model_id) is not None]
            await self._ranked(spec.model_id, serving)[0].preload(spec.model_id, wait=False)


class HostInProcess:
    """A `HostView` of a host in this process."""

    __slots__ = ("_host",)

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def host_id(self) -> str:
        """See `HostView`."""
        return self._host.config.host_id

    def state(self, model_id: str) -> State | None:
        """See `HostView`."""
        return self._host.state(model_id)

    def load(self, model_id: str) -> tuple[int, ...]:
        """See `HostView`."""
        return (self._host.status(model_id).leases,)

    def need_bytes(self, model_id: str) -> int:
        """See `HostView`."""
        return self._host.plan(model_id).need_bytes

    def snapshot(self) -> HostSnapshot:
        """See `HostView`; a call is counted as soon as its host has it."""
        return self._host.snapshot()


def open_local_backend(settings: Settings, registry: Registry) -> LocalBackend:
    """One host for each device of this machine, not started yet.

    Raises:
        InvalidValue: a device is asked for that is not here.
    """
    from engines.machine import Machine  # late: torch takes seconds to import

    budget = settings.memory_budget or registry.memory_budget
    machine = Machine(machine_config(settings, budget, settings.device, usable_cores()), registry.models)
    return LocalBackend(machine.hosts, registry.models, machine.close)


async def merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Event]:
    """Several streams as one, in the order of arrival; it ends when all have ended."""
    upcoming = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while upcoming:
            done, _ = await asyncio.wait(upcoming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = upcoming.pop(task)
                if not isinstance(task.exception(), StopAsyncIteration):
                    yield task.result()
                    upcoming[asyncio.ensure_future(anext(stream))] = stream
    finally:
        for task in upcoming:
            task.cancel()
        await asyncio.gather(*upcoming, return_exceptions=True)
