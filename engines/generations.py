"""A changed registry, slot by slot: what stays, what changes in place, what becomes a new generation, what goes.

An engine is built from its spec, so whatever it reads there needs a new engine; the pool's own wishes do not. A new
pinned or preloaded model is loaded when the backend asks for it: of several hosts only one should.
"""

from collections.abc import Mapping

from engines.errors import ModelNotFound
from engines.pool_state import PoolState
from engines.pool_words import EVICTED
from engines.slots import Slot
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
