"""`RemoteBackend`: the `Backend` of hosts in other processes. A `Fleet` is its transport.

A host may end, or its device fail, while it runs a call. Embedding has no side effects, so the call is sent once more,
to another host or to the same one when it is back; a second lost host fails the call.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

import structlog
from msgspec import structs

from engines.errors import DeviceDown, EngineError, HostLost, ShuttingDown
from engines.rpc.messages import CommandResult, Evict, PlanRequest, Preload, Request
from engines.spec import ModelSpec
from engines.types import Budget, Call, EmbedCall, Event, HostBudget, HostSnapshot, ModelStatus, Plan, Result, Tier
from router.backends.base import SIZE_TIMEOUT_S, raise_host_not_found, raise_model_not_found
from router.backends.fleet import Fleet, NotSent, RoutedCall
from router.backends.placement import (
    earliest_retry,
    eligible_hosts,
    is_newly_wanted,
    is_wanted,
    may_succeed_elsewhere,
    warm_first,
)

log = structlog.get_logger()

_LOOK_AGAIN_S = 1.0
"""A host that was closed opens with its next snapshot, which wakes nobody."""

_HOST_WAIT_S = 60.0
"""How long an operator's command waits for a host that is restarting."""


class RemoteBackend:
    """See `Backend`."""

    def __init__(self, fleet: Fleet, specs: Mapping[str, ModelSpec]) -> None:
        self._fleet = fleet
        self._directory = fleet.directory
        self._specs = dict(specs)
        self._changed = asyncio.Event()
        self._calls: set[asyncio.Timeout] = set()
        self._calls_by_model: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def start(self) -> None:
        await self._fleet.open(self._specs, self._on_change)
        await self._load_wanted(self._specs.values())

    async def run(self, call: Call) -> Result:
        spec = self._spec(call.model_id)
        routed = RoutedCall(call, spec)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + call.load_timeout_s
        async with self._admitted(call.model_id):
            if spec.replicas > 1:
                self._add_replica_if_busy(spec)
            while True:
                self._fleet.quarantine(call.model_id)
                num_open = await self._wait_for_host(routed, routed.call.load_timeout_s)
                if (num_open > 1) != routed.call.may_move:
                    routed.call = structs.replace(routed.call, may_move=num_open > 1)
                try:
                    return await self._fleet.send(routed)
                except EngineError as error:
                    self._prepare_retry(routed, error)
                left_s = max(0.0, until_s - loop.time())
                routed.call = structs.replace(routed.call, load_timeout_s=left_s)

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        spec = self._spec(model_id)
        routed = RoutedCall(EmbedCall(model_id=model_id), spec)
        if host_id is not None:
            self._check_host(host_id)
            devices = self._directory.devices()
            eligible_hosts(spec, {host_id: devices[host_id]})
            routed.avoid = set(devices) - {host_id}
        async with self._admitted(model_id):
            while True:
                self._fleet.quarantine(model_id)
                may_move = await self._wait_for_host(routed, _HOST_WAIT_S) > 1
                routed.host_id = self._directory.ranked(spec, routed.avoid)[0]
                try:
                    request = Preload(model_id=model_id, pin=pin, wait=wait, may_move=may_move)
                    return await self._preload(routed.host_id, request)
                except EngineError as error:
                    self._prepare_retry(routed, error)

    async def evict(
        self, model_id: str, *, force: bool = False, timeout_s: float = 30.0, to: Tier = "disk"
    ) -> tuple[ModelStatus, ...]:
        """Evict on all hosts at once; waits for all of them before the first error is raised."""
        request = Evict(model_id=model_id, force=force, timeout_s=timeout_s, to=to)
        outcomes = await self._ask_all(self._directory.open_hosts(self._spec(model_id)), request)
        return tuple(outcome.status for outcome in outcomes.values() if outcome.status is not None)

    async def plan(self, model_id: str) -> Plan:
        spec = self._spec(model_id)
        await self._wait_for_host(RoutedCall(EmbedCall(model_id=model_id), spec), SIZE_TIMEOUT_S)
        outcomes = await self._ask_all(
            self._directory.open_hosts(spec), PlanRequest(model_id=model_id, size_s=SIZE_TIMEOUT_S)
        )
        plans = [outcomes[host_id].plan for host_id in self._directory.ranked(spec) if host_id in outcomes]
        if not plans or plans[0] is None:
            raise HostLost("all hosts were lost while planning; retry the request")
        return plans[0]

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        """See `Backend`. A wanted model that was evicted is not loaded again because another one changed."""
        before, self._specs = self._specs, dict(specs)
        await self._fleet.reload(specs, budget, host_budget)
        await self._load_wanted(spec for spec in specs.values() if is_newly_wanted(before.get(spec.model_id), spec))

    async def recycle(self, host_id: str) -> None:
        self._check_host(host_id)
        await self._fleet.recycle(host_id)

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return self._fleet.snapshots()

    def check(self) -> Mapping[str, str]:
        return self._fleet.faults()

    def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        return self._fleet.feed.follow(after)

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """Interrupt calls that outlast the grace time, then close the hosts within what is left of it."""
        self._is_closing = True
        until_s = asyncio.get_running_loop().time() + grace_s
        if self._calls:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for running in self._calls:
            running.reschedule(asyncio.get_running_loop().time())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fleet.aclose(max(0.0, until_s - asyncio.get_running_loop().time()))
        self._fleet.feed.close()

    # ---- one call ----

    @asynccontextmanager
    async def _admitted(self, model_id: str) -> AsyncIterator[None]:
        """Register a call, so that `aclose` waits for it, and interrupts it after the grace time."""
        if self._is_closing:
            raise ShuttingDown("the server is shutting down; send the request to another server", retry_after_s=5.0)
        running = asyncio.timeout(None)
        self._calls.add(running)
        self._calls_by_model[model_id] += 1
        self._idle.clear()
        try:
            async with running:
                yield
        except TimeoutError:
            if not running.expired():
                raise
            raise ShuttingDown("the server shut down before the request was done; retry the request") from None
        finally:
            self._calls.discard(running)
            self._calls_by_model[model_id] -= 1
            if not self._calls:
                self._idle.set()

    def _prepare_retry(self, routed: RoutedCall, error: EngineError) -> None:
        """Prepare the call for its next host, or raise `error`. Five cases:

        1. the host could not load the model: try others;  2. the host drains: nothing was done there;
        3. no host was open any more;  4. the host or its device was lost;  5. another host would fail in the same way.
        """
        if may_succeed_elsewhere(error):
            routed.refusal = earliest_retry(routed.refusal, error)
            routed.avoid.add(routed.host_id or "")  # (1)
        elif isinstance(error, ShuttingDown):
            if self._is_closing:
                raise error
            self._directory.close(routed.host_id or "")  # (2)
        elif not isinstance(error, NotSent):  # (3)
            if routed.was_lost or not isinstance(error, HostLost | DeviceDown):  # (5)
                raise error
            routed.was_lost = True  # (4)
            if isinstance(error, DeviceDown):
                self._directory.close(routed.host_id or "")
            log.warning("call.sent_again", model=routed.spec.model_id, host=routed.host_id)

    async def _wait_for_host(self, routed: RoutedCall, timeout_s: float) -> int:
        """Wait until a host takes the call; returns how many do.

        Raises:
            ModelTooLarge, LoadFailed, OutOfMemory: every eligible host refused.
            HostLost: no host was open in time.
        """
        if num_open := len(self._directory.open_hosts(routed.spec, routed.avoid)):
            return num_open
        if routed.refusal is not None:
            raise routed.refusal
        try:
            async with asyncio.timeout(timeout_s):
                while not (num_open := len(self._directory.open_hosts(routed.spec, routed.avoid))):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), _LOOK_AGAIN_S)
        except TimeoutError:
            message = f"no host was available for model {routed.spec.model_id!r} within {timeout_s:g} s; retry"
            raise HostLost(message, retry_after_s=2.0) from None
        return num_open

    def _add_replica_if_busy(self, spec: ModelSpec) -> None:
        """Start loading one more replica of a busy model; does not wait for the load."""
        host_id = self._directory.pick_replica_host(spec, self._calls_by_model[spec.model_id] - 1)
        if host_id is not None:
            self._spawn(self._load_replica(host_id, spec.model_id))

    async def _load_replica(self, host_id: str, model_id: str) -> None:
        with suppress(EngineError):
            await self._preload(host_id, Preload(model_id=model_id, wait=False))

    # ---- operators ----

    async def _preload(self, host_id: str, request: Preload) -> ModelStatus:
        with self._directory.in_flight(host_id, request.model_id):
            outcome = await self._fleet.ask(host_id, request)
        assert isinstance(outcome, CommandResult), "the reply to a command is a CommandResult"
        assert outcome.status is not None, "the result of a preload has a status"
        return outcome.status

    async def _ask_all(self, hosts: Iterable[str], request: Request) -> dict[str, CommandResult]:
        """Send a request to hosts; waits for all before the first error is raised. Lost hosts are left out."""
        host_ids = list(hosts)
        outcomes = await asyncio.gather(*(self._fleet.ask(host, request) for host in host_ids), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, HostLost):
                raise outcome
        return {
            host: outcome
            for host, outcome in zip(host_ids, outcomes, strict=True)
            if isinstance(outcome, CommandResult)
        }

    def _spec(self, model_id: str) -> ModelSpec:
        return self._specs[model_id] if model_id in self._specs else raise_model_not_found(model_id)

    def _check_host(self, host_id: str) -> None:
        if self._directory.snapshot(host_id) is None:
            raise_host_not_found(host_id, self._directory.devices())

    # ---- preloading ----

    def _on_change(self) -> None:
        """Wake the calls that wait for a host, and load the wanted models: a host has appeared or is back."""
        self._changed.set()
        self._changed.clear()
        self._spawn(self._load_wanted(self._specs.values()))

    async def _load_wanted(self, specs: Iterable[ModelSpec]) -> None:
        """Load the models that no host has loaded or expects, in the registry's order."""
        for spec in self._directory.not_resident(warm_first(spec for spec in specs if is_wanted(spec))):
            with suppress(EngineError):
                await self.preload(spec.model_id, wait=False)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
