"""Decides which models are in one device's memory: a pure, synchronous, single-writer state machine.

    absent ─► fetching ─► cold ─► waiting_space ─► loading ─► warming ─► ready ─► draining ─► unloading ─► cold
                 │                     │              │          │                   │            │
                 │                     └─► cold       │          └─► unloading       └─► ready    │
                 │                     blocked by     │              failed, or          eviction │
                 │                     pinned models  │              replaced            given up │
                 │                                    │                                           │
                 ├─► absent  too large, unwanted      ├─► cold       out of memory, once          │
                 │                                    ├─► fetching   broken or new files, once   ◄┤
                 │                                    ├─► unloading  replaced, or shutting down   │
                 └─► failed ◄─────────────────────────┴───────────────────────────────────────────┘
                        └─► absent, cold  when the quarantine ends; on disk already: absent ─► cold
    draining ─► parking ─► parked ─► waking ─► ready  with a host budget (`engines/pool/parking.py`)
    any state without memory or work ─► retired  removed from the registry, or replaced by a new generation

`handle(event, now_s)` is the only entry. The machine uses no event loop, thread, clock or engine;
`engines/pool/pool.py` executes the effects that it returns. `engines/pool/admission.py` decides which model gets
memory; `engines/pool/state.py` changes slots.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from engines.errors import EngineError, ModelNotFound, ModelPinned
from engines.pool.admission import Admission, end_quarantine
from engines.pool.completions import CompletionHandlers
from engines.pool.messages import (
    BudgetChanged,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    LeaseCancelled,
    LeaseReleased,
    LeaseRequested,
    LoadsBlocked,
    PoolEvent,
    PreloadRequested,
    RegistryReloaded,
    TimerFired,
)
from engines.pool.neighbour_messages import NeighbourChanged, NeighbourEvicts, ReadingWanted
from engines.pool.neighbours import Neighbours
from engines.pool.reasons import (
    EVICTED,
    SHUTDOWN,
    cancelled_by_preload,
    cannot_be_freed,
    load_error,
    load_hangs,
    not_found,
    shutting_down,
)
from engines.pool.slot import CHARGED, PoolPolicy, Slot, Waiter
from engines.pool.split_admission import leave
from engines.pool.state import PoolState
from engines.spec import ModelSpec, is_same_engine
from engines.types import Tier

REMOVED = "removed from the registry"
CHANGED = "changed in the registry"


def reload(state: PoolState, specs: Mapping[str, ModelSpec]) -> None:
    """Applies a new registry. Four cases for each model: 1. removed 2. new 3. changed in place 4. a new generation."""
    for model_id in [model_id for model_id in state.current if model_id not in specs]:
        _remove(state, state.current.pop(model_id))  # (1)
    for spec in specs.values():
        slot = state.current.get(spec.model_id)
        if slot is None:
            state.add_slot(spec)  # (2)
        elif is_same_engine(slot.spec, spec):
            slot.spec = spec  # (3)
        else:
            _replace(state, slot, spec)  # (4)


def _remove(state: PoolState, slot: Slot) -> None:
    state.fail_waiters(slot, lambda: ModelNotFound(f"model {slot.model_id!r} was removed from the registry"))
    _retire_generation(state, slot, REMOVED)


def _replace(state: PoolState, old: Slot, spec: ModelSpec) -> None:
    """Replaces a slot by a new generation, which takes over its waiters and its position in the queue for memory.

    The new generation loads without a request if the old one was in use and is not being evicted by an operator.
    """
    if old.leaving_cause == EVICTED:
        state.clear_preload(old)
    new = state.add_slot(spec)
    new.operator_pin, new.is_wanted = old.operator_pin, old.is_wanted
    new.loads, new.evictions, new.claim = old.loads, old.evictions, old.claim
    new.heat, new.heat_at_s = old.heat, old.heat_at_s
    if old.state == "ready" or (old.state == "failed" and old.is_wanted):
        state.make_claim(new)
    for waiter in old.waiters.values():
        new.waiters[waiter.waiter_id] = waiter
        state.holders[waiter.waiter_id] = new
    old.waiters = {}
    _retire_generation(state, old, CHANGED)


def _retire_generation(state: PoolState, slot: Slot, cause: str) -> None:
    """Retires a generation. Two cases: 1. after its leases or its asynchronous work have ended (a parked one: its
    unload); 2. at once."""
    slot.is_retired, slot.claim, slot.is_wanted, slot.leaving_cause = True, None, False, cause
    if slot.state == "ready":
        state.drain(slot, cause)  # (1)
    elif slot.state == "parked":
        state.unload(slot, cause)  # (1)
    elif slot.work is None and slot.state != "draining":
        state.retire(slot)  # (2)


class PoolStateMachine:
    """Decides for all slots of one device. Called from one thread only; never blocks."""

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        *,
        budget_bytes: int,
        rules: PoolPolicy | None = None,
        jitter: Callable[[], float] = lambda: 0.5,
        host_budget_bytes: int = 0,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`jitter` returns a number in [0, 1) for each failure, so that hosts do not retry at the same moment."""
        self.state = PoolState(specs, budget_bytes, rules or PoolPolicy(), host_budget_bytes, neighbours)
        self.admission = Admission(self.state)
        self._handlers: dict[type, Callable[..., bool | None]] = {
            LeaseRequested: self._acquire,
            LeaseCancelled: self._cancel,
            LeaseReleased: self._release,
            PreloadRequested: self._preload,
            EvictionRequested: self._evict,
            RegistryReloaded: self._reload,
            DrainRequested: self._drain,
            TimerFired: self._tick,
            BudgetChanged: self._budget_changed,
            LoadsBlocked: self._blocked,
            NeighbourChanged: self._neighbour_changed,
            NeighbourEvicts: partial(leave, self.state),
            ReadingWanted: self._reading_wanted,
            **CompletionHandlers(self.state, jitter).handlers,
            **self.admission.parking.handlers,
        }

    def handle(self, event: PoolEvent, now_s: float) -> list[Effect]:
        """Applies one event, then admits and evicts as it allows; returns the effects to execute. `now_s` never
        decreases.

        A handler returns True if no other model can be affected; admission is skipped then (the warm path).
        """
        self.state.now_s, self.state.effects = now_s, []
        if self.state.neighbours.is_used:
            self.state.neighbours.set_time(now_s)
        if not self._handlers[type(event)](event):
            self.admission.assign()
            is_notice = isinstance(event, NeighbourChanged | NeighbourEvicts | ReadingWanted)
            has_changed = not is_notice or any(isinstance(effect, Emit) for effect in self.state.effects)
            self.state.effects += self.state.neighbours.notices(self.state, has_changed=has_changed)
        return self.state.effects

    def __repr__(self) -> str:
        slots = self.state.slots.values()
        states = ", ".join(f"{count} {state}" for state, count in sorted(Counter(s.state for s in slots).items()))
        leases, waiters = sum(len(s.leases) for s in slots), sum(len(s.waiters) for s in slots)
        return f"<Pool [Models: {states or 'none'} | Leases: {leases} | Waiters: {waiters}]>"

    # ---- requests and operators ----

    def _acquire(self, event: LeaseRequested) -> bool:
        """Grants, refuses or queues a request for a lease. Five cases:

        1. the host is shutting down: fails;             2. no such model: fails;
        3. the model is ready: granted in this step, whatever else is in progress;
        4. it cannot be loaded: fails with the cause;
        5. the request waits, and the model has a claim from now on.
        """
        slot = self.state.current.get(event.model_id)
        waiter = Waiter(event.waiter_id, event.keep_alive_s, event.deadline_s, event.may_move)
        if self.state.is_draining:
            self.state.effects.append(Fail(event.waiter_id, shutting_down()))  # (1)
            return True
        if slot is None:
            self.state.effects.append(Fail(event.waiter_id, not_found(event.model_id)))  # (2)
            return True
        slot.heat_up(self.state.now_s, self.state.rules.heat_decay_s)
        if slot.state == "ready":
            self.state.grant(slot, waiter)  # (3)
            return True
        error = self._refusal(slot)
        if error is not None:
            self.state.effects.append(Fail(event.waiter_id, error))  # (4)
            return True
        if slot.state == "failed":
            end_quarantine(self.state, slot, "asked for again")
        self.state.add_waiter(slot, waiter)  # (5)
        slot.is_flex_claim = event.is_flex and (slot.claim is None or slot.is_flex_claim)
        self.state.make_claim(slot)
        return False

    def _refusal(self, slot: Slot) -> EngineError | None:
        """Returns the error for a request whose model is not ready and cannot be loaded. Four cases:

        1. quarantined;  2. a load hangs, and its own load is not complete;  3. certainly too large;  4. no error.
        """
        if slot.state == "failed" and self.state.now_s < slot.retry_at_s and slot.failure:
            return load_error(slot, slot.failure, self.state.now_s)  # (1)
        if self.state.blocked and slot.state != "warming":
            return load_hangs(slot, self.state.blocked)  # (2)
        if self.state.is_too_large(slot.need):
            return self.state.too_large(slot)  # (3)
        return None  # (4)

    def _cancel(self, event: LeaseCancelled) -> bool:
        """Cancels a request or an eviction. Four cases:

        1. already failed;  2. a waiter;  3. a lease, perhaps granted in this tick;  4. an eviction.
        """
        slot = self.state.holders.get(event.waiter_id)
        if slot is None:
            return True  # (1)
        if event.waiter_id in slot.waiters:  # (2): the claim stays: a load belongs to the model, not to a request
            del slot.waiters[event.waiter_id], self.state.holders[event.waiter_id]
            return False
        if event.waiter_id in slot.leases:
            return self._end_lease(slot, event.waiter_id)  # (3)
        slot.evictors.discard(event.waiter_id)  # (4)
        del self.state.holders[event.waiter_id]
        self._abandon_eviction(slot)
        return False

    def _release(self, event: LeaseReleased) -> bool:
        slot = self.state.holders.get(event.waiter_id)
        if slot is None or event.waiter_id not in slot.leases:
            raise RuntimeError(f"bug: lease {event.waiter_id} was released but is not held")
        return self._end_lease(slot, event.waiter_id)

    def _end_lease(self, slot: Slot, waiter_id: int) -> bool:
        """Ends a lease; returns True if that cannot affect another model: only the end of the last lease can."""
        self.state.end_lease(slot, waiter_id)
        self.state.unload_if_free(slot)
        return bool(slot.leases) or not self.admission.may_unblock_others(slot)

    def _preload(self, event: PreloadRequested) -> None:
        """Makes a claim without a request. Five cases:

        1. no such model, shutting down or too large: ignored (a waiting preload has a lease request that fails);
        2. ready: only pinned;  3. an eviction has not finished: it is cancelled, as the later command counts;
        4. quarantined: the quarantine ends;  5. any other state: the model has a claim from now on.
        """
        slot = self.state.current.get(event.model_id)
        if slot is None or self.state.is_draining or self.state.is_too_large(slot.need):
            return  # (1)
        slot.operator_pin = slot.operator_pin or (event.is_pin and not event.is_tentative)
        if slot.leaving_cause == EVICTED and slot.state != "unloading":
            self.state.fail_evictors(slot, lambda: cancelled_by_preload(slot))
            self._cancel_eviction(slot, "eviction cancelled by a preload")  # (3)
        if slot.state == "ready":
            return  # (2)
        if slot.state == "failed":
            end_quarantine(self.state, slot, "preload")  # (4)
        slot.is_wanted = slot.is_wanted or not event.is_tentative
        self.state.make_claim(slot)  # (5)

    def _evict(self, event: EvictionRequested) -> None:
        """Evicts a model for an operator. Nine cases:

        1. no such model: fails;  2. pinned, and not forced: fails;  3. a load hangs, so nothing can be freed: fails;
        4. not in memory and not loading: done; its claim is dropped unless requests wait for it;
        5. ready: drains;  6. loading, warming or waking: drains once its waiters have had their leases;
        7. draining, parking or unloading already: done when it is there; it is loaded again only for waiting requests;
        8. parked, and that is where it shall be: done, as 4;  9. parked: unloaded, and loaded again only as 7.
        """
        slot = self.state.current.get(event.model_id)
        if slot is None:
            self.state.effects.append(Fail(event.waiter_id, not_found(event.model_id)))  # (1)
            return
        # while it is unloading, a preload may have followed the eviction
        is_evicted = slot.leaving_cause == EVICTED and slot.state != "unloading"
        if slot.is_pinned and not event.is_forced and not is_evicted:
            message = f"model {event.model_id!r} is pinned; set force to evict it"
            self.state.effects.append(Fail(event.waiter_id, ModelPinned(message)))  # (2)
            return
        if self.state.blocked and (slot.state in CHARGED or (slot.state == "parked" and event.to == "disk")):
            error = cannot_be_freed(slot, self.state.blocked)
            self.state.effects.append(Fail(event.waiter_id, error))  # (3)
            return
        slot.evictors.add(event.waiter_id)
        self.state.holders[event.waiter_id] = slot
        self._leave(slot, event.to, is_evicted=is_evicted)

    def _leave(self, slot: Slot, to: Tier, *, is_evicted: bool) -> None:
        """Makes a model leave for an operator: cases 4 to 9 of `_evict`."""
        resting = ("absent", "fetching", "cold", "waiting_space", "failed", *(("parked",) if to == "host" else ()))
        if slot.state in resting:
            self.state.clear_preload(slot)
            self.state.notify_evictors(slot)  # (4), (8)
            return
        slot.leaves_to = to
        if slot.state == "ready":
            self.state.drain(slot, EVICTED)  # (5)
        elif slot.state in ("loading", "warming", "waking"):
            slot.leaving_cause = EVICTED  # (6)
        elif not is_evicted:
            self.state.clear_preload(slot)  # (7)
        if slot.state == "parked":
            self.state.unload(slot, EVICTED)  # (9)

    def _abandon_eviction(self, slot: Slot) -> None:
        """Undoes an eviction after its last operator cancelled it, unless the host is shutting down."""
        if slot.evictors or slot.leaving_cause != EVICTED:
            return
        if self.state.is_draining:
            slot.leaving_cause = SHUTDOWN
            return
        if slot.state != "unloading":
            self._cancel_eviction(slot, "still in use: the eviction was cancelled")

    def _cancel_eviction(self, slot: Slot, cause: str) -> None:
        """Cancels an eviction in progress: a draining model becomes ready again."""
        slot.leaving_cause = slot.leaving_for = slot.leaves_to = None
        if slot.state == "draining":
            self.state.move(slot, "ready", cause)
            self.state.grant_all(slot)
            slot.claim, slot.is_wanted = None, False

    def _blocked(self, event: LoadsBlocked) -> None:
        """Sets or clears the hanging load that blocks all loads and unloads. Two cases for each model:

        1. it is loading or unloading: an event reports the hang;  2. its eviction is cancelled: it stays ready.
        """
        self.state.blocked = event.reason
        for slot in list(self.state.slots.values()) if event.reason else ():
            if slot.work in ("load", "unload", "park", "wake"):
                self.state.effects.append(
                    Emit(slot.slot_id, slot.model_id, "state", slot.state, slot.state, event.reason)
                )  # (1)
            self.state.fail_evictors(slot, partial(cannot_be_freed, slot, event.reason))
            if not slot.is_retired and not self.state.is_draining:
                self._cancel_eviction(slot, f"cannot be freed: {event.reason}")  # (2)

    def _reload(self, event: RegistryReloaded) -> None:
        if not self.state.is_draining:
            reload(self.state, event.specs)

    def _drain(self, event: DrainRequested) -> None:
        """Begins the shutdown: ready, loading and warming models serve the requests that they have; all others fail."""
        self.state.is_draining = True
        for slot in list(self.state.slots.values()):
            slot.leaving_cause = slot.leaving_cause or SHUTDOWN
            self.state.drop_claim(slot, SHUTDOWN)
            if slot.state not in ("loading", "warming", "waking"):
                self.state.fail_waiters(slot, shutting_down)
            if slot.state == "ready":
                self.state.drain(slot, SHUTDOWN)
            if slot.state == "parked":
                self.state.unload(slot, SHUTDOWN)

    def _neighbour_changed(self, event: NeighbourChanged) -> None:
        """Does nothing but what `handle` does after every event."""

    def _reading_wanted(self, event: ReadingWanted) -> None:
        self.admission.read()

    def _tick(self, event: TimerFired) -> None:
        self.admission.on_tick()

    def _budget_changed(self, event: BudgetChanged) -> None:
        self.state.budget_bytes, self.state.ceiling_bytes = event.budget_bytes, event.ceiling_bytes
        self.state.ceiling_until_s = self.state.now_s + self.state.rules.reading_s
        self.admission.on_reading()
