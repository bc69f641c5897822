"""Runs the pool's state machine on an event loop: executes its effects; turns calls, timers and results into events.

Makes no decisions itself. Every change is one synchronous `step` on one event loop, so no locks are needed.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from functools import partial

import structlog
from msgspec import structs

from engines.pool.effect_runner import DiskScanner, EffectRunner
from engines.pool.estimates import Estimates, Measurement, ReducedForms
from engines.pool.event_log import EventLog
from engines.pool.idle_verification import IdleVerification
from engines.pool.lease import Callers, Lease
from engines.pool.messages import (
    ArmTimer,
    BudgetChanged,
    Done,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    Grant,
    HostBudgetChanged,
    LeaseCancelled,
    LeaseRequested,
    LoadsBlocked,
    PoolEvent,
    PreloadRequested,
    ReadMemory,
    RegistryReloaded,
    TimerFired,
    WarmUpCompleted,
)
from engines.pool.neighbour_messages import Notify
from engines.pool.pool_group import PoolGroup
from engines.pool.reasons import (
    EVICTED,
    cancelled_by_eviction,
    eviction_timed_out,
    interrupted_by_shutdown,
    load_hangs,
    not_found,
    shutting_down,
)
from engines.pool.runtime import HostConfig, HostRuntime, Timer
from engines.pool.slot import Slot
from engines.pool.state_machine import PoolStateMachine
from engines.pool.status import StatusView
from engines.protocols import Files, Loader
from engines.spec import ModelSpec
from engines.types import BaseCall, Budget, HostSnapshot, ModelStatus, Plan, State, Tier

log = structlog.get_logger(__name__)

INTERRUPT_S = 5.0
"""How long `aclose` waits for interrupted requests to release their leases, after the grace time."""


class ModelPool:
    """Leases the models of one device to callers on its event loop. Call `start` first."""

    def __init__(
        self, config: HostConfig, specs: Mapping[str, ModelSpec], files: Files, loader: Loader, runtime: HostRuntime
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._group = runtime.group or PoolGroup()
        self._machine = PoolStateMachine(
            specs,
            budget_bytes=0,
            rules=config.rules,
            jitter=runtime.jitter,
            host_budget_bytes=config.host_budget_bytes,
            neighbours=self._group.core,
        )
        self._group.join(config.host_id, config.device, self.step)
        self._state = self._machine.state
        reduced = ReducedForms(runtime.precisions, runtime.form_cache)
        estimates = Estimates(
            files, runtime.measurements, config.device, config.workspace_bytes, config.conditions, reduced
        )
        self._runner = EffectRunner(files, loader, estimates, runtime.workers, self._step_threadsafe, config.hang_s)
        self._verification = IdleVerification(self._runner, self._state, runtime.time, self.step, self._spawn)
        self._scanner = DiskScanner(self._runner, self.step, self._spawn)
        self._view = StatusView(config.host_id, config.device, self._to_unix_s, self._group.core)
        self._callers = Callers()
        self.interrupt = self._callers.interrupt_all
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._timer: Timer | None = None
        self._total_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.log = EventLog(config.host_id, config.max_events)

    def __repr__(self) -> str:
        return repr(self._machine).replace("<Pool", f"<Pool {self._config.host_id}")

    # ---- callers ----

    async def start(self) -> None:
        """Reads the device and finds models on disk, so that sizes are known before the first model is placed."""
        self._loop = asyncio.get_running_loop()
        reading = await self._runtime.workers.read_disk(self._runtime.memory.read)
        self._total_bytes = reading.total_bytes
        self.step(BudgetChanged(self._config.budget.of(reading.total_bytes), reading.ceiling_bytes))
        await self._scanner.scan(list(self._state.current.values()))

    def lease(self, call: BaseCall) -> Lease:
        """Returns a lease on the call's model: `async with pool.lease(call) as engine`; see `Lease`.

        Raises on entry:
            ModelNotFound, ModelTooLarge, ModelLoading, LoadFailed, OutOfMemory, ShuttingDown.
        """
        deadline_s = self._runtime.time.now_s() + call.load_timeout_s

        def acquire(waiter_id: int) -> LeaseRequested:
            return LeaseRequested(waiter_id, call.model_id, call.keep_alive_s, deadline_s, call.may_move, call.is_flex)

        return Lease(self.step, self._callers, acquire)

    async def preload(self, model_id: str, *, pin: bool, wait: bool, may_move: bool = False) -> ModelStatus:
        """Loads the model without a request; with `may_move`, the caller tries another host after a failure.

        Raises:
            ModelInUse: an eviction evicted the model in the meantime. Also the errors of `lease`.
        """
        if self._state.is_draining:
            raise shutting_down()
        slot = self._slot(model_id)
        if self._state.blocked and slot.state not in ("ready", "warming"):
            raise load_hangs(slot, self._state.blocked)
        is_tentative = may_move and wait
        self.step(PreloadRequested(model_id, pin, is_tentative))
        if wait:
            call = BaseCall(model_id=model_id, load_timeout_s=float("inf"), may_move=is_tentative)
            async with self.lease(call):
                if is_tentative and self.state_of(model_id) == "ready":
                    self.step(PreloadRequested(model_id, pin))
            slot = self._slot(model_id)
            is_kept = slot.state == "ready" and slot.is_pinned
            if slot.leaving_cause == EVICTED or (pin and not is_kept):
                raise cancelled_by_eviction(slot)
        return self.status(model_id)

    async def evict(self, model_id: str, *, force: bool, timeout_s: float, to: Tier = "disk") -> ModelStatus:
        """Evicts the model after its running requests; `to` `host` parks it where the host budget has room.

        Raises:
            ModelInUse: it was not free after `timeout_s`, or a load hangs, or a preload cancelled the eviction.
            ModelPinned: it is pinned and `force` is false.
        """
        waiter_id, future = self._callers.register()
        self.step(EvictionRequested(waiter_id, model_id, force, to))
        at_s = self._runtime.time.now_s() + timeout_s
        timer = self._runtime.time.call_at(at_s, partial(self._time_out_eviction, waiter_id, timeout_s))
        try:
            await future
        finally:
            timer.cancel()
            self._callers.unregister(waiter_id)
            self.step(LeaseCancelled(waiter_id))
        return self.status(model_id)

    async def aclose(self, grace_s: float) -> None:
        """Shuts down: drains, interrupts requests that still run after `grace_s`, frees all models."""
        self.step(DrainRequested())
        if not await self._all_freed_within(grace_s):
            log.warning("pool.grace_over", host=self._config.host_id, leases=len(self._callers.leases))
            self._callers.interrupt_all(interrupted_by_shutdown)
            await self._all_freed_within(INTERRUPT_S)
        self._arm_timer(None)
        self._runner.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._runtime.workers.close()
        self.log.close()

    def reload(self, specs: Mapping[str, ModelSpec]) -> None:
        """Replaces the registry; finds new models on disk, as `start` does."""
        known = set(self._state.slots)
        self.step(RegistryReloaded(specs))
        new = [slot for slot in self._state.current.values() if slot.slot_id not in known]
        self._spawn(self._scanner.scan(new))

    def set_budget(self, budget: Budget) -> None:
        """Sets the memory budget and reads the device; models over the budget are evicted under the usual rules."""
        self._config = structs.replace(self._config, budget=budget)
        self._spawn(self._run(ReadMemory()))

    def set_host_budget(self, budget_bytes: int) -> None:
        """Sets the main memory for parked models; those beyond it leave, 0 frees them all."""
        self.step(HostBudgetChanged(budget_bytes))

    # ---- status ----

    def check(self, since_pause_s: float) -> str:
        """Returns the load that hangs, or an empty string; fails the requests that wait for loads.

        Call it every second. `since_pause_s`: seconds since the last pause of this process.
        """
        hung = self._runtime.workers.hung(since_pause_s)
        if hung != self._state.blocked:
            if hung:
                log.error("load.hangs", host=self._config.host_id, hangs=hung)
            else:
                log.warning("load.ended_late", host=self._config.host_id, hung=self._state.blocked)
            self.step(LoadsBlocked(hung))
        return hung

    def state_of(self, model_id: str) -> State | None:
        slot = self._state.current.get(model_id)
        return slot.state if slot is not None else None

    def status(self, model_id: str) -> ModelStatus:
        slot = self._slot(model_id)
        return self._view.status(slot, self._runner.engines.get(slot.slot_id), self._state.blocked)

    def snapshot(self) -> HostSnapshot:
        return self._view.snapshot(self._state, self._runtime.time.now_s(), self._total_bytes, self._runner.engines)

    def plan(self, model_id: str) -> Plan:
        return self._view.plan(self._state, self._slot(model_id))

    async def estimate_size(self, model_id: str) -> None:
        """Estimates the memory that the model needs, if it is unknown."""
        await self._scanner.estimate_size(self._slot(model_id))

    def _slot(self, model_id: str) -> Slot:
        slot = self._state.current.get(model_id)
        if slot is None:
            raise not_found(model_id)
        return slot

    def verify_if_idle(self) -> None:
        """Starts to hash model files if the pool is idle. Does nothing when called outside the pool's event loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # Ray may check the health of a replica on another thread
            return
        self._verification.start_if_idle()

    # ---- one step ----

    def step(self, event: PoolEvent) -> None:
        """Passes one event to the state machine and executes all its effects before returning."""
        for effect in self._machine.handle(event, self._runtime.time.now_s()):
            self._execute(effect)
        if self._group.queue:
            self._group.deliver()
        if self._state.is_draining and not self._state.holds_memory():
            self._freed.set()

    def _execute(self, effect: Effect) -> None:
        match effect:
            case Grant():
                self._callers.resolve(effect.waiter_id, self._runner.engines[effect.slot_id])
            case Done():
                self._callers.resolve(effect.waiter_id, None)
            case Fail():
                self._callers.resolve(effect.waiter_id, effect.error)
            case Emit():
                self.log.record(effect, self._runtime.time.unix_s())
            case ArmTimer():
                self._arm_timer(effect.at_s)
            case Notify():
                self._group.post(effect)
            case _:
                self._spawn(self._run(effect))

    def _arm_timer(self, at_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at_s is None else self._runtime.time.call_at(at_s, partial(self.step, TimerFired()))

    # ---- asynchronous work ----

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("pool.broken", host=self._config.host_id, exc_info=task.exception())

    async def _run(self, effect: Effect) -> None:
        if isinstance(effect, ReadMemory):
            event: PoolEvent = self._without_parked(
                await self._runner.read(self._runtime.memory, self._config.budget, self._state.budget_bytes)
            )
        else:
            event = await self._runner.run(effect)
        self.step(event)
        if isinstance(event, WarmUpCompleted):
            await self._save_measurement(event)

    def _without_parked(self, reading: BudgetChanged) -> BudgetChanged:
        """Returns a reading without the bytes of parked models: on a CPU these are in the same memory, which the
        reading counts as this process's to use."""
        if reading.ceiling_bytes is None or self._config.device != "cpu":
            return reading
        return BudgetChanged(reading.budget_bytes, max(0, reading.ceiling_bytes - self._state.host_used_bytes()))

    async def _save_measurement(self, event: WarmUpCompleted) -> None:
        slot = self._state.slots[event.slot_id]
        if slot.files is not None and slot.load_s is not None and not event.share_bytes:  # those of a part
            measured = Measurement(
                weight_bytes=event.weight_bytes, workspace_bytes=event.workspace_bytes, load_s=slot.load_s
            )
            await self._runner.save_measurement(slot.loaded_spec, slot.files, measured)

    def _step_threadsafe(self, event: PoolEvent) -> None:
        """Schedules a step from another thread; drops the event if the loop has closed."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.step, event)

    # ---- time ----

    def _to_unix_s(self, at_s: float) -> float:
        return self._runtime.time.unix_s() - (self._runtime.time.now_s() - at_s)

    async def _all_freed_within(self, seconds: float) -> bool:
        timer = self._runtime.time.call_at(self._runtime.time.now_s() + seconds, self._freed.set)
        await self._freed.wait()
        timer.cancel()
        if self._state.holds_memory():
            self._freed.clear()
            return False
        return True

    def _time_out_eviction(self, waiter_id: int, timeout_s: float) -> None:
        slot = self._state.holders.get(waiter_id)
        if slot is not None:
            self._callers.resolve(waiter_id, eviction_timed_out(slot, timeout_s))
