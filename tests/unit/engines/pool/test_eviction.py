"""Memory arithmetic and the choice of victims."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.pool.eviction import (
    can_be_victim,
    choose_victims,
    may_pass,
    missing_bytes,
    never_fits,
    total_bytes,
)
from engines.pool.slot import NO_MEMORY, MemoryNeed, PoolPolicy, Slot
from engines.spec import ModelSpec

RULES = PoolPolicy()


def resident(model_id: str, weight_bytes: int, *, used_at_s: float = 0.0, load_s: float = 1.0, leases: int = 0) -> Slot:
    slot = Slot(slot_id=hash(model_id), spec=ModelSpec(model_id=model_id, source="x"), state="ready")
    slot.reserved = MemoryNeed(weight_bytes=weight_bytes, workspace_bytes=5)
    slot.last_used_at_s, slot.load_s = used_at_s, load_s
    slot.leases = set(range(leases))
    return slot


def chosen(slots: list[Slot], need_bytes: int, limit: int = 100) -> list[str] | None:
    victims = choose_victims(slots, slots, MemoryNeed(weight_bytes=need_bytes), limit)
    return None if victims is None else [slot.model_id for slot in victims]


def test_weights_add_up_and_workspaces_do_not() -> None:
    small, large = MemoryNeed(weight_bytes=5, workspace_bytes=1), MemoryNeed(weight_bytes=7, workspace_bytes=3)

    assert total_bytes([small, large, NO_MEMORY]) == 15
    assert total_bytes([]) == 0


def test_the_least_recently_used_leaves_first() -> None:
    slots = [resident("new", 40, used_at_s=9), resident("old", 40, used_at_s=1)]

    assert chosen(slots, 50) == ["old"]


def test_no_more_leave_than_must() -> None:
    slots = [resident("small", 10, used_at_s=1), resident("large", 60, used_at_s=2), resident("last", 20, used_at_s=3)]

    assert chosen(slots, 60) == ["large"]
    assert chosen(slots, 5) == []


def test_all_or_nothing() -> None:
    assert chosen([resident("a", 40), resident("b", 40)], 101) is None


def test_on_ties_a_cheap_large_model_leaves_before_a_dear_small_one() -> None:
    dear = resident("dear", 10, used_at_s=5.1, load_s=60)
    cheap = resident("cheap", 60, used_at_s=5.9, load_s=2)

    assert chosen([dear, cheap], 30) == ["cheap"]


def test_idle_models_leave_before_busy_ones() -> None:
    slots = [resident("busy", 45, used_at_s=1, leases=1), resident("idle", 45, used_at_s=9)]

    assert chosen(slots, 40) == ["idle"]


@given(
    weights=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    need_bytes=st.integers(0, 120),
    limit=st.integers(20, 150),
)
def test_victims_are_enough_and_none_of_them_could_stay(weights: list[int], need_bytes: int, limit: int) -> None:
    slots = [resident(str(index), weight, used_at_s=index) for index, weight in enumerate(weights)]
    need = MemoryNeed(weight_bytes=need_bytes)

    victims = choose_victims(slots, slots, need, limit)

    if victims is None:
        assert need_bytes > limit
        return
    staying = [slot for slot in slots if slot not in victims]
    assert missing_bytes(staying, need, limit) == 0
    assert all(missing_bytes([*staying, victim], need, limit) > 0 for victim in victims)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"state": "draining"}, False),
        ({"operator_pin": True}, False),
        ({"leases": {1}}, False),
        ({"ready_at_s": 96.0}, False),
        ({"load_s": 40.0}, False),
    ],
)
def test_which_models_may_be_evicted(change: dict[str, object], expected: bool) -> None:
    slot = resident("a", 10)
    for field, value in change.items():
        setattr(slot, field, value)

    assert can_be_victim(slot, RULES, 100.0, even_leased=False) is expected


def test_only_what_is_known_refuses_a_model() -> None:
    guess = MemoryNeed(weight_bytes=500, workspace_bytes=500)
    weights_known = MemoryNeed(weight_bytes=90, workspace_bytes=500, weights_known=True)

    assert not never_fits(guess, [], 100)
    assert not never_fits(weights_known, [], 100)
    assert never_fits(weights_known, [resident("pinned", 6)], 100)


@pytest.mark.parametrize(
    ("need", "expected"),
    [
        (MemoryNeed(weight_bytes=500, workspace_bytes=500), (100, 0)),
        (MemoryNeed(weight_bytes=60, workspace_bytes=500, weights_known=True), (60, 40)),
        (MemoryNeed(weight_bytes=160, workspace_bytes=5, weights_known=True), (160, 0)),
        (MemoryNeed(weight_bytes=160, workspace_bytes=5, weights_known=True, workspace_known=True), (160, 5)),
    ],
)
def test_guesses_are_limited_to_the_available_memory(need: MemoryNeed, expected: tuple[int, int]) -> None:
    cut = need.capped(100)

    assert (cut.weight_bytes, cut.workspace_bytes) == expected


def test_a_younger_claim_passes_only_beside_all_older_ones() -> None:
    older, stayer = [MemoryNeed(weight_bytes=70)], [resident("stays", 10)]

    assert may_pass(MemoryNeed(weight_bytes=15), older, stayer, 100)
    assert not may_pass(MemoryNeed(weight_bytes=16), older, stayer, 100)
