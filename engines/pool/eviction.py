"""Memory arithmetic and the choice of victims: pure functions, which `engines/pool/admission.py` applies.

    Σ weights + the largest workspace ≤ limit

The workspace of a model is that of as many of its batches as the device has threads
(`engines.loading.loader.reserved_workspace_bytes`). So the largest one holds whatever runs at once: as many batches, of
whichever models, none larger than those of that model.
"""

from collections.abc import Callable, Iterable, Sequence

from engines.pool.slot import LEAVING, NO_MEMORY, MemoryNeed, PoolPolicy, Slot


def total_bytes(needs: Iterable[MemoryNeed]) -> int:
    """Returns the bytes that these models need together: the sum of weights and the largest workspace."""
    weights = workspace = 0
    for need in needs:
        weights += need.weight_bytes
        workspace = max(workspace, need.workspace_bytes)
    return weights + workspace


def charges(slots: Iterable[Slot], *others: MemoryNeed) -> list[MemoryNeed]:
    """Returns the needs that are charged for the slots, followed by `others`."""
    return [slot.reserved for slot in slots] + list(others)


def never_fits(need: MemoryNeed, immovable: Iterable[Slot], budget_bytes: int) -> bool:
    """Tells whether the certain part of `need`, in every form, exceeds the budget beside models that cannot be
    evicted."""
    staying = list(immovable)
    return all(total_bytes(charges(staying, form.known())) > budget_bytes for form in need.forms)


def choose_form(
    need: MemoryNeed, charged: Sequence[Slot], available_bytes: int, limit_bytes: int
) -> tuple[int, MemoryNeed]:
    """Chooses the form to load and the bytes to charge for it. Three cases:

    1. there is one form;  2. the first form that fits into free memory;  3. the smallest, for which the least is
    evicted, where none fits.

    Args:
        charged: the slots in memory.
        available_bytes: what pinned models leave of the budget: guesses are capped to it.

    Returns:
        An index of `need.forms`, and the need.
    """
    forms = [form.capped(available_bytes) for form in need.forms]
    if len(forms) == 1:
        return 0, forms[0]  # (1)
    fitting = (at for at, form in enumerate(forms) if missing_bytes(charged, form, limit_bytes) == 0)
    smallest = min(range(len(forms)), key=lambda at: forms[at].total_bytes)
    chosen = next(fitting, smallest)  # (2), (3)
    return chosen, forms[chosen]


def can_be_victim(slot: Slot, rules: PoolPolicy, now_s: float, *, even_leased: bool) -> bool:
    """Tells whether the model may be evicted: ready, not pinned, past its minimum residency, and not leased.

    `even_leased`: a leased model may be evicted too, as a claim is overdue.
    """
    return (
        slot.state == "ready"
        and not slot.is_pinned
        and now_s >= slot.evictable_from_s(rules)
        and (even_leased or not slot.leases)
    )


VictimOrder = Callable[[Slot], tuple[bool, float, float]]
"""The key that sorts models, the first to leave first (`engines/pool/victim_order.py`)."""


def lru_order(slot: Slot) -> tuple[bool, float, float]:
    """Sorts idle before busy models, then least recently used (to the second), then fastest reload per byte."""
    return bool(slot.leases), int(slot.used_at_s), _seconds_per_byte(slot)


def _seconds_per_byte(slot: Slot) -> float:
    return (slot.load_s or 0.0) / max(1, slot.reserved.weight_bytes or slot.host_bytes)


def choose_victims(
    charged: Sequence[Slot],
    candidates: Iterable[Slot],
    need: MemoryNeed,
    limit_bytes: int,
    order: VictimOrder = lru_order,
) -> tuple[Slot, ...] | None:
    """Chooses as few `candidates` as possible, in eviction order, so that `need` fits; None if all are not enough.

    All or nothing: no model is evicted for a claim that would still not fit.
    """
    staying = {slot.slot_id: slot for slot in charged}
    victims: list[Slot] = []
    for slot in sorted(candidates, key=order):
        if total_bytes(charges(staying.values(), need)) <= limit_bytes:
            break
        del staying[slot.slot_id]
        victims.append(slot)
    if total_bytes(charges(staying.values(), need)) > limit_bytes:
        return None
    for slot in reversed(victims[:]):  # a later large victim may make an earlier small one unnecessary
        if total_bytes(charges(staying.values(), slot.reserved, need)) <= limit_bytes:
            staying[slot.slot_id] = slot
            victims.remove(slot)
    return tuple(victims)


def can_leave_host(slot: Slot, rules: PoolPolicy, now_s: float) -> bool:
    """Tells whether a parked model may leave main memory for another: no request waits for it, it is not pinned, and it
    is past its minimum residency there."""
    is_free = slot.state == "parked" and slot.claim is None and not slot.is_pinned
    return is_free and now_s >= slot.parked_at_s + rules.min_residency_s


def choose_parked_victims(candidates: Iterable[Slot], missing_bytes: int, order: VictimOrder) -> tuple[Slot, ...]:
    """Chooses as few parked models as possible, in eviction order, that free `missing_bytes`; none if all are not
    enough."""
    victims: list[Slot] = []
    freed = 0
    for slot in sorted(candidates, key=order):
        if freed >= missing_bytes:
            break
        victims.append(slot)
        freed += slot.host_bytes
    if freed < missing_bytes:
        return ()
    for slot in reversed(victims[:]):  # a later large victim may make an earlier small one unnecessary
        if freed - slot.host_bytes >= missing_bytes:
            victims.remove(slot)
            freed -= slot.host_bytes
    return tuple(victims)


def without_leaving(charged: Iterable[Slot]) -> list[Slot]:
    """Returns the slots that remain charged once all drains and unloads in progress are done."""
    return [slot for slot in charged if slot.state not in LEAVING]


def may_pass(need: MemoryNeed, older: Sequence[MemoryNeed], stayers: Iterable[Slot], limit_bytes: int) -> bool:
    """Tells whether a younger claim leaves enough memory for all older ones, so that it delays none of them.

    `stayers`: pinned models and all models loaded since the oldest claim began, which will not be evicted soon.
    """
    return total_bytes(charges(stayers, *older, need)) <= limit_bytes


def missing_bytes(staying: Iterable[Slot], need: MemoryNeed, limit_bytes: int) -> int:
    """Returns the bytes that are missing for `need` to fit beside `staying`; 0 if it fits."""
    return max(0, total_bytes(charges(staying, need)) - limit_bytes)


def deficit_bytes(charged: Iterable[Slot], budget_bytes: int) -> int:
    """Returns the bytes by which loaded models exceed the budget; nothing is loaded until it is 0."""
    return missing_bytes(charged, NO_MEMORY, budget_bytes)
