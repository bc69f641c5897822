"""Which models are in this device's memory: a pure, synchronous, single-writer state machine.

    absent ─► fetching ─► cold ─► waiting_space ─► loading ─► warming ─► ready ─► draining ─► unloading ─► cold
                 │                     │              │          │                   │            │
                 │                     └─► cold       │          └─► unloading       └─► ready    │
                 │                     kept out by    │              no good, or         the      │
                 │                     pinned models  │              replaced            operator │
                 │                                    │                                  gave up  │
                 ├─► absent  never fits, unwanted     ├─► cold       out of memory, once          │
                 │                                    ├─► fetching   broken or other files, once ◄┤
                 │                                    ├─► unloading  nobody wants it now          │
                 └─► failed ◄─────────────────────────┴───────────────────────────────────────────┘
                        └─► absent, cold  when the quarantine ends; on disk already: absent ─► cold
    any state without memory or work ─► retired  gone from the registry, or replaced by a new generation

`handle(event, now_s)` is the only door. It knows no loop, no thread, no clock and no engine; `engines/pool/pool.py`
carries the effects out. Deciding who gets memory is `engines/pool/admission.py`, changing a slot
`engines/pool/state.py`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from engines.errors import EngineError, ModelNotFound, ModelPinned
from engines.pool.admission import Admission, end_quarantine
from engines.pool.completions import CompletionHandlers
from engines.pool.messages import (
    Blocked,
    BudgetChanged,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    LeaseCancelled,
    LeaseReleased,
    LeaseRequested,
    PoolEvent,
    PreloadRequested,
    RegistryReloaded,
    TimerFired,
)
from engines.pool.reasons import (
    EVICTED,
    SHUTDOWN,
    cannot_be_freed,
    load_error,
    load_hangs,
    not_found,
    preloaded_meanwhile,
    shutting_down,
    too_large,
)
from engines.pool.slot import CHARGED, PoolPolicy, Slot, Waiter
from engines.pool.state import PoolState
from engines.spec import ModelSpec, is_same_engine

REMOVED = "removed from the registry"


CHANGED = "changed in the registry"


def reload(state: PoolState, specs: Mapping[str, ModelSpec]) -> None:
    """Four cases for each model: 1. removed 2. new 3. changed in place 4. a new generation."""
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
    _leave(state, slot, REMOVED)


def _replace(state: PoolState, old: Slot, spec: ModelSpec) -> None:
    """Waiters move on with their place in the queue; the new generation loads unasked where the old one was in use,
    unless an operator wants that away."""
    if old.leaving_cause == EVICTED:
        state.forget_wishes(old)
    new = state.add_slot(spec)
    new.operator_pin, new.is_wanted = old.operator_pin, old.is_wanted
    new.loads, new.evictions, new.claim = old.loads, old.evictions, old.claim
    if old.state == "ready" or (old.state == "failed" and old.is_wanted):
        state.make_claim(new)
    for waiter in old.waiters.values():
        new.waiters[waiter.waiter_id] = waiter
        state.holders[waiter.waiter_id] = new
    old.waiters = {}
    _leave(state, old, CHANGED)


def _leave(state: PoolState, slot: Slot, cause: str) -> None:
    """Two cases: 1. outside work or leases end first, and their end retires the slot; 2. it retires at once."""
    slot.is_retired, slot.claim, slot.is_wanted, slot.leaving_cause = True, None, False, cause
    if slot.state == "ready":
        state.drain(slot, cause)  # (1)
    elif slot.work is None and slot.state != "draining":
        state.retire(slot)  # (2)


class PoolStateMachine:
    """All slots of one device. Called from one thread only; never blocks."""

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        *,
        budget_bytes: int,
        rules: PoolPolicy | None = None,
        jitter: Callable[[], float] = lambda: 0.5,
    ) -> None:
        """`jitter`: a number in [0, 1) for each failure, so that a fleet does not try again in step."""
        self.state = PoolState(specs, budget_bytes, rules or PoolPolicy())
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
            Blocked: self._blocked,
            **CompletionHandlers(self.state, jitter).handlers,
        }

    def handle(self, event: PoolEvent, now_s: float) -> list[Effect]:
        """One step: the event, then everything that it made possible. `now_s` never goes back.

        A handler that returns True has changed nothing that others could wait for.
        """
        self.state.now_s, self.state.effects = now_s, []
        if not self._handlers[type(event)](event):
            self.admission.assign()
        return self.state.effects

    def __repr__(self) -> str:
        slots = self.state.slots.values()
        states = ", ".join(f"{count} {state}" for state, count in sorted(Counter(s.state for s in slots).items()))
        leases, waiters = sum(len(s.leases) for s in slots), sum(len(s.waiters) for s in slots)
        return f"<Pool [Models: {states or 'none'} | Leases: {leases} | Waiters: {waiters}]>"

    # ---- what callers ask ----

    def _acquire(self, event: LeaseRequested) -> bool:
        """Five cases:

        1. the host drains;             2. no such model;
        3. ready: granted in this step, whatever else goes on;
        4. it cannot be had: the cause;
        5. it waits, and the model has a claim from now on.
        """
        slot = self.state.current.get(event.model_id)
        waiter = Waiter(event.waiter_id, event.keep_alive_s, event.deadline_s, event.may_move)
        if self.state.is_draining:
            self.state.effects.append(Fail(event.waiter_id, shutting_down()))  # (1)
            return True
        if slot is None:
            self.state.effects.append(Fail(event.waiter_id, not_found(event.model_id)))  # (2)
            return True
        if slot.state == "ready":
            self.state.grant(slot, waiter)  # (3)
            return True
        error = self._why_not(slot)
        if error is not None:
            self.state.effects.append(Fail(event.waiter_id, error))  # (4)
            return True
        if slot.state == "failed":
            end_quarantine(self.state, slot, "asked for again")
        self.state.add_waiter(slot, waiter)  # (5)
        self.state.make_claim(slot)
        return False

    def _why_not(self, slot: Slot) -> EngineError | None:
        """Why a model that is not ready cannot be waited for. Four cases:

        1. quarantined;  2. nothing can be loaded, and its load is not over;  3. known never to fit;  4. it can.
        """
        if slot.state == "failed" and self.state.now_s < slot.retry_at_s and slot.failure:
            return load_error(slot, slot.failure, self.state.now_s)  # (1)
        if self.state.blocked and slot.state != "warming":
            return load_hangs(slot, self.state.blocked)  # (2)
        if self.state.is_too_large(slot.need):
            return too_large(slot, self.state.budget_bytes)  # (3)
        return None  # (4)

    def _cancel(self, event: LeaseCancelled) -> bool:
        """Four cases: 1. answered with an error 2. a waiter 3. a lease, perhaps of this very tick 4. an evictor."""
        slot = self.state.holders.get(event.waiter_id)
        if slot is None:
            return True  # (1)
        if event.waiter_id in slot.waiters:  # (2): the claim stays, for a load belongs to the model
            del slot.waiters[event.waiter_id], self.state.holders[event.waiter_id]
            return False
        if event.waiter_id in slot.leases:
            return self._give_back(slot, event.waiter_id)  # (3)
        slot.evictors.discard(event.waiter_id)  # (4)
        del self.state.holders[event.waiter_id]
        self._undo_evict(slot)
        return False

    def _release(self, event: LeaseReleased) -> bool:
        slot = self.state.holders.get(event.waiter_id)
        if slot is None or event.waiter_id not in slot.leases:
            raise RuntimeError(f"bug: lease {event.waiter_id} is given back, but nobody holds it")
        return self._give_back(slot, event.waiter_id)

    def _give_back(self, slot: Slot, waiter_id: int) -> bool:
        """Only a model's last lease can matter to anybody else."""
        self.state.give_back(slot, waiter_id)
        self.state.unload_if_free(slot)
        return bool(slot.leases) or not self.admission.may_unblock_others(slot)

    def _preload(self, event: PreloadRequested) -> None:
        """Five cases:

        1. no such model, shutting down or never to fit: nothing (a waiter beside it gets the error);
        2. ready;  3. an operator's eviction has not gone through yet: the later word counts;
        4. quarantined: an operator's word ends that;  5. on its way or leaving: its claim stands.
        """
        slot = self.state.current.get(event.model_id)
        if slot is None or self.state.is_draining or self.state.is_too_large(slot.need):
            return  # (1)
        slot.operator_pin = slot.operator_pin or (event.is_pin and not event.is_tentative)
        if slot.leaving_cause == EVICTED and slot.state != "unloading":
            self.state.fail_evictors(slot, lambda: preloaded_meanwhile(slot))
            self._stay(slot, "preloaded: the eviction was given up")  # (3)
        if slot.state == "ready":
            return  # (2)
        if slot.state == "failed":
            end_quarantine(self.state, slot, "preload")  # (4)
        slot.is_wanted = slot.is_wanted or not event.is_tentative
        self.state.make_claim(slot)  # (5)

    def _evict(self, event: EvictionRequested) -> None:
        """Seven cases:

        1. no such model;  2. pinned, and not forced;  3. nothing can be freed;
        4. not in memory and not getting there: done, and a claim that nobody waits for is dropped;
        5. ready: drains;  6. on its way: drains once its waiters are granted;
        7. leaving already: told then, and it does not come back for anybody but waiters.
        """
        slot = self.state.current.get(event.model_id)
        if slot is None:
            self.state.effects.append(Fail(event.waiter_id, not_found(event.model_id)))  # (1)
            return
        is_evicted = slot.leaving_cause == EVICTED and slot.state != "unloading"  # else a preload may have come since
        if slot.is_pinned and not event.is_forced and not is_evicted:
            message = f"model {event.model_id!r} is pinned; evict it with force"
            self.state.effects.append(Fail(event.waiter_id, ModelPinned(message)))  # (2)
            return
        if self.state.blocked and slot.state in CHARGED:
            error = cannot_be_freed(slot, self.state.blocked)
            self.state.effects.append(Fail(event.waiter_id, error))  # (3)
            return
        slot.evictors.add(event.waiter_id)
        self.state.holders[event.waiter_id] = slot
        if slot.state in ("absent", "fetching", "cold", "waiting_space", "failed"):
            self.state.forget_wishes(slot)
            self.state.notify_evictors(slot)  # (4)
        elif slot.state == "ready":
            self.state.drain(slot, EVICTED)  # (5)
        elif slot.state in ("loading", "warming"):
            slot.leaving_cause = EVICTED  # (6)
        elif not is_evicted:
            self.state.forget_wishes(slot)  # (7)

    def _undo_evict(self, slot: Slot) -> None:
        """The last operator gave up: what still drains for them alone serves again, unless the host shuts down."""
        if slot.evictors or slot.leaving_cause != EVICTED:
            return
        if self.state.is_draining:
            slot.leaving_cause = SHUTDOWN
            return
        if slot.state != "unloading":
            self._stay(slot, "still in use: the eviction was given up")

    def _stay(self, slot: Slot, cause: str) -> None:
        """An eviction under way is off."""
        slot.leaving_cause = slot.leaving_for = None
        if slot.state == "draining":
            self.state.move(slot, "ready", cause)
            self.state.grant_all(slot)
            slot.claim, slot.is_wanted = None, False

    def _blocked(self, event: Blocked) -> None:
        """Nothing can be loaded or freed from now on, or it can again. Two cases for each model:

        1. its own work hangs, perhaps: that is an event;  2. it was to be freed, and cannot be: it serves on.
        """
        self.state.blocked = event.reason
        for slot in list(self.state.slots.values()) if event.reason else ():
            if slot.work in ("load", "unload"):
                self.state.effects.append(
                    Emit(slot.slot_id, slot.model_id, "state", slot.state, slot.state, event.reason)
                )  # (1)
            self.state.fail_evictors(slot, partial(cannot_be_freed, slot, event.reason))
            if not slot.is_retired and not self.state.is_draining:
                self._stay(slot, f"cannot be freed: {event.reason}")  # (2)

    def _reload(self, event: RegistryReloaded) -> None:
        if not self.state.is_draining:
            reload(self.state, event.specs)

    def _drain(self, event: DrainRequested) -> None:
        """What is ready or nearly so serves those it was loaded for; everybody else is sent away."""
        self.state.is_draining = True
        for slot in list(self.state.slots.values()):
            slot.leaving_cause = slot.leaving_cause or SHUTDOWN
            self.state.drop_claim(slot, SHUTDOWN)
            if slot.state not in ("loading", "warming"):
                self.state.fail_waiters(slot, shutting_down)
            if slot.state == "ready":
                self.state.drain(slot, SHUTDOWN)

    def _tick(self, event: TimerFired) -> None:
        self.admission.on_tick()

    def _budget_changed(self, event: BudgetChanged) -> None:
        self.state.budget_bytes, self.state.ceiling_bytes = event.budget_bytes, event.ceiling_bytes
        self.state.ceiling_until_s = self.state.now_s + self.state.rules.reading_s
        self.admission.on_reading()
