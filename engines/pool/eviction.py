"""Bytes and victims: pure functions of slots and numbers. They decide; `engines/pool/admission.py` acts.

    Σ weights + the largest workspace ≤ limit

because the engines of a device take turns on one lane, so their workspaces do not add up.
"""

from collections.abc import Iterable, Sequence

from engines.pool.slot import LEAVING, NO_MEMORY, MemoryNeed, PoolPolicy, Slot


def total_bytes(needs: Iterable[MemoryNeed]) -> int:
    """What these models take together."""
    weights = workspace = 0
    for need in needs:
        weights += need.weight_bytes
        workspace = max(workspace, need.workspace_bytes)
    return weights + workspace


def charges(slots: Iterable[Slot], *others: MemoryNeed) -> list[MemoryNeed]:
    """What is charged for the slots, and more needs beside them."""
    return [slot.reserved for slot in slots] + list(others)


def never_fits(need: MemoryNeed, immovable: Iterable[Slot], budget_bytes: int) -> bool:
    """Whether what is known for certain overflows the budget beside models that will not leave."""
    return total_bytes(charges(immovable, need.known())) > budget_bytes


def can_be_victim(slot: Slot, rules: PoolPolicy, now_s: float, *, even_leased: bool) -> bool:
    """Ready, not pinned, past its minimum residency, and not leased, unless a claim is overdue (`even_leased`)."""
    return (
        slot.state == "ready"
        and not slot.is_pinned
        and now_s >= slot.evictable_from_s(rules)
        and (even_leased or not slot.leases)
    )


def victim_order(slot: Slot) -> tuple[bool, int, float]:
    """Idle before busy, then least recently used; used in the same second: the cheapest to reload per byte freed."""
    seconds_per_byte = (slot.load_s or 0.0) / max(1, slot.reserved.weight_bytes)
    return bool(slot.leases), int(slot.used_at_s), seconds_per_byte


def choose_victims(
    charged: Sequence[Slot], candidates: Iterable[Slot], need: MemoryNeed, limit_bytes: int
) -> tuple[Slot, ...] | None:
    """As few of `candidates`, in eviction order, as must leave for `need` to fit; None when all of them do not do.

    All or nothing: a model never leaves for a claim that would still not fit.
    """
    staying = {slot.slot_id: slot for slot in charged}
    victims: list[Slot] = []
    for slot in sorted(candidates, key=victim_order):
        if total_bytes(charges(staying.values(), need)) <= limit_bytes:
            break
        del staying[slot.slot_id]
        victims.append(slot)
    if total_bytes(charges(staying.values(), need)) > limit_bytes:
        return None
    for slot in reversed(victims[:]):  # an early small victim may be spared by a later large one
        if total_bytes(charges(staying.values(), slot.reserved, need)) <= limit_bytes:
            staying[slot.slot_id] = slot
            victims.remove(slot)
    return tuple(victims)


def without_leaving(charged: Iterable[Slot]) -> list[Slot]:
    """Those that stay once every drain and unload under way is done."""
    return [slot for slot in charged if slot.state not in LEAVING]


def may_pass(need: MemoryNeed, older: Sequence[MemoryNeed], stayers: Iterable[Slot], limit_bytes: int) -> bool:
    """Whether a younger claim that fits now leaves room for all older ones too, so that it delays none of them.

    `stayers`: pinned models, and all that were loaded since the oldest claim began: they will not leave for it soon.
    """
    return total_bytes(charges(stayers, *older, need)) <= limit_bytes


def missing_bytes(staying: Iterable[Slot], need: MemoryNeed, limit_bytes: int) -> int:
    """How much more memory would have let `need` fit without evicting anyone."""
    return max(0, total_bytes(charges(staying, need)) - limit_bytes)


def deficit_bytes(charged: Iterable[Slot], budget_bytes: int) -> int:
    """How far measured models overshoot the budget; until it is paid nothing is loaded."""
    return missing_bytes(charged, NO_MEMORY, budget_bytes)
