"""Random events on pools that split models over their devices; and mutants that its invariants must catch.

`SPLIT_STORMS=10000 pytest tests/unit/engines/pool/test_split_storms.py` takes minutes.
"""

import os
from collections.abc import Callable

import pytest
from msgspec import structs

from engines.pool import split_admission, splitting
from engines.pool.neighbour_messages import NeighbourEvicts
from engines.pool.neighbours import Neighbours
from engines.pool.slot import NO_MEMORY, Share, Slot, Split
from engines.pool.split_admission import SplitAdmission
from engines.pool.state import PoolState
from engines.pool.state_machine import PoolStateMachine
from tests.testkit.pool_storm import storms_until_found
from tests.testkit.split_storm import SplitStorm, random_split_storm, split_specs

Patch = pytest.MonkeyPatch
MAX_STORMS = 300
NUM_STORMS = int(os.environ.get("SPLIT_STORMS", "300"))
"""Of the mutants below, the last is found in storm 17."""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_STORMS, 100))
def test_storms_of_split_models_break_no_invariant(first: int) -> None:
    num_loads = sum(random_split_storm(seed).num_split_loads for seed in range(first, first + 100))

    assert num_loads > 100  # else the storms would show nothing


def bytes_are_credited_to_the_wrong_device(patch: Patch) -> None:
    """A guest's share is read from another device than the one that holds it."""
    of = Split.share_of

    def share_of(self: Split, pool: int) -> Share | None:
        return of(self, (pool + 1) % 2) if len(self.shares) > 1 else of(self, pool)

    patch.setattr(Split, "share_of", share_of)


def guests_are_not_charged(patch: Patch) -> None:
    """Only the home of a split model knows of it."""
    patch.setattr(Neighbours, "guests", lambda self, pool: [])


def layers_in_main_memory_are_free(patch: Patch) -> None:
    """The host budget is not charged for layers."""
    patch.setattr(Neighbours, "host_bytes", lambda self, pool: 0)


def a_half_placed_model_is_left(patch: Patch) -> None:
    """When a split model leaves, only its home gets its bytes back."""

    def remove(self: Neighbours, slot: Slot) -> None:
        if slot.split is not None:
            slot.split = Split(tuple(structs.replace(share, host_bytes=0) for share in slot.split.shares))

    patch.setattr(Neighbours, "remove", remove)


def the_other_devices_get_their_bytes_back_early(patch: Patch) -> None:
    """The shares of other devices are credited when the unload starts, not when it ends."""
    guests = Neighbours.guests

    def mutant(self: Neighbours, pool: PoolState) -> list[Slot]:
        return [slot for slot in guests(self, pool) if slot.state != "unloading"]

    patch.setattr(Neighbours, "guests", mutant)


def a_split_model_is_parked(patch: Patch) -> None:
    """A split model is parked like others."""
    may_park = PoolState.may_park

    def mutant(self: PoolState, slot: Slot) -> bool:
        split, slot.split = slot.split, None
        try:
            return may_park(self, slot)
        finally:
            slot.split = split

    patch.setattr(PoolState, "may_park", mutant)


def leases_of_guests_are_ignored(patch: Patch) -> None:
    """A model whose requests run is freed for another pool's claim."""

    def leave(state: PoolState, event: NeighbourEvicts) -> None:
        slot = state.slots.get(event.slot_id)
        if slot is not None and slot.state == "ready":
            state.move(slot, "draining", event.cause, event.claimant)
            state.unload(slot, event.cause)

    patch.setattr(split_admission, "leave", leave)


def the_buffer_for_layers_in_main_memory_is_not_reserved(patch: Patch) -> None:
    """No room is left for the layer that is copied to the device for its turn."""
    fill = splitting._fill

    def mutant(need, parts, rooms, host_rooms):  # type: ignore[no-untyped-def]  # as the function that it replaces
        split = fill(need, parts, rooms, host_rooms)
        if split is None or not split.num_host_parts:
            return split
        *first, last = [share for share in split.shares if share.need != NO_MEMORY]
        less = structs.replace(last.need, weight_bytes=last.need.weight_bytes - max(parts[1:]))
        others = [share for share in split.shares if share.need == NO_MEMORY]
        return Split((*first, structs.replace(last, need=less), *others), split.num_host_parts)

    patch.setattr(splitting, "_fill", mutant)


def a_split_claim_is_admitted_while_it_does_not_fit(patch: Patch) -> None:
    """What fits after evictions is admitted before these have ended."""

    def cut_now(self: SplitAdmission, slot: Slot, pools: list[PoolState]) -> Split | None:
        return splitting.target(self.state, slot)

    patch.setattr(SplitAdmission, "_cut_now", cut_now)


def younger_claims_take_the_memory_of_split_ones(patch: Patch) -> None:
    """Other pools do not see that a split model waits for their memory, and it never comes in."""
    patch.setattr(SplitAdmission, "serve", lambda self, slot, *, is_overdue: False)


def other_pools_are_not_told(patch: Patch) -> None:
    """What one pool frees wakes no claim of another."""
    patch.setattr(Neighbours, "notices", lambda self, pool, *, has_changed: [])


def pools_answer_each_other_for_ever(patch: Patch) -> None:
    """A notice that changed nothing causes another one."""
    notices = Neighbours.notices
    patch.setattr(Neighbours, "notices", lambda self, pool, *, has_changed: notices(self, pool, has_changed=True))


def the_residency_of_guests_is_ignored(patch: Patch) -> None:
    """A split claim evicts models of other pools that have only just been loaded."""

    def may_leave(self: SplitAdmission, other: Slot, pool: PoolState, claimant: Slot, *, even_leased: bool) -> bool:
        return other.state == "ready" and not other.is_pinned

    patch.setattr(SplitAdmission, "_may_leave", may_leave)


def shutdown_forgets_split_models(patch: Patch) -> None:
    """A host that shuts down leaves its split models in memory."""
    drain = PoolStateMachine._drain

    def mutant(self, event):  # type: ignore[no-untyped-def]  # as the method that it replaces
        kept = [slot for slot in self.state.slots.values() if slot.split is not None and slot.state == "ready"]
        for slot in kept:
            slot.state = "cold"
        drain(self, event)
        for slot in kept:
            slot.state = "ready"

    patch.setattr(PoolStateMachine, "_drain", mutant)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    bytes_are_credited_to_the_wrong_device,
    guests_are_not_charged,
    layers_in_main_memory_are_free,
    a_half_placed_model_is_left,
    the_other_devices_get_their_bytes_back_early,
    a_split_model_is_parked,
    leases_of_guests_are_ignored,
    the_buffer_for_layers_in_main_memory_is_not_reserved,
    a_split_claim_is_admitted_while_it_does_not_fit,
    younger_claims_take_the_memory_of_split_ones,
    other_pools_are_not_told,
    pools_answer_each_other_for_ever,
    the_residency_of_guests_is_ignored,
    shutdown_forgets_split_models,
)


OTHER_ERRORS = (RuntimeError, KeyError, AttributeError, IndexError, AssertionError)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_invariants_catch(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)

    assert storms_until_found(random_split_storm, MAX_STORMS, OTHER_ERRORS) <= MAX_STORMS


def two_pools(host_budget: int = 0, model_ids: str = "abcde") -> SplitStorm:
    return SplitStorm(2, split_specs(model_ids), host_budget)


def run(storm: SplitStorm) -> None:
    """Ends all work that goes on."""
    while storm.work:
        storm.finish(0)


def test_a_model_of_two_devices_is_charged_to_both_and_leaves_both() -> None:
    storm = two_pools()

    storm.acquire(0, "a")
    run(storm)

    assert [storm.used(0), storm.used(1)] == [300 + 3 * 200 + 40, 4 * 200 + 40]
    assert len(storm.leases) == 1
    storm.release(next(iter(storm.leases)))
    storm.evict(0, "a")
    run(storm)
    assert [storm.used(0), storm.used(1)] == [0, 0]


def test_two_split_models_that_need_both_devices_take_turns() -> None:
    storm = two_pools(host_budget=1200)

    storm.acquire(0, "a")
    storm.acquire(1, "b")
    storm.settle()

    assert storm.num_split_loads == 2
    assert not storm.waiting


def test_a_model_larger_than_everything_is_refused_with_both_numbers() -> None:
    storm = two_pools(model_ids="g")

    storm.acquire(0, "g")
    run(storm)

    assert storm.outcomes == ["ModelTooLarge"]
    message = str(storm.cores[0].state.too_large(storm.cores[0].state.current["g"]))
    assert "needs 6.6 KiB, the devices of this host have 2.0 KiB, and the host budget 0 B of main memory" in message


def test_the_last_layers_go_to_main_memory_where_devices_are_too_small() -> None:
    storm = two_pools(host_budget=1200)

    storm.acquire(0, "c")
    run(storm)

    assert len(storm.leases) == 1
    assert storm.host_used(0) + storm.host_used(1) > 0
    assert all(storm.used(pool) <= 1000 for pool in range(2))


def test_a_model_that_may_not_be_split_is_refused_as_before() -> None:
    storm = SplitStorm(2, {"a": structs.replace(split_specs("a")["a"], offload="never")}, 5000)

    assert not storm.neighbours.is_used
