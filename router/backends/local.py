"""Runs calls on hosts in this process: the `Backend` of one process, with one host a device."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from msgspec import structs

from engines.affinity import num_usable_cores
from engines.errors import EngineError, InvalidValue
from engines.host import Host
from engines.spec import ModelSpec
from engines.types import Budget, Call, Event, HostBudget, HostSnapshot, ModelStatus, Plan, Result, State, Tier
from router.backends.base import SIZE_TIMEOUT_S, raise_host_not_found, raise_model_not_found
from router.backends.placement import (
    earliest_retry,
    eligible_hosts,
    is_newly_wanted,
    is_wanted,
    may_succeed_elsewhere,
    not_resident,
    ranked_hosts,
    replica_host,
    warm_first,
)
from router.backends.worker_config import machine_config, memory_rules
from router.config.settings import Settings
from router.registry.registry import Registry

Answer = TypeVar("Answer")


class LocalBackend:
    """Runs one host per device, all in this process and on this event loop.

    The hosts share one `Files`, so a model is downloaded once for all of them.

    A placement counts as soon as it is chosen: the host's slot has the claim before this loop runs another task, and
    `rank_hosts` reads slots.

    Args:
        hosts: at least one.
        specs: the models to serve, the same as the hosts have.
        on_close: called when all hosts are closed, to close what they share.
    """

    def __init__(
        self, hosts: Sequence[Host], specs: Mapping[str, ModelSpec], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._hosts = {host.config.host_id: host for host in hosts}
        self._specs = dict(specs)
        self._on_close = on_close
        self._allowed: dict[tuple[str, str | None], list[Host]] = {}

    async def start(self) -> None:
        await asyncio.gather(*(host.start() for host in self._hosts.values()))
        await self._load_wanted(spec for spec in self._specs.values() if is_wanted(spec))

    async def run(self, call: Call) -> Result:
        """Run the call where the model is ready, else on the best host; when that cannot load it, on the next one."""
        hosts = self._eligible(call.model_id)
        if self._specs[call.model_id].replicas > 1:
            await self._add_replica_if_busy(call.model_id, hosts)
        if len(hosts) == 1:
            return await hosts[0].run(call)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + call.load_timeout_s

        async def run(host: Host, may_move: bool) -> Result:
            left_s = max(0.0, until_s - loop.time())
            return await host.run(structs.replace(call, load_timeout_s=left_s, may_move=may_move))

        return await self._try_hosts(call.model_id, hosts, run)

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        async def preload(host: Host, may_move: bool) -> ModelStatus:
            return await host.preload(model_id, pin=pin, wait=wait, may_move=may_move)

        return await self._try_hosts(model_id, self._eligible(model_id, host_id), preload)

    async def evict(
        self, model_id: str, *, force: bool = False, timeout_s: float = 30.0, to: Tier = "disk"
    ) -> tuple[ModelStatus, ...]:
        """Evict on all hosts at once; waits for all of them before the first error is raised."""
        hosts = self._eligible(model_id)
        evictions = (host.evict(model_id, force=force, timeout_s=timeout_s, to=to) for host in hosts)
        outcomes = await asyncio.gather(*evictions, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return tuple(outcome for outcome in outcomes if isinstance(outcome, ModelStatus))

    async def plan(self, model_id: str) -> Plan:
        hosts = self._eligible(model_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(host.estimate_size(model_id) for host in hosts)), SIZE_TIMEOUT_S)
        return self._ranked(model_id, hosts)[0].plan(model_id)

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        """See `Backend`. A wanted model that was evicted is not loaded again because another one changed."""
        before, self._specs = self._specs, dict(specs)
        self._allowed.clear()
        for host in self._hosts.values():
            await host.reload(specs, budget, host_budget)
        await self._load_wanted(spec for spec in specs.values() if is_newly_wanted(before.get(spec.model_id), spec))

    async def recycle(self, host_id: str) -> None:
        """Raise InvalidValue: ending a host's process would end the server."""
        if host_id not in self._hosts:
            raise_host_not_found(host_id, self._hosts)
        raise InvalidValue(
            f"host {host_id!r} runs in the server's own process and cannot be restarted alone: restart the server, "
            "or serve with BACKEND=process"
        )

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return tuple(host.snapshot() for host in self._hosts.values())

    def check(self) -> Mapping[str, str]:
        return {host_id: fault for host_id, host in self._hosts.items() if (fault := host.check())}

    def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        known = after or {}
        return merge_streams([host.events(known.get(host_id)) for host_id, host in self._hosts.items()])

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        await asyncio.gather(*(host.aclose(grace_s=grace_s) for host in self._hosts.values()))
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    # ---- choosing ----

    def _eligible(self, model_id: str, host_id: str | None = None) -> list[Host]:
        """Return the hosts on whose device the model may run; those that are down only when there is no other."""
        spec = self._specs.get(model_id)
        if spec is None:
            raise_model_not_found(model_id)
        if host_id is not None and host_id not in self._hosts:
            raise_host_not_found(host_id, self._hosts)
        hosts = self._allowed.get((model_id, host_id))
        if hosts is None:
            devices = {name: host.config.device for name, host in self._hosts.items() if host_id in (None, name)}
            hosts = [self._hosts[name] for name in eligible_hosts(spec, devices)]
            self._allowed[model_id, host_id] = hosts
        return hosts if len(hosts) == 1 else [host for host in hosts if not host.fault] or hosts

    async def _try_hosts(
        self, model_id: str, hosts: Sequence[Host], ask: Callable[[Host, bool], Awaitable[Answer]]
    ) -> Answer:
        """Call the best host, then the next one when it cannot load the model; raises only after all have failed.

        Ranks the rest again each time, because their state may have changed during the failed load.
        """
        left = list(hosts)
        refusal: EngineError | None = None
        while left:
            host = self._ranked(model_id, left)[0]
            left.remove(host)
            try:
                return await ask(host, bool(left))
            except EngineError as error:
                if not may_succeed_elsewhere(error):
                    raise
                refusal = earliest_retry(refusal, error)
        assert refusal is not None, "there is at least one host"
        raise refusal

    def _ranked(self, model_id: str, hosts: Sequence[Host]) -> list[Host]:
        """Returns hosts for a call, best first."""
        return [self._hosts[host_id] for host_id in ranked_hosts(model_id, [HostInProcess(host) for host in hosts])]

    async def _add_replica_if_busy(self, model_id: str, hosts: Sequence[Host]) -> None:
        """Start loading one more replica when every ready one is busy; does not wait for the load."""
        views = [HostInProcess(host) for host in hosts]
        num_busy = sum(view.state(model_id) == "ready" and view.load(model_id) > (0,) for view in views)
        host_id = replica_host(self._specs[model_id], views, num_busy)
        if host_id is not None:
            with suppress(EngineError):  # the model is ready elsewhere
                await self._hosts[host_id].preload(model_id, wait=False)

    async def _load_wanted(self, specs: Iterable[ModelSpec]) -> None:
        """Loads those that no host has or is about to have, in the registry's order, those that may be parked first."""
        hosts = list(self._hosts.values())
        for spec in not_resident(warm_first(specs), [HostInProcess(host) for host in hosts]):
            serving = [host for host in hosts if host.state(spec.model_id) is not None]
            with suppress(EngineError):  # as on other backends: its slot tells why, and the others are still loaded
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
    """Create one host for each device of this machine, not started.

    Raises:
        InvalidValue: a requested device does not exist.
    """
    from engines.machine import Machine  # late: torch takes seconds to import

    config = machine_config(settings, memory_rules(settings, registry), settings.device, num_usable_cores())
    machine = Machine(config, registry.models)
    return LocalBackend(machine.hosts, registry.models, machine.close)


async def merge_streams(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Event]:
    """Merge streams in order of arrival; ends when all have ended."""
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
