"""Simulates everything around a `PoolStateMachine`: requests, operators, asynchronous work and time; checks invariants.

It keeps its own model of the pool from the effects alone and compares the two after every step, so that inconsistent
state of the pool is detected.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from msgspec import Struct, structs

from engines.pool.messages import (
    NEVER,
    ArmTimer,
    BudgetChanged,
    Discard,
    Done,
    DownloadCompleted,
    DownloadErrored,
    DownloadProgressed,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    FilesDiscarded,
    FilesFound,
    FilesLocated,
    Grant,
    HostBudgetChanged,
    LeaseCancelled,
    LeaseReleased,
    LeaseRequested,
    LoadCompleted,
    LoadErrored,
    LoadsBlocked,
    ParkCompleted,
    ParkErrored,
    PoolEvent,
    PreloadRequested,
    ReadMemory,
    RegistryReloaded,
    StartFetch,
    StartLoad,
    StartLocate,
    StartPark,
    StartUnload,
    StartWake,
    StartWarm,
    TimerFired,
    UnloadCompleted,
    WakeCompleted,
    WakeErrored,
    WarmUpCompleted,
    WarmUpErrored,
)
from engines.pool.slot import EDGES, LoadFailure, MemoryNeed, PoolPolicy, SmallerForm
from engines.pool.state_machine import PoolStateMachine
from engines.spec import ModelSpec
from engines.types import ModelFiles, State, Tier

BUDGET = 1000
RULES = PoolPolicy()
EVICTED = "evicted by an operator"
OPERATOR_CAUSES = frozenset({EVICTED, "the host shuts down"})
UNCONDITIONAL_CAUSES = OPERATOR_CAUSES | {"removed from the registry", "changed in the registry"}


class Violation(AssertionError):
    """An invariant of the pool does not hold."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Violation(message)


class SlotView(Struct):
    """A slot as derived from events alone. `measured`: its memory when it left the device; `is_other`: its weights came
    back wrong from main memory."""

    model_id: str
    state: State = "absent"
    charge: MemoryNeed | None = None
    leases: int = 0
    ready_at_s: float = 0.0
    load_began_at_s: float = 0.0
    load_s: float = 0.0
    dtype: str = "auto"
    host_charge: int = 0
    parked_at_s: float = 0.0
    measured: MemoryNeed | None = None
    is_other: bool = False


def in_int8(need: MemoryNeed) -> MemoryNeed:
    """Returns what a model takes in int8."""
    return structs.replace(need, weight_bytes=need.weight_bytes // 3)


def sum_needs(needs: Sequence[MemoryNeed]) -> int:
    """Sums needs independently of `engines.pool.eviction.total_bytes`, so that a bug there is detected."""
    return sum(need.weight_bytes for need in needs) + max((need.workspace_bytes for need in needs), default=0)


class Storm:
    """One pool and all events that can happen to it. `truth`: the bytes that each model measures."""

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        truth: Mapping[str, MemoryNeed],
        make: Callable[..., PoolStateMachine] = PoolStateMachine,
        rules: PoolPolicy = RULES,
        host_budget: int = 0,
    ) -> None:
        self.core = make(specs, budget_bytes=BUDGET, rules=rules, host_budget_bytes=host_budget)
        self.host_budget = host_budget
        self.host_allowance = 0
        self.specs, self.truth = dict(specs), truth
        self.now_s = 100.0
        self.timer_s: float | None = None
        self.budget = BUDGET
        self.ceiling: int | None = None
        self.read_at_s = 0.0
        self.peak_allowance = 0
        self.work: list[Effect] = []
        self.views: dict[int, SlotView] = {}
        self.waiting: dict[int, str] = {}
        self.movable: set[int] = set()
        self.leases: dict[int, int] = {}
        self.evictors: list[int] = []
        self.sole_evictors: dict[int, tuple[int, str]] = {}
        self.evicted: set[str] = set()
        self.last_command: dict[str, str] = {}
        self.since: dict[int, int] = {}
        self.is_draining = False
        self.blocked = ""
        self._next_id = 0
        self._evictions: list[tuple[int, str]] = []
        self._sync_views()

    # ---- actions ----

    def acquire(
        self, model_id: str, keep_alive_s: float | None = None, timeout_s: float = NEVER, *, may_move: bool = False
    ) -> int:
        waiter_id = self._new_id()
        self.waiting[waiter_id] = model_id
        self._note_request(model_id)
        is_ready = any(view.model_id == model_id and view.state == "ready" for view in self.views.values())
        if may_move:
            self.movable.add(waiter_id)
        effects = self.step(LeaseRequested(waiter_id, model_id, keep_alive_s, self.now_s + timeout_s, may_move))
        if is_ready and not self.is_draining:
            granted = any(isinstance(effect, Grant) and effect.waiter_id == waiter_id for effect in effects)
            require(granted, f"{model_id} is ready, but a request for it waits")
        return waiter_id

    def cancel(self, waiter_id: int) -> None:
        """Cancels a waiter, a lease (even one granted in this tick) or an eviction."""
        slot_id = self.leases.pop(waiter_id, None)
        if slot_id is not None:
            self.views[slot_id].leases -= 1
        self.waiting.pop(waiter_id, None)
        if waiter_id in self.evictors:
            self.evictors.remove(waiter_id)
        self.step(LeaseCancelled(waiter_id))

    def release(self, waiter_id: int) -> None:
        self.views[self.leases.pop(waiter_id)].leases -= 1
        self.step(LeaseReleased(waiter_id))

    def preload(self, model_id: str, *, pin: bool = False, is_tentative: bool = False) -> None:
        self._note_request(model_id)
        slot = self.core.state.current.get(model_id)
        if slot is not None and not self.is_draining and not self.core.state.is_too_large(slot.need):
            self.last_command[model_id] = "preload"
        self.step(PreloadRequested(model_id, pin, is_tentative))

    def evict(self, model_id: str, *, force: bool = False, to: Tier = "disk") -> int:
        waiter_id = self._new_id()
        self.evictors.append(waiter_id)
        slot = self.core.state.current.get(model_id)
        if slot is not None and model_id not in self.waiting.values():
            self.sole_evictors[waiter_id] = (slot.slot_id, model_id)
        self.last_command[model_id] = "evict"
        self.step(EvictionRequested(waiter_id, model_id, force, to))
        return waiter_id

    def _note_request(self, model_id: str) -> None:
        """Records that the model is requested after its eviction."""
        self.evicted.discard(model_id)
        self.sole_evictors = {at: known for at, known in self.sole_evictors.items() if known[1] != model_id}

    def reload(self, specs: Mapping[str, ModelSpec]) -> None:
        self.specs = dict(specs)
        self.step(RegistryReloaded(specs))

    def stray(self, slot_id: int) -> None:
        """Sends late reports: of the scan at start, and the progress of a finished download."""
        self.step(DownloadProgressed(slot_id, 1, 2))
        self.step(FilesFound(slot_id, a_folder(), self._estimate(slot_id, "ok")))

    def set_host_budget(self, budget: int) -> None:
        """The registry gives another host budget; parked models may exceed it until they have left."""
        self.host_budget = budget
        self.host_allowance = max(self.host_allowance, self.host_used())
        self.step(HostBudgetChanged(budget))

    def block(self, reason: str) -> None:
        """A load of this process begins or ceases to hang, on this host or another."""
        self.blocked = reason
        self.step(LoadsBlocked(reason))

    def can_end(self, work: Effect) -> bool:
        """Tells whether the work can end: a hanging load blocks all work on the loader's thread."""
        return not (self.blocked and isinstance(work, StartLoad | StartUnload | StartPark | StartWake | ReadMemory))

    def drain(self) -> None:
        self.is_draining = True
        self.step(DrainRequested())

    def advance(self, seconds: float) -> None:
        """Advances the clock; fires the timer exactly at its time."""
        until_s = self.now_s + seconds
        while self.timer_s is not None and self.timer_s <= until_s:
            self._fire_timer()
        self.now_s = until_s

    def finish(self, index: int, fate: str = "ok", ceiling: int | None = None) -> None:
        """Ends asynchronous work with `fate`: `ok`, a failure's kind, or `unknown`, `absent`, `low`, `high`, `kept`."""
        work = self.work.pop(index)
        event = self._outcome(work, fate, ceiling)
        if isinstance(event, UnloadCompleted | LoadErrored):
            self.views[event.slot_id].charge, self.views[event.slot_id].host_charge = None, 0
        self._note_tier(event)
        if isinstance(event, WarmUpCompleted):
            need = MemoryNeed(weight_bytes=event.weight_bytes, workspace_bytes=event.workspace_bytes)
            self.views[event.slot_id].charge = need
            self.peak_allowance = max(self.peak_allowance, self.used())
        if isinstance(event, BudgetChanged):
            self.budget, self.ceiling, self.read_at_s = event.budget_bytes, event.ceiling_bytes, self.now_s
            self.peak_allowance = max(self.peak_allowance, self.used())
        self.step(event)

    def _note_tier(self, event: PoolEvent) -> None:
        """Records that copies between the tiers have ended, and what each tier holds then."""
        if isinstance(event, ParkCompleted):
            view = self.views[event.slot_id]
            view.measured, view.charge, view.host_charge = view.charge, None, event.host_bytes
            self.host_allowance = max(self.host_allowance, self.host_used())
        if isinstance(event, WakeCompleted):
            self.views[event.slot_id].host_charge = 0
        if isinstance(event, WakeErrored):
            self.views[event.slot_id].is_other = True

    def settle(self) -> None:
        """Completes all work, releases all leases, fires timers; then no request or operator may still wait."""
        if self.blocked:
            self.block("")
        for _ in range(3000):
            if self.work:
                self.finish(0)
            elif self.leases:
                self.release(next(iter(self.leases)))
            elif self.timer_s is not None:
                self._fire_timer()
            else:
                break
        else:
            raise Violation(f"does not settle: {self.core!r}")
        require(not self.waiting, f"requests {list(self.waiting.values())} wait for ever: {self.core!r}")
        require(not self.evictors, f"an operator waits for ever: {self.core!r}")
        for view in self.views.values():
            is_at_rest = view.state in ("absent", "cold", "ready", "parked", "failed")
            require(is_at_rest, f"{view.model_id} is stuck in {view.state}")
            is_held = view.state in ("ready", "parked")
            require(not self.is_draining or not is_held, f"{view.model_id} is still {view.state} after the shutdown")
        for slot in self.core.state.slots.values():
            require(slot.claim is None, f"{slot.model_id} still claims memory: a load was lost")

    # ---- results of asynchronous work ----

    def _outcome(self, work: Effect, fate: str, ceiling: int | None) -> PoolEvent:
        if isinstance(work, ReadMemory):
            return BudgetChanged(self.budget, ceiling)
        if isinstance(work, StartPark | StartWake):
            return self._copied(work, fate)
        if isinstance(work, StartUnload):
            return UnloadCompleted(work.slot_id)
        assert isinstance(work, StartLocate | StartFetch | Discard | StartLoad | StartWarm)
        return self._made(work, fate)

    def _made(self, work: StartLocate | StartFetch | Discard | StartLoad | StartWarm, fate: str) -> PoolEvent:
        slot_id = work.slot_id
        if isinstance(work, Discard):
            return FilesDiscarded(slot_id, fate != "kept")
        if isinstance(work, StartLocate):
            return self._located(work, fate)
        if fate not in ("ok", "low", "high"):
            return self._failed(work, LoadFailure(kind=fate, message="scripted"))
        if isinstance(work, StartFetch):
            return DownloadCompleted(slot_id, a_folder(), self._estimate(slot_id, fate))
        if isinstance(work, StartLoad):
            return LoadCompleted(slot_id)
        view = self.views[slot_id]
        need = in_int8(self.truth[view.model_id]) if view.dtype == "int8" else self.truth[view.model_id]
        return WarmUpCompleted(slot_id, need.weight_bytes, need.workspace_bytes)

    def _copied(self, work: StartPark | StartWake, fate: str) -> PoolEvent:
        """Ends a copy between the tiers; `high`: more bytes than were charged."""
        failure = LoadFailure(kind=fate, message="scripted")
        if isinstance(work, StartWake):
            return WakeCompleted(work.slot_id) if fate == "ok" else WakeErrored(work.slot_id, failure)
        charge = self.views[work.slot_id].charge
        assert charge is not None
        more = {"ok": 0, "high": 40}.get(fate)
        if more is None:
            return ParkErrored(work.slot_id, failure)
        return ParkCompleted(work.slot_id, charge.weight_bytes + more)

    def _located(self, work: StartLocate, fate: str) -> PoolEvent:
        estimate = self._estimate(work.slot_id, fate)
        if fate in ("ok", "low", "high"):
            return FilesLocated(work.slot_id, a_folder(), estimate)
        if fate in ("absent", "unknown"):
            return FilesLocated(work.slot_id, None, estimate if fate == "absent" else None)
        return DownloadErrored(work.slot_id, LoadFailure(kind=fate, message="scripted"))

    def _failed(self, work: StartFetch | StartLoad | StartWarm, failure: LoadFailure) -> PoolEvent:
        if isinstance(work, StartFetch):
            return DownloadErrored(work.slot_id, failure)
        return (
            LoadErrored(work.slot_id, failure) if isinstance(work, StartLoad) else WarmUpErrored(work.slot_id, failure)
        )

    def _estimate(self, slot_id: int, fate: str) -> MemoryNeed:
        """Returns an estimate for each dtype."""
        spec = self.core.state.slots[slot_id].spec
        need = self._estimate_of(self.truth[spec.model_id], fate)
        if not spec.smaller_dtypes:
            return need
        smaller = self._estimate_of(in_int8(self.truth[spec.model_id]), fate)
        return structs.replace(need, smaller=(SmallerForm("int8", smaller),))

    def _estimate_of(self, truth: MemoryNeed, fate: str) -> MemoryNeed:
        """Returns an estimate: exact weights and a guessed workspace, or all too low or too high."""
        if fate == "high":  # measured under other settings, with smaller weights in the headers
            least = truth.weight_bytes * 2 // 3
            return MemoryNeed(weight_bytes=truth.weight_bytes * 2, workspace_bytes=90, least_weight_bytes=least)
        if fate == "low":
            return MemoryNeed(weight_bytes=truth.weight_bytes * 2 // 3, workspace_bytes=20, weights_known=True)
        return MemoryNeed(weight_bytes=truth.weight_bytes, workspace_bytes=60, weights_known=True)

    # ---- steps and invariants ----

    def step(self, event: PoolEvent) -> Sequence[Effect]:
        effects = self.core.handle(event, self.now_s)
        self._sync_views()
        for effect in effects:
            self._apply(effect)
        self._check()
        return effects

    def used(self) -> int:
        return sum_needs([view.charge for view in self.views.values() if view.charge])

    def host_used(self) -> int:
        return sum(view.host_charge for view in self.views.values())

    @property
    def limit(self) -> int:
        """The budget, or less while a reading of the device is valid."""
        if self.ceiling is None or self.now_s >= self.read_at_s + RULES.reading_s:
            return self.budget
        return min(self.budget, self.ceiling)

    def _apply(self, effect: Effect) -> None:
        if isinstance(effect, Emit):
            if effect.source != effect.target:  # else it reports no transition
                self._on_emit(effect)
        elif isinstance(effect, Grant):
            self._on_grant(effect)
        elif isinstance(effect, Fail | Done):
            self._on_answer(effect)
        elif isinstance(effect, ArmTimer):
            require(effect.at_s is None or effect.at_s > self.now_s, "the timer is armed for a time that has passed")
            self.timer_s = effect.at_s
        else:
            self._on_work(effect)

    def _on_emit(self, effect: Emit) -> None:
        view = self.views[effect.slot_id]
        require(effect.source == view.state, f"{view.model_id} was {view.state}, the event says {effect.source}")
        require(effect.target in EDGES[effect.source], f"{effect.source} → {effect.target} is not drawn")
        view.state = effect.target
        self._note_times(effect, view)
        if effect.source == "parked" and effect.target == "unloading":
            self._on_leaving_host(effect, view)
        if effect.target == "draining":
            self._on_eviction(effect, view)
        self._note_claims(effect)
        if effect.target == "retired":
            del self.views[effect.slot_id]

    def _note_times(self, effect: Emit, view: SlotView) -> None:
        if effect.target in ("loading", "waking"):
            view.load_began_at_s = self.now_s
        if effect.target == "parked":
            view.parked_at_s = self.now_s
        if effect.target == "ready":
            require(not view.is_other, f"{view.model_id} serves with other weights than before it was parked")
        if effect.source in ("warming", "waking") and effect.target == "ready":
            view.ready_at_s, view.load_s = self.now_s, self.now_s - view.load_began_at_s

    def _note_claims(self, effect: Emit) -> None:
        if effect.source == "waiting_space" and effect.target != "loading":
            del self.since[effect.slot_id]
        if effect.target == "waiting_space":
            self.since[effect.slot_id] = self.core.state.slots[effect.slot_id].claim or 0

    def _on_leaving_host(self, effect: Emit, view: SlotView) -> None:
        """Checks that a parked model leaves for others only if nobody waits for it, it is old enough and not pinned."""
        require(
            not self.blocked or effect.cause in UNCONDITIONAL_CAUSES, f"{view.model_id} leaves, but cannot be freed"
        )
        self.since.pop(effect.slot_id, None)
        if not effect.cause.startswith("left main memory for"):
            return
        slot = self.core.state.slots[effect.slot_id]
        require(slot.claim is None and not slot.waiters, f"{view.model_id} left main memory, but requests wait for it")
        require(not (slot.spec.pinned or slot.operator_pin), f"{view.model_id} is pinned and left main memory")
        is_mature = self.now_s >= view.parked_at_s + RULES.min_residency_s
        require(is_mature, f"{view.model_id} left main memory before its minimum residency")

    def _on_eviction(self, effect: Emit, view: SlotView) -> None:
        """Checks an eviction: only operators evict pinned models, no claim evicts young models or in vain."""
        may_leave = not self.blocked or effect.cause in UNCONDITIONAL_CAUSES - {EVICTED}
        require(may_leave, f"{view.model_id} is evicted, but its memory cannot be freed: {effect.cause}")
        if effect.cause not in UNCONDITIONAL_CAUSES:
            slot = self.core.state.slots[effect.slot_id]
            require(
                not (slot.spec.pinned or slot.operator_pin),
                f"{view.model_id} is pinned and was evicted: {effect.cause}",
            )
        if effect.cause == EVICTED:
            is_last = self.last_command.get(view.model_id) == "evict"
            require(is_last, f"{view.model_id} is evicted for an operator, but was preloaded since")
        if effect.claimant is None:
            return
        self._check_no_form_fits(effect.claimant)
        mature_s = view.ready_at_s + max(RULES.min_residency_s, RULES.residency_loads * view.load_s)
        require(self.now_s >= mature_s, f"{view.model_id} was evicted before its minimum residency")
        self._evictions.append((effect.slot_id, effect.claimant))

    def _check_no_form_fits(self, claimant: str) -> None:
        """Checks that nothing is evicted for a model that fits into free memory in one of its dtypes."""
        slot = self.core.state.current[claimant]
        need = slot.need if slot.state != "parked" else None  # a parked model comes back as it was loaded
        held = [v.charge for v in self.views.values() if v.charge]
        for form in need.smaller if need is not None else ():
            require(sum_needs([*held, form.need]) > self.limit, f"{claimant} fits in {form.dtype}, but evicts for it")

    def _on_grant(self, effect: Grant) -> None:
        require(effect.waiter_id in self.waiting, f"waiter {effect.waiter_id} gets a second outcome, or was cancelled")
        view = self.views[effect.slot_id]
        require(view.state == "ready", f"a lease on {view.model_id} is granted while it is {view.state}")
        del self.waiting[effect.waiter_id]
        self.leases[effect.waiter_id] = effect.slot_id
        view.leases += 1

    def _on_answer(self, effect: Fail | Done) -> None:
        if effect.waiter_id in self.evictors:
            self.evictors.remove(effect.waiter_id)
            slot_id, model_id = self.sole_evictors.pop(effect.waiter_id, (-1, ""))
            current = self.core.state.current.get(model_id)
            if isinstance(effect, Done) and current is not None and current.slot_id == slot_id:
                self.evicted.add(model_id)
            return
        require(effect.waiter_id in self.waiting, f"waiter {effect.waiter_id} gets a second outcome, or was cancelled")
        del self.waiting[effect.waiter_id]

    def _on_work(self, effect: Effect) -> None:
        if isinstance(effect, StartUnload):
            view = self.views[effect.slot_id]
            require(view.leases == 0, f"{view.model_id} is freed with {view.leases} leases")
        if isinstance(effect, StartLoad):
            self._on_load(effect)
        if isinstance(effect, StartPark):
            self._on_park(effect)
        if isinstance(effect, StartWake):
            self._on_wake(effect)
        if isinstance(effect, StartFetch | StartLocate):
            same = [
                w
                for w in self.work
                if isinstance(w, StartFetch | StartLocate) and w.spec.model_id == effect.spec.model_id
            ]
            require(not same, f"{effect.spec.model_id} is fetched twice at once")
        self.work.append(effect)

    def _on_park(self, effect: StartPark) -> None:
        """Charges main memory from before the copy begins."""
        view = self.views[effect.slot_id]
        require(view.state == "parking" and view.leases == 0, f"{view.model_id} is parked with {view.leases} leases")
        require(not self.blocked, f"{view.model_id} is to be parked while loads hang")
        assert view.charge is not None
        view.host_charge = view.charge.weight_bytes
        require(self.host_used() <= self.host_budget, f"parking {view.model_id} takes {self.host_used()} bytes")

    def _on_wake(self, effect: StartWake) -> None:
        """Charges the device from before the copy begins."""
        view = self.views[effect.slot_id]
        at_work = [work for work in self.work if getattr(work, "slot_id", None) == effect.slot_id]
        require(view.state == "waking" and not at_work, f"{view.model_id} is woken during {at_work}")
        require(view.charge is None and view.host_charge > 0, f"{view.model_id} is woken, but is not in main memory")
        require(view.model_id not in self.evicted, f"{view.model_id} was evicted and is woken without a request")
        require(not self.blocked, f"{view.model_id} is to be woken while loads hang")
        view.charge = view.measured
        require(self.used() <= self.limit, f"waking {view.model_id} takes {self.used()} of {self.limit} bytes")
        self.since.pop(effect.slot_id, None)
        self._check_precedence(effect.slot_id)

    def _on_load(self, effect: StartLoad) -> None:
        view = self.views[effect.slot_id]
        same = [v for v in self.views.values() if v.model_id == view.model_id and v.state in ("loading", "warming")]
        in_work = [w for w in self.work if isinstance(w, StartLoad) and w.spec.model_id == view.model_id]
        require(len(same) == 1 and not in_work, f"{view.model_id} is loaded twice at once")
        require(view.model_id not in self.evicted, f"{view.model_id} was evicted and is loaded again without a request")
        require(not self.blocked, f"{view.model_id} is to be loaded while loads hang")
        require(view.charge is None, f"{view.model_id} is loaded while its last memory is not free")
        self._check_form(view, effect)
        view.charge, view.dtype, view.is_other = effect.need, effect.spec.dtype, False
        require(self.used() <= self.limit, f"loading {view.model_id} takes {self.used()} of {self.limit} bytes")
        del self.since[effect.slot_id]
        self._check_precedence(effect.slot_id)

    def _check_precedence(self, slot_id: int) -> None:
        """Checks that a claim which was just admitted takes no memory that an older one needs."""
        view, mine = self.views[slot_id], self.core.state.slots[slot_id].claim
        assert mine is not None
        older = [slot_id for slot_id, claim in self.since.items() if claim < mine and self._can_fit(slot_id)]
        if older:
            first_s = min(self.core.state.slots[slot_id].claimed_at_s for slot_id in older)
            stay = [v.charge for v in self.views.values() if v.charge and v.load_began_at_s >= first_s]
            needs = [self.core.admission.need(self.core.state.slots[slot_id]) for slot_id in older]
            require(sum_needs([*stay, *needs]) <= self.limit, f"{view.model_id} takes memory that an older claim needs")
            self._check_claim_order(view, min(older, key=lambda slot_id: self.since[slot_id]))

    def _check_form(self, view: SlotView, effect: StartLoad) -> None:
        """Checks that a smaller dtype is taken only where the preferred one does not fit into free memory."""
        slot = self.core.state.slots[effect.slot_id]
        if effect.spec.dtype == slot.spec.dtype:
            return
        require(effect.spec.dtype in slot.spec.smaller_dtypes, f"{view.model_id} is loaded in {effect.spec.dtype}")
        assert slot.need is not None
        held = [v.charge for v in self.views.values() if v.charge]
        least = slot.need.known()
        fits = sum_needs([*held, least, MemoryNeed(workspace_bytes=slot.need.workspace_bytes)]) <= self.limit
        is_certain = least.weight_bytes == slot.need.weight_bytes
        require(not (fits and is_certain), f"{view.model_id} is loaded in int8, but its preferred dtype fits")

    def _check_claim_order(self, view: SlotView, head: int) -> None:
        """Checks that a younger claim does not take memory that is being freed for the oldest one."""
        stay = [
            v.charge for v in self.views.values() if v.charge and v.state not in ("draining", "unloading", "parking")
        ]
        before = [charge for charge in stay if charge is not view.charge]
        need = self.core.admission.need(self.core.state.slots[head])
        if sum_needs([*before, need]) <= self.limit:
            require(
                sum_needs([*stay, need]) <= self.limit, f"{view.model_id} takes memory that is being freed for {head}"
            )

    def _can_fit(self, slot_id: int) -> bool:
        """Tells whether a claim fits beside the pinned models; memory of other processes can prevent that for long."""
        slots = self.core.state.slots
        pinned = [v.charge for at, v in self.views.items() if v.charge and v.state == "ready" and slots[at].is_pinned]
        return sum_needs([*pinned, self.core.admission.need(slots[slot_id])]) <= self.limit

    def _check(self) -> None:
        state = self.core.state
        for slot in state.slots.values() if self.blocked else ():
            require(
                not slot.waiters or slot.state == "warming", f"a request waits for {slot.model_id} while loads hang"
            )
            require(not slot.evictors, f"an operator waits for {slot.model_id}, which cannot be freed")
        for slot_id, view in self.views.items():
            slot = state.slots[slot_id]
            require(view.state == slot.state, f"{view.model_id}: events say {view.state}, the slot {slot.state}")
            require(
                view.leases == len(slot.leases), f"{view.model_id} counts {len(slot.leases)} of {view.leases} leases"
            )
            require(not view.leases or view.state in ("ready", "draining"), f"{view.model_id}: leased and {view.state}")
        charged = sum_needs([slot.reserved for slot in state.charged()])
        require(charged == self.used(), f"the pool charges {charged} bytes, the events {self.used()}")
        if self.used() <= self.budget:
            self.peak_allowance = 0
        require(self.used() <= max(self.budget, self.peak_allowance), f"{self.used()} of {self.budget} bytes")
        self._check_host_tier()
        for slot in state.claims():
            stuck = self.movable.intersection(slot.waiters)
            require(not stuck or self._can_fit(slot.slot_id), f"{stuck} wait where others hold the memory")
        for slot_id, claimant in self._evictions:
            self._check_eviction(slot_id, claimant)
        self._evictions = []

    def _check_host_tier(self) -> None:
        held = self.core.state.host_used_bytes()
        require(
            held == self.host_used(), f"the pool charges {held} bytes of main memory, the events {self.host_used()}"
        )
        if self.host_used() <= self.host_budget:
            self.host_allowance = 0
        allowed = max(self.host_budget, self.host_allowance)
        require(self.host_used() <= allowed, f"{self.host_used()} of {self.host_budget} bytes of main memory")
        for view in self.views.values():
            is_split = view.state == "parked" and (view.charge is not None or not view.host_charge)
            require(not is_split, f"{view.model_id} is parked, but holds {view.charge} on the device")

    def _check_eviction(self, slot_id: int, claimant: str) -> None:
        stay = [
            v.charge for v in self.views.values() if v.charge and v.state not in ("draining", "unloading", "parking")
        ]
        need = self.core.admission.need(self.core.state.current[claimant])
        require(
            sum_needs([*stay, need]) <= self.limit, f"{slot_id} was evicted for {claimant}, which still does not fit"
        )
        is_known = self.now_s < self.read_at_s + RULES.reading_s
        require(is_known, f"{slot_id} was evicted for {claimant} without a valid reading of the device")

    # ---- helpers ----

    def _fire_timer(self) -> None:
        assert self.timer_s is not None
        self.now_s, self.timer_s = self.timer_s, None
        self.step(TimerFired())

    def _sync_views(self) -> None:
        for slot_id, slot in self.core.state.slots.items():
            if slot_id not in self.views:
                self.views[slot_id] = SlotView(slot.model_id)
            if slot.state == "parked":
                self.since.pop(slot_id, None)
                if slot.claim is not None:
                    self.since[slot_id] = slot.claim

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


LOCATE = ("ok",) * 6 + ("absent",) * 4 + ("unknown", "low", "high", "access_denied", "hub_unreachable")
FETCH = ("ok",) * 6 + ("low", "high", "broken_files", "hub_unreachable")
LOAD = ("ok",) * 8 + ("out_of_memory", "broken_files", "bad_model")
WARM = ("ok",) * 8 + ("out_of_memory", "self_check_failed")
PARK = ("ok",) * 8 + ("high", "out_of_memory")
WAKE = ("ok",) * 8 + ("out_of_memory", "self_check_failed")
HOST_BUDGETS = (0, 300, 1000, 3000)
FATES: dict[type, tuple[str, ...]] = {
    StartLocate: LOCATE, StartFetch: FETCH, Discard: ("ok", "kept"), StartLoad: LOAD, StartWarm: WARM,
    StartPark: PARK, StartWake: WAKE,
}  # fmt: skip
CEILINGS = (None, None, None, BUDGET, 600, 250)
_WITH_SMALLER_DTYPES = "be"
KEEP_ALIVES = (-1.0, -1.0, -1.0, 0.0, 3.0, 30.0)


def random_specs(random: Random) -> dict[str, ModelSpec]:
    """Draws up to six models; some pinned, some with a short keep_alive."""
    return {
        model_id: ModelSpec(
            model_id=model_id,
            source=f"org/{model_id}",
            revision=random.choice(("v1", "v2")),
            keep_alive_s=random.choice(KEEP_ALIVES),
            host_keep_alive_s=(-1.0, 20.0, -1.0)[len(model_id * ord(model_id)) % 3],
            pinned=random.random() < 0.1,
            preload=random.random() < 0.2,
            smaller_dtypes=("int8",) if model_id in _WITH_SMALLER_DTYPES else (),
        )
        for model_id in "abcdef"[: random.randint(2, 6)]
    }


def random_truth(random: Random) -> dict[str, MemoryNeed]:
    """Draws true sizes: from a tenth of the budget to slightly more than all of it."""
    return {
        model_id: MemoryNeed(
            weight_bytes=random.choice((100, 250, 300, 450, 600, 900, 990)),
            workspace_bytes=random.choice((10, 10, 50, 90, 120)),
        )
        for model_id in "abcdef"
    }


def random_storm(seed: int, make: Callable[..., PoolStateMachine] = PoolStateMachine, num_steps: int = 60) -> Storm:
    """Runs random actions, then `settle`. Half of the hosts shut down in the middle or at the end, and every other one
    evicts by cost: whichever order victims have, no invariant depends on it. Three in four have a host budget."""
    random = Random(seed)
    specs = random_specs(random)
    rules, host_budget = PoolPolicy(eviction="cost") if seed % 2 else RULES, HOST_BUDGETS[seed // 2 % 4]
    storm = Storm(specs, random_truth(random), make, rules, host_budget)
    shuts_down_at = random.choice((None, None, num_steps, random.randrange(num_steps)))
    for at in range(num_steps):
        if at == shuts_down_at:
            storm.drain()
        random_step(storm, random)
    if shuts_down_at == num_steps:
        storm.drain()
    for evictor in [evictor for evictor in storm.evictors if random.random() < 0.5]:
        storm.cancel(evictor)
    storm.settle()
    return storm


def random_step(storm: Storm, random: Random) -> None:
    """Draws one action of requests, asynchronous work or time; rarely `operator_step`."""
    models = [*storm.specs, "nobody"] if random.random() < 0.05 else list(storm.specs)
    roll = random.random()
    if roll < 0.02 or (storm.blocked and roll < 0.1):
        storm.block("" if storm.blocked else "the load of model 'x' has been running for more than 600 s")
    elif storm.work and roll < 0.4:
        index = random.randrange(len(storm.work))
        if not storm.can_end(storm.work[index]):
            return
        fates = FATES.get(type(storm.work[index]), ("ok",))
        storm.finish(index, random.choice(fates), random.choice(CEILINGS))
    elif storm.leases and roll < 0.5:
        storm.release(random.choice(list(storm.leases)))
    elif roll < 0.72:
        timeout_s = random.choice((NEVER, NEVER, NEVER, 0.5, 20.0))
        keep_alive_s = random.choice((None, None, None, 0.0, 2.0, -1.0))
        storm.acquire(random.choice(models), keep_alive_s, timeout_s, may_move=random.random() < 0.3)
    elif roll < 0.88:
        storm.advance(random.choice((0.01, 0.3, 2.0, 6.0, 40.0)))
    elif roll < 0.94:
        few = storm.evictors if random.random() < 0.5 else []  # operators are rare, and cancel as requests do
        storm.cancel(random.choice(few or [*storm.waiting, *storm.leases, *storm.evictors, 0]))
    else:
        operator_step(storm, random, random.choice(models))


def operator_step(storm: Storm, random: Random, model_id: str) -> None:
    """Draws one action of an operator, or a late report."""
    roll = random.random()
    going = [storm.core.state.holders[evictor].model_id for evictor in storm.evictors]
    if roll < 0.3:
        if going and random.random() < 0.7:  # operators issue conflicting commands
            model_id = random.choice(going)
        storm.preload(model_id, pin=random.random() < 0.3, is_tentative=random.random() < 0.3)
    elif roll < 0.7:
        to: Tier = "host" if storm.host_budget and random.random() < 0.4 else "disk"
        storm.evict(model_id, force=random.random() < 0.5, to=to)
    elif roll < 0.8:
        if storm.host_budget and random.random() < 0.3:
            storm.set_host_budget(random.choice(HOST_BUDGETS))
        else:
            storm.reload(random_specs(random))
    else:
        storm.stray(random.choice(list(storm.views)))


def a_folder() -> ModelFiles:
    return ModelFiles(path="/models/m", revision="r", size_bytes=100)


def storms_until_found(
    run_storm: Callable[[int], object], max_storms: int, other_errors: tuple[type[Exception], ...]
) -> int:
    """Counts the storms until an invariant breaks; one more than `max_storms` where none does.

    Other exceptions do not count as detection.
    """
    for seed in range(max_storms):
        try:
            run_storm(seed)
        except Violation:
            return seed + 1
        except other_errors:
            continue
    return max_storms + 1
