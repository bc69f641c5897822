"""`RemoteBackend`: the `Backend` of hosts in other processes. What all of them share; a `Fleet` knows the way.

A host may end under a call. Embedding changes nothing, so the call is sent once more, to another host or to the same
one when it is back; who loses a second host is told so.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

import structlog
from msgspec import structs

from engines.errors import EngineError, HostLost, ShuttingDown
from engines.rpc.messages import CommandResult, Evict, PlanRequest, Preload, Request
from engines.spec import ModelSpec
from engines.types import Budget, Call, EmbedCall, Event, HostSnapshot, ModelStatus, Plan, Result
from router.backends.base import SIZE_S, no_host, no_model
from router.backends.fleet import Fleet, NotSent, RoutedCall
from router.backends.placement import eligible_hosts, is_newly_wanted, is_wanted, most_hopeful, moves_on

log = structlog.get_logger()

_REOPEN_S = 60.0
"""How long an operator's command waits for a host that is being started anew."""


class RemoteBackend:
    """See `Backend`."""

    def __init__(self, fleet: Fleet, specs: Mapping[str, ModelSpec]) -> None:
        self._fleet = fleet
        self._ledger = fleet.directory
        self._specs = dict(specs)
        self._changed = asyncio.Event()
        self._calls: set[asyncio.Timeout] = set()
        self._by_model: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    async def start(self) -> None:
        await self._fleet.open(self._specs, self._on_change)
        await self._load_wanted(self._specs.values())

    async def run(self, call: Call) -> Result:
        spec = self._spec(call.model_id)
        ticket = RoutedCall(call, spec)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + call.load_timeout_s
        async with self._admitted(call.model_id):
            if spec.replicas > 1:
                self._spread(spec)
            while True:
                self._fleet.quarantine(call.model_id)
                num_open = await self._until_open(ticket, ticket.call.load_timeout_s)
                if (num_open > 1) != ticket.call.may_move:
                    ticket.call = structs.replace(ticket.call, may_move=num_open > 1)
                try:
                    return await self._fleet.send(ticket)
                except EngineError as error:
                    self._go_on(ticket, error)
                left_s = max(0.0, until_s - loop.time())
                ticket.call = structs.replace(ticket.call, load_timeout_s=left_s)

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        spec = self._spec(model_id)
        ticket = RoutedCall(EmbedCall(model_id=model_id), spec)
        if host_id is not None:
            self._check_host(host_id)
            devices = self._ledger.devices()
            eligible_hosts(spec, {host_id: devices[host_id]})
            ticket.avoid = set(devices) - {host_id}
        async with self._admitted(model_id):
            while True:
                self._fleet.quarantine(model_id)
                may_move = await self._until_open(ticket, _REOPEN_S) > 1
                ticket.host_id = self._ledger.ranked(spec, ticket.avoid)[0]
                try:
                    request = Preload(model_id=model_id, pin=pin, wait=wait, may_move=may_move)
                    return await self._preload(ticket.host_id, request)
                except EngineError as error:
                    self._go_on(ticket, error)

    async def evict(self, model_id: str, *, force: bool = False, timeout_s: float = 30.0) -> tuple[ModelStatus, ...]:
        """Everywhere at once; all hosts are heard before one's refusal is raised."""
        request = Evict(model_id=model_id, force=force, timeout_s=timeout_s)
        outcomes = await self._ask_all(self._ledger.open_hosts(self._spec(model_id)), request)
        return tuple(outcome.status for outcome in outcomes.values() if outcome.status is not None)

    async def plan(self, model_id: str) -> Plan:
        spec = self._spec(model_id)
        await self._until_open(RoutedCall(EmbedCall(model_id=model_id), spec), SIZE_S)
        outcomes = await self._ask_all(self._ledger.open_hosts(spec), PlanRequest(model_id=model_id, size_s=SIZE_S))
        plans = [outcomes[host_id].plan for host_id in self._ledger.ranked(spec) if host_id in outcomes]
        if not plans or plans[0] is None:
            raise HostLost("every host that could have planned this was lost meanwhile; ask again")
        return plans[0]

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None = None) -> None:
        """A model that was wanted before, and left, is not loaded again because another one changed."""
        before, self._specs = self._specs, dict(specs)
        await self._fleet.reload(specs, budget)
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
        """What has not ended by then is told so; the hosts have what is left of the same grace time."""
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
        """Inside, a call is waited for at the end, and interrupted when the end does not wait any longer."""
        if self._is_closing:
            raise ShuttingDown("the server is shutting down; send the request to another one", retry_after_s=5.0)
        running = asyncio.timeout(None)
        self._calls.add(running)
        self._by_model[model_id] += 1
        self._idle.clear()
        try:
            async with running:
                yield
        except TimeoutError:
            if not running.expired():
                raise
            raise ShuttingDown("the server shut down before the request was done; send it again") from None
        finally:
            self._calls.discard(running)
            self._by_model[model_id] -= 1
            if not self._calls:
                self._idle.set()

    def _go_on(self, ticket: RoutedCall, error: EngineError) -> None:
        """Make the ticket ready for its next host, or raise. Five cases:

        1. that host could not have the model: others are left;  2. that host drains: nothing was done there;
        3. no host was open any more;  4. the host was lost;  5. another host would say the same.
        """
        if moves_on(error):
            ticket.refusal = most_hopeful(ticket.refusal, error)
            ticket.avoid.add(ticket.host_id or "")  # (1)
        elif isinstance(error, ShuttingDown):
            if self._is_closing:
                raise error
            self._ledger.close(ticket.host_id or "")  # (2)
        elif not isinstance(error, NotSent):  # (3)
            if ticket.was_lost or not isinstance(error, HostLost):  # (5)
                raise error
            ticket.was_lost = True  # (4)
            log.warning("call.sent_again", model=ticket.spec.model_id, host=ticket.host_id)

    async def _until_open(self, ticket: RoutedCall, patience_s: float) -> int:
        """Wait until a host takes the call; how many do.

        Raises:
            ModelTooLarge, LoadFailed, OutOfMemory: all that could have refused.
            HostLost: none was back in time.
        """
        if num_open := len(self._ledger.open_hosts(ticket.spec, ticket.avoid)):
            return num_open
        if ticket.refusal is not None:
            raise ticket.refusal
        try:
            async with asyncio.timeout(patience_s):
                while not (num_open := len(self._ledger.open_hosts(ticket.spec, ticket.avoid))):
                    await self._changed.wait()
        except TimeoutError:
            message = f"no host for model {ticket.spec.model_id!r} was up within {patience_s:g} s; ask again"
            raise HostLost(message, retry_after_s=2.0) from None
        return num_open

    def _spread(self, spec: ModelSpec) -> None:
        """One more copy of a busy model begins to load; nobody waits for it."""
        host_id = self._ledger.pick_replica_host(spec, self._by_model[spec.model_id] - 1)
        if host_id is not None:
            self._spawn(self._copy(host_id, spec.model_id))

    async def _copy(self, host_id: str, model_id: str) -> None:
        with suppress(EngineError):
            await self._preload(host_id, Preload(model_id=model_id, wait=False))

    # ---- operators ----

    async def _preload(self, host_id: str, request: Preload) -> ModelStatus:
        with self._ledger.in_flight(host_id, request.model_id):
            outcome = await self._fleet.ask(host_id, request)
        assert isinstance(outcome, CommandResult), "a command is answered with an outcome"
        assert outcome.status is not None, "this one with a status"
        return outcome.status

    async def _ask_all(self, hosts: Iterable[str], request: Request) -> dict[str, CommandResult]:
        """All hosts are heard before one's refusal is raised; one that is lost meanwhile has nothing to say."""
        asked = list(hosts)
        outcomes = await asyncio.gather(*(self._fleet.ask(host, request) for host in asked), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, HostLost):
                raise outcome
        return {
            host: outcome for host, outcome in zip(asked, outcomes, strict=True) if isinstance(outcome, CommandResult)
        }

    def _spec(self, model_id: str) -> ModelSpec:
        return self._specs[model_id] if model_id in self._specs else no_model(model_id)

    def _check_host(self, host_id: str) -> None:
        if self._ledger.snapshot(host_id) is None:
            no_host(host_id, self._ledger.devices())

    # ---- what is wanted unasked ----

    def _on_change(self) -> None:
        """A host has come, or is back: who waits looks again, and what must be in memory is brought there."""
        self._changed.set()
        self._changed.clear()
        self._spawn(self._load_wanted(self._specs.values()))

    async def _load_wanted(self, specs: Iterable[ModelSpec]) -> None:
        """Those that no host has or expects, in the registry's order."""
        for spec in self._ledger.not_resident([spec for spec in specs if is_wanted(spec)]):
            with suppress(EngineError):
                await self.preload(spec.model_id, wait=False)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
