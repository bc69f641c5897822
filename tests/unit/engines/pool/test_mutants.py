"""Mutation tests of the storms: each mutant breaks one decision of the pool, and the invariants must detect it."""

from collections.abc import Callable

import pytest

from engines.errors import ModelLoading
from engines.pool import admission, eviction, parking
from engines.pool import state as pool_state
from engines.pool.admission import next_deadlines
from engines.pool.completions import CompletionHandlers
from engines.pool.eviction import VictimOrder, can_be_victim
from engines.pool.messages import (
    BudgetChanged,
    Fail,
    LeaseCancelled,
    LeaseRequested,
    StartLoad,
    StartWake,
    WakeCompleted,
    WakeErrored,
)
from engines.pool.parking import Parking
from engines.pool.slot import CHARGED, HOST_CHARGED, NO_MEMORY, MemoryNeed, PoolPolicy, Slot, Waiter
from engines.pool.state import PoolState
from engines.pool.state_machine import PoolStateMachine
from tests.testkit.pool_storm import random_storm, storms_until_found

Patch = pytest.MonkeyPatch
MAX_STORMS = 1500


def evict_while_leased(patch: Patch) -> None:
    """A draining model is freed while requests run on it."""

    def unload_if_free(self: PoolState, slot: Slot) -> None:
        if slot.state == "draining":
            self.unload(slot, "")

    patch.setattr(PoolState, "unload_if_free", unload_if_free)


def grant_after_eviction_began(patch: Patch) -> None:
    """A draining model still looks ready to a new request."""
    acquire = PoolStateMachine._acquire

    def mutant(self: PoolStateMachine, event: LeaseRequested) -> bool:
        slot = self.state.current.get(event.model_id)
        if slot is not None and slot.state == "draining":
            self.state.grant(slot, Waiter(event.waiter_id, None, event.deadline_s))
            return True
        return acquire(self, event)

    patch.setattr(PoolStateMachine, "_acquire", mutant)


def lost_wake_up_after_a_release(patch: Patch) -> None:
    """The end of the last lease does not run admission for the models that wait."""

    def end_lease(self: PoolStateMachine, slot: Slot, waiter_id: int) -> bool:
        self.state.end_lease(slot, waiter_id)
        return True

    patch.setattr(PoolStateMachine, "_end_lease", end_lease)


def lost_wake_up_by_time(patch: Patch) -> None:
    """The timer ignores the ends of minimum residencies."""

    def mutant(state: PoolState, deficit_since_s: float | None) -> list[float]:
        matures = {slot.evictable_from_s(state.rules) for slot in state.in_state("ready")}
        return [at_s for at_s in next_deadlines(state, deficit_since_s) if at_s not in matures]

    patch.setattr(admission, "next_deadlines", mutant)


def double_load(patch: Patch) -> None:
    """A second request for a loading model starts a second load."""
    acquire = PoolStateMachine._acquire

    def mutant(self: PoolStateMachine, event: LeaseRequested) -> bool:
        slot = self.state.current.get(event.model_id)
        if slot is not None and slot.state == "loading" and slot.files:
            self.state.effects.append(StartLoad(slot.slot_id, slot.spec, slot.files, slot.reserved))
        return acquire(self, event)

    patch.setattr(PoolStateMachine, "_acquire", mutant)


def bytes_credited_early(patch: Patch) -> None:
    """Bytes are credited when an unload starts, not when it ends."""
    patch.setattr(pool_state, "CHARGED", CHARGED - {"unloading"})


def lease_leaked_by_a_cancelled_waiter(patch: Patch) -> None:
    """A waiter cancelled in the tick of its grant leaks the lease."""
    cancel = PoolStateMachine._cancel

    def mutant(self: PoolStateMachine, event: LeaseCancelled) -> bool:
        slot = self.state.holders.get(event.waiter_id)
        return True if slot is not None and event.waiter_id in slot.leases else cancel(self, event)

    patch.setattr(PoolStateMachine, "_cancel", mutant)


def load_cancelled_with_its_first_requester(patch: Patch) -> None:
    """The claim is dropped when the first request is cancelled."""
    cancel = PoolStateMachine._cancel

    def mutant(self: PoolStateMachine, event: LeaseCancelled) -> bool:
        slot = self.state.holders.get(event.waiter_id)
        if slot is not None and next(iter(slot.waiters), None) == event.waiter_id:
            self.state.drop_claim(slot, "its requester left")
        return cancel(self, event)

    patch.setattr(PoolStateMachine, "_cancel", mutant)


def eviction_that_still_does_not_fit(patch: Patch) -> None:
    """All candidates are evicted even if the claim still does not fit."""

    def mutant(
        charged: list[Slot], candidates: list[Slot], need: MemoryNeed, limit_bytes: int, order: VictimOrder
    ) -> tuple[Slot, ...] | None:
        chosen = eviction.choose_victims(charged, candidates, need, limit_bytes, order)
        return tuple(sorted(candidates, key=order)) if chosen is None else chosen

    patch.setattr(admission, "choose_victims", mutant)


def pinned_models_make_room(patch: Patch) -> None:
    """Pinned models are evicted under memory pressure."""

    def mutant(slot: Slot, rules: PoolPolicy, now_s: float, *, even_leased: bool) -> bool:
        return slot.state == "ready" and now_s >= slot.evictable_from_s(rules) and (even_leased or not slot.leases)

    patch.setattr(admission, "can_be_victim", mutant)


def no_minimum_residency(patch: Patch) -> None:
    """A model is evicted as soon as it is idle, so two claims evict each other in a loop."""

    def mutant(slot: Slot, rules: PoolPolicy, now_s: float, *, even_leased: bool) -> bool:
        return can_be_victim(slot, rules, now_s + 1e6, even_leased=even_leased)

    patch.setattr(admission, "can_be_victim", mutant)


def the_youngest_claim_goes_first(patch: Patch) -> None:
    """Young small claims starve an old large one."""

    def mutant(self: PoolState) -> list[Slot]:
        return sorted(self.in_state("waiting_space"), key=lambda slot: -(slot.claim or 0))

    patch.setattr(PoolState, "claims", mutant)


def waiters_are_granted_a_step_late(patch: Patch) -> None:
    """Waiters are not granted in the step that makes their model ready."""

    def mutant(self: PoolState, slot: Slot) -> None:
        waiters, slot.waiters = slot.waiters, {}
        del waiters

    patch.setattr(PoolState, "grant_all", mutant)


def both_outcomes_for_an_impatient_waiter(patch: Patch) -> None:
    """A request fails at its deadline and gets a lease later all the same."""

    def mutant(self: PoolState, slot: Slot, waiter_id: int, error: ModelLoading) -> None:
        self.effects.append(Fail(waiter_id, error))

    patch.setattr(PoolState, "fail", mutant)


def a_deficit_is_forgotten(patch: Patch) -> None:
    """A model is charged its estimate instead of its measured bytes."""
    warmed = CompletionHandlers._warmed

    def mutant(self: CompletionHandlers, event: object) -> None:
        slot = self.state.slots[event.slot_id]  # type: ignore[attr-defined]  # the handler's own event
        estimate = slot.reserved
        warmed(self, event)  # type: ignore[arg-type]  # as above
        if slot.state == "ready":
            slot.reserved = estimate

    patch.setattr(CompletionHandlers, "_warmed", mutant)


def the_reading_of_the_device_is_ignored(patch: Patch) -> None:
    """The pool ignores the memory that other processes use."""
    patch.setattr(PoolState, "limit_bytes", lambda self: self.budget_bytes)


def victims_leave_on_an_old_reading(patch: Patch) -> None:
    """Models are evicted for a claim without a valid reading of the device."""
    changed = PoolStateMachine._budget_changed

    def mutant(self: PoolStateMachine, event: BudgetChanged) -> None:
        changed(self, event)
        self.state.ceiling_until_s += 1e6

    patch.setattr(PoolStateMachine, "_budget_changed", mutant)


def a_shutdown_is_undone_by_an_operator_who_gives_up(patch: Patch) -> None:
    """A cancelled eviction makes a model ready although the host is shutting down."""
    undo = PoolStateMachine._abandon_eviction

    def mutant(self: PoolStateMachine, slot: Slot) -> None:
        was, self.state.is_draining = self.state.is_draining, False
        undo(self, slot)
        self.state.is_draining = was

    patch.setattr(PoolStateMachine, "_abandon_eviction", mutant)


def a_load_that_hangs_is_told_to_nobody(patch: Patch) -> None:
    """Requests wait for loads that a hanging load blocks."""
    patch.setattr(admission.Admission, "_fail_blocked_waiters", lambda self: None)


def models_leave_while_nothing_can_be_freed(patch: Patch) -> None:
    """Models are evicted while a hanging load keeps their memory from being freed."""
    assign = admission.Admission.assign

    def mutant(self: admission.Admission) -> None:
        was, self.state.blocked = self.state.blocked, ""
        assign(self)
        self.state.blocked = was

    patch.setattr(admission.Admission, "assign", mutant)


def nobody_is_sent_to_another_host(patch: Patch) -> None:
    """Requests that another host can serve wait for memory that other processes hold."""
    patch.setattr(admission.Admission, "_redirect_waiters", lambda self, slot, limit_bytes: None)


def an_eviction_outlives_a_later_preload(patch: Patch) -> None:
    """A preload does not cancel an earlier eviction."""
    patch.setattr(PoolStateMachine, "_cancel_eviction", lambda self, slot, cause: None)


def an_evicted_model_comes_back_unasked(patch: Patch) -> None:
    """An eviction does not clear an earlier preload."""
    patch.setattr(PoolState, "clear_preload", lambda self, slot: None)


def the_largest_workspace_is_not_reserved(patch: Patch) -> None:
    """Weights may use the whole budget, without a reserve for the workspace."""

    def mutant(charged: list[Slot], need: MemoryNeed, limit_bytes: int) -> int:
        return max(0, sum(slot.reserved.weight_bytes for slot in charged) + need.weight_bytes - limit_bytes)

    patch.setattr(admission, "missing_bytes", mutant)


def the_smallest_dtype_is_always_taken(patch: Patch) -> None:
    """A load takes the smallest dtype also where the preferred one fits."""

    def mutant(need: MemoryNeed, charged: list[Slot], available_bytes: int, limit_bytes: int) -> tuple[int, MemoryNeed]:
        return len(need.forms) - 1, need.forms[-1].capped(available_bytes)

    patch.setattr(admission, "choose_form", mutant)


def models_are_evicted_for_the_preferred_dtype(patch: Patch) -> None:
    """Models are evicted although a smaller dtype fits."""

    def mutant(need: MemoryNeed, charged: list[Slot], available_bytes: int, limit_bytes: int) -> tuple[int, MemoryNeed]:
        return 0, need.capped(available_bytes)

    patch.setattr(admission, "choose_form", mutant)


def woken_while_parking(patch: Patch) -> None:
    """A model that is being parked is woken at once for a request that waits for it."""
    park = PoolState.park

    def mutant(self: PoolState, slot: Slot) -> None:
        park(self, slot)
        if slot.claim is not None:
            self.effects.append(StartWake(slot.slot_id))

    patch.setattr(PoolState, "park", mutant)


def device_bytes_are_credited_while_they_are_copied(patch: Patch) -> None:
    """A model that is being parked is charged to main memory only, though the device still holds it."""
    park = PoolState.park

    def mutant(self: PoolState, slot: Slot) -> None:
        park(self, slot)
        slot.reserved = NO_MEMORY

    patch.setattr(PoolState, "park", mutant)


def host_bytes_are_credited_before_they_are_free(patch: Patch) -> None:
    """A parked model that is unloaded is no longer charged to main memory before it has gone."""
    patch.setattr(pool_state, "HOST_CHARGED", HOST_CHARGED - {"unloading"})


def woken_without_device_memory(patch: Patch) -> None:
    """A model that wakes is not charged to the device."""
    wake = admission.Admission._wake

    def mutant(self: admission.Admission, slot: Slot) -> None:
        wake(self, slot)
        slot.reserved = NO_MEMORY

    patch.setattr(admission.Admission, "_wake", mutant)


def parked_over_the_host_budget(patch: Patch) -> None:
    """Models are parked whether they fit in the host budget or not."""
    patch.setattr(Parking, "_place", lambda self, slot: self.state.park(slot))


def a_parked_model_is_leased(patch: Patch) -> None:
    """A parked model still looks ready to a new request."""
    acquire = PoolStateMachine._acquire

    def mutant(self: PoolStateMachine, event: LeaseRequested) -> bool:
        slot = self.state.current.get(event.model_id)
        if slot is not None and slot.state == "parked" and not self.state.is_draining:
            self.state.grant(slot, Waiter(event.waiter_id, None, event.deadline_s))
            return True
        return acquire(self, event)

    patch.setattr(PoolStateMachine, "_acquire", mutant)


def the_canary_of_a_woken_model_is_skipped(patch: Patch) -> None:
    """A model that came back with other weights serves."""

    def mutant(self: Parking, event: WakeErrored) -> None:
        self._woken(WakeCompleted(event.slot_id))

    patch.setattr(Parking, "_wake_failed", mutant)


def parked_models_leave_at_once_for_others(patch: Patch) -> None:
    """Parked models have no minimum residency, and leave although requests wait for them."""
    patch.setattr(parking, "can_leave_host", lambda slot, rules, now_s: slot.state == "parked")


def parked_models_stay_after_the_shutdown(patch: Patch) -> None:
    """A model that was being parked when the host began to shut down stays in main memory."""
    patch.setattr(PoolState, "may_park", lambda self, slot: bool(self.host_budget_bytes))


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    the_smallest_dtype_is_always_taken,
    models_are_evicted_for_the_preferred_dtype,
    evict_while_leased,
    grant_after_eviction_began,
    lost_wake_up_after_a_release,
    lost_wake_up_by_time,
    double_load,
    bytes_credited_early,
    lease_leaked_by_a_cancelled_waiter,
    load_cancelled_with_its_first_requester,
    eviction_that_still_does_not_fit,
    pinned_models_make_room,
    no_minimum_residency,
    the_youngest_claim_goes_first,
    waiters_are_granted_a_step_late,
    both_outcomes_for_an_impatient_waiter,
    a_deficit_is_forgotten,
    the_reading_of_the_device_is_ignored,
    victims_leave_on_an_old_reading,
    a_shutdown_is_undone_by_an_operator_who_gives_up,
    a_load_that_hangs_is_told_to_nobody,
    models_leave_while_nothing_can_be_freed,
    nobody_is_sent_to_another_host,
    an_eviction_outlives_a_later_preload,
    an_evicted_model_comes_back_unasked,
    the_largest_workspace_is_not_reserved,
    woken_while_parking,
    device_bytes_are_credited_while_they_are_copied,
    host_bytes_are_credited_before_they_are_free,
    woken_without_device_memory,
    parked_over_the_host_budget,
    a_parked_model_is_leased,
    the_canary_of_a_woken_model_is_skipped,
    parked_models_leave_at_once_for_others,
    parked_models_stay_after_the_shutdown,
)


OTHER_ERRORS = (RuntimeError, KeyError, AttributeError)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_invariants_catch(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)

    assert storms_until_found(random_storm, MAX_STORMS, OTHER_ERRORS) <= MAX_STORMS


def test_without_a_mutant_nothing_is_found() -> None:
    assert storms_until_found(random_storm, 100, OTHER_ERRORS) == 101
