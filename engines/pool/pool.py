"""Runs the pool on an event loop: carries effects out, and turns outcomes, timers and callers into events.

It lives on one event loop and decides nothing. Every change is one synchronous `step`, so there is nothing to lock.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from functools import partial

import structlog
from msgspec import structs

from engines.pool.effect_runner import DiskScanner, EffectRunner
from engines.pool.estimates import Estimates, Measurement
from engines.pool.event_log import EventLog
from engines.pool.idle_verification import IdleVerification
from engines.pool.lease import Callers, Lease
from engines.pool.messages import (
    ArmTimer,
    Blocked,
    BudgetChanged,
    Done,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    Grant,
    LeaseCancelled,
    LeaseRequested,
    PoolEvent,
    PreloadRequested,
    ReadMemory,
    RegistryReloaded,
    TimerFired,
    WarmUpCompleted,
)
from engines.pool.reasons import (
    EVICTED,
    evicted_meanwhile,
    load_hangs,
    not_evicted,
    not_found,
    shut_down,
    shutting_down,
)
from engines.pool.runtime import HostConfig, HostRuntime, Timer
from engines.pool.slot import Slot
from engines.pool.state_machine import PoolStateMachine
from engines.pool.status import StatusView
from engines.protocols import Files, Loader
from engines.spec import ModelSpec
from engines.types import Budget, EmbedCall, HostSnapshot, ModelStatus, Plan, State

log = structlog.get_logger(__name__)

INTERRUPT_S = 5.0
"""How long requests that are interrupted at the end of the grace time get to let go."""


class ModelPool:
    """The models of one device, for callers on its event loop. Nothing works before `start`."""

    def __init__(
        self, config: HostConfig, specs: Mapping[str, ModelSpec], files: Files, loader: Loader, world: HostRuntime
    ) -> None:
        self._config = config
        self._world = world
        self._core = PoolStateMachine(specs, budget_bytes=0, rules=config.rules, jitter=world.jitter)
        self._state = self._core.state
        estimates = Estimates(files, world.measurements, config.device, config.workspace_bytes, config.conditions)
        self._work = EffectRunner(files, loader, estimates, world.workers, self._report, config.hang_s)
        self._verification = IdleVerification(self._work, self._state, world.time, self.step, self._spawn)
        self._scout = DiskScanner(self._work, self.step, self._spawn)
        self._view = StatusView(config.host_id, config.device, self._to_unix_s)
        self._callers = Callers()
        self.interrupt = self._callers.interrupt
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._timer: Timer | None = None
        self._total_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.log = EventLog(config.host_id, config.max_events)

    def __repr__(self) -> str:
        return repr(self._core).replace("<Pool", f"<Pool {self._config.host_id}")

    # ---- callers ----

    async def start(self) -> None:
        """Read the device, and look what is on disk, so that sizes are known before the first model is placed."""
        self._loop = asyncio.get_running_loop()
        reading = await self._world.workers.look(self._world.memory.read)
        self._total_bytes = reading.total_bytes
        self.step(BudgetChanged(self._config.budget.of(reading.total_bytes), reading.ceiling_bytes))
        await self._scout.look_around(list(self._state.current.values()))

    def lease(self, call: EmbedCall) -> Lease:
        """`async with pool.lease(call) as engine`; see `Lease`.

        Raises on entry:
            ModelNotFound, ModelTooLarge, ModelLoading, LoadFailed, OutOfMemory, ShuttingDown.
        """
        deadline_s = self._world.time.now_s() + call.load_timeout_s

        def acquire(waiter_id: int) -> LeaseRequested:
            return LeaseRequested(waiter_id, call.model_id, call.keep_alive_s, deadline_s, call.may_move)

        return Lease(self.step, self._callers, acquire)

    async def preload(self, model_id: str, *, pin: bool, wait: bool, may_move: bool = False) -> ModelStatus:
        """Load without a request; with `may_move`, another host is asked where it fails here.

        Raises:
            ModelInUse: an eviction came between; also what `lease` raises.
        """
        if self._state.is_draining:
            raise shutting_down()
        slot = self._slot(model_id)
        if self._state.blocked and slot.state not in ("ready", "warming"):
            raise load_hangs(slot, self._state.blocked)
        is_tentative = may_move and wait
        self.step(PreloadRequested(model_id, pin, is_tentative))
        if wait:
            call = EmbedCall(model_id=model_id, load_timeout_s=float("inf"), may_move=is_tentative)
            async with self.lease(call):
                if is_tentative and self.state_of(model_id) == "ready":
                    self.step(PreloadRequested(model_id, pin))
            slot = self._slot(model_id)
            is_kept = slot.state == "ready" and slot.is_pinned
            if slot.leaving_cause == EVICTED or (pin and not is_kept):
                raise evicted_meanwhile(slot)
        return self.status(model_id)

    async def evict(self, model_id: str, *, force: bool, timeout_s: float) -> ModelStatus:
        """Free the model after its requests; gives up at the time-out, and then it serves on."""
        waiter_id, future = self._callers.admit()
        self.step(EvictionRequested(waiter_id, model_id, force))
        at_s = self._world.time.now_s() + timeout_s
        timer = self._world.time.call_at(at_s, partial(self._give_up_eviction, waiter_id, timeout_s))
        try:
            await future
        finally:
            timer.cancel()
            self._callers.forget(waiter_id)
            self.step(LeaseCancelled(waiter_id))
        return self.status(model_id)

    async def aclose(self, grace_s: float) -> None:
        """Drain; interrupt what still runs after the grace time; free everything that can be freed."""
        self.step(DrainRequested())
        if not await self._is_empty_within(grace_s):
            log.warning("pool.grace_over", host=self._config.host_id, leases=len(self._callers.leases))
            self._callers.interrupt(shut_down)
            await self._is_empty_within(INTERRUPT_S)
        self._arm(None)
        self._work.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._world.workers.close()
        self.log.close()

    def reload(self, specs: Mapping[str, ModelSpec]) -> None:
        """What is new is looked for on disk, as at the start."""
        known = set(self._state.slots)
        self.step(RegistryReloaded(specs))
        new = [slot for slot in self._state.current.values() if slot.slot_id not in known]
        self._spawn(self._scout.look_around(new))

    def set_budget(self, budget: Budget) -> None:
        """From the next reading of the device on, which begins now; what is over it leaves as it may."""
        self._config = structs.replace(self._config, budget=budget)
        self._spawn(self._do(ReadMemory()))

    # ---- looking ----

    def check(self, awake_s: float) -> str:
        """Whether loads end. To be called every second or so; says why not, and tells those who wait for one."""
        hung = self._world.workers.hung(awake_s)
        if hung != self._state.blocked:
            if hung:
                log.error("load.hangs", host=self._config.host_id, hangs=hung)
            else:
                log.warning("load.ended_late", host=self._config.host_id, hung=self._state.blocked)
            self.step(Blocked(hung))
        return hung

    def state_of(self, model_id: str) -> State | None:
        slot = self._state.current.get(model_id)
        return slot.state if slot is not None else None

    def status(self, model_id: str) -> ModelStatus:
        slot = self._slot(model_id)
        return self._view.status(slot, self._work.engines.get(slot.slot_id), self._state.blocked)

    def snapshot(self) -> HostSnapshot:
        return self._view.snapshot(self._state, self._world.time.now_s(), self._total_bytes, self._work.engines)

    def plan(self, model_id: str) -> Plan:
        return self._view.plan(self._state, self._slot(model_id))

    async def size(self, model_id: str) -> None:
        """Learn what the model takes, where that is not known."""
        await self._scout.size(self._slot(model_id))

    def _slot(self, model_id: str) -> Slot:
        slot = self._state.current.get(model_id)
        if slot is None:
            raise not_found(model_id)
        return slot

    def verify_if_idle(self) -> None:
        """Hash files while nobody asks for anything. Nothing happens where this is no call of the pool's own loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # Ray may check a replica from a thread
            return
        self._verification.begin_if_idle()

    # ---- one step ----

    def step(self, event: PoolEvent) -> None:
        """The only way in. Effects are carried out before anything else can happen."""
        for effect in self._core.handle(event, self._world.time.now_s()):
            self._carry_out(effect)
        if self._state.is_draining and not self._state.charged():
            self._empty.set()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Grant():
                self._callers.answer(effect.waiter_id, self._work.engines[effect.slot_id])
            case Done():
                self._callers.answer(effect.waiter_id, None)
            case Fail():
                self._callers.answer(effect.waiter_id, effect.error)
            case Emit():
                self.log.record(effect, self._world.time.unix_s())
            case ArmTimer():
                self._arm(effect.at_s)
            case _:
                self._spawn(self._do(effect))

    def _arm(self, at_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at_s is None else self._world.time.call_at(at_s, partial(self.step, TimerFired()))

    # ---- outside work ----

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("pool.broken", host=self._config.host_id, exc_info=task.exception())

    async def _do(self, effect: Effect) -> None:
        if isinstance(effect, ReadMemory):
            event: PoolEvent = await self._work.read(self._world.memory, self._config.budget, self._state.budget_bytes)
        else:
            event = await self._work.do(effect)
        self.step(event)
        if isinstance(event, WarmUpCompleted):
            await self._remember(event)

    async def _remember(self, event: WarmUpCompleted) -> None:
        slot = self._state.slots[event.slot_id]
        if slot.files is not None and slot.load_s is not None:
            measured = Measurement(
                weight_bytes=event.weight_bytes, workspace_bytes=event.workspace_bytes, load_s=slot.load_s
            )
            await self._work.remember(slot.spec, slot.files, measured)

    def _report(self, event: PoolEvent) -> None:
        """From a thread. A loop that has closed meanwhile has nobody left to tell."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.step, event)

    # ---- time ----

    def _to_unix_s(self, at_s: float) -> float:
        return self._world.time.unix_s() - (self._world.time.now_s() - at_s)

    async def _is_empty_within(self, seconds: float) -> bool:
        timer = self._world.time.call_at(self._world.time.now_s() + seconds, self._empty.set)
        await self._empty.wait()
        timer.cancel()
        if self._state.charged():
            self._empty.clear()
            return False
        return True

    def _give_up_eviction(self, waiter_id: int, timeout_s: float) -> None:
        slot = self._state.holders.get(waiter_id)
        if slot is not None:
            self._callers.answer(waiter_id, not_evicted(slot, timeout_s))
