"""Splits a model that no device can hold alone, over the devices of a host and main memory: pure functions.

    parts       [embeddings + norms + heads] [layer 0] [layer 1] … [layer n]
    placed on    home ─────────────────────────────► next device ──► … ──► main memory

Parts stay in the order of a pass, so that activations cross a border once for each device. Each device is charged for
its parts and for the workspace of the model's batches, which run beside its own; the last one also for the largest
layer, where layers in main memory are copied to for their turn.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from msgspec import structs

from engines.pool.eviction import charges, missing_bytes, never_fits, total_bytes
from engines.pool.flex import is_patient
from engines.pool.messages import WarmUpCompleted
from engines.pool.slot import NO_MEMORY, MemoryNeed, Share, Slot, Split
from engines.pool.state import PoolState


def cut(need: MemoryNeed, rooms: Sequence[tuple[int, int]], host_rooms: Sequence[tuple[int, int]] = ()) -> Split | None:
    """Fills devices with the parts of a model, one device after the other, and then main memory.

    Args:
        need: of the model, with its `parts`.
        rooms: (pool, bytes) of each device for weights, beside the workspace; the home first.
        host_rooms: (pool, bytes) of each host budget; empty keeps all parts on devices.

    Returns:
        The split over as few devices as hold it; None where it does not fit.
    """
    parts = need.parts or ()
    size_bytes = sum(parts)
    on_devices = [*accumulate(max(0, room) for _, room in rooms)]
    for num_devices, most_bytes in enumerate(on_devices, start=1):
        split = _fill(need, parts, rooms[:num_devices], ()) if size_bytes <= most_bytes else None
        if split is not None:
            return split
    in_host = sum(max(0, room) for _, room in host_rooms)
    for num_devices in range(len(rooms) if in_host else 0, 0, -1):
        if size_bytes > on_devices[num_devices - 1] + in_host:
            return None  # fewer devices hold less
        split = _fill(need, parts, rooms[:num_devices], host_rooms)
        if split is not None:
            return split
    return None


def _fill(
    need: MemoryNeed, parts: Sequence[int], rooms: Sequence[tuple[int, int]], host_rooms: Sequence[tuple[int, int]]
) -> Split | None:
    """Fills these devices, and leaves the last one room for a layer where main memory has parts too."""
    buffer_bytes = max(parts[1:], default=0) if host_rooms else 0
    shares: list[Share] = []
    at = 0
    for index, (pool, room) in enumerate(rooms):
        extra_bytes = buffer_bytes if index == len(rooms) - 1 else 0
        first, used = at, extra_bytes
        while at < len(parts) and used + parts[at] <= room:
            used += parts[at]
            at += 1
        if used > room or (index == 0 and not at):
            return None
        if at > first or extra_bytes:
            shares.append(Share(pool=pool, need=_share_need(need, used, is_home=not index), num_parts=at - first))
    left = parts[at:]
    if not left:
        return None if host_rooms else Split(tuple(shares))
    in_host = _place_in_host(sum(left), host_rooms)
    return None if in_host is None else Split(_with_host_bytes(shares, in_host), len(left))


def _share_need(need: MemoryNeed, weight_bytes: int, *, is_home: bool) -> MemoryNeed:
    """Returns what a device is charged. At home the workspace is one of several that batches of other models share; on
    other devices it is needed in addition, as these batches do not wait for those of the device."""
    if is_home:
        return MemoryNeed(
            weight_bytes=weight_bytes,
            workspace_bytes=need.workspace_bytes,
            weights_known=True,
            workspace_known=True,
        )
    return MemoryNeed(weight_bytes=weight_bytes + need.workspace_bytes, weights_known=True, workspace_known=True)


def _place_in_host(size_bytes: int, host_rooms: Sequence[tuple[int, int]]) -> dict[int, int] | None:
    """Divides bytes among host budgets, which are parts of the same memory; None where they are too small."""
    placed: dict[int, int] = {}
    for pool, room in host_rooms:
        placed[pool] = min(size_bytes, max(0, room))
        size_bytes -= placed[pool]
    return None if size_bytes else placed


def _with_host_bytes(shares: Sequence[Share], in_host: dict[int, int]) -> tuple[Share, ...]:
    known = {share.pool for share in shares}
    mixed = [structs.replace(share, host_bytes=in_host.get(share.pool, 0)) for share in shares]
    mixed += [Share(pool=pool, host_bytes=size) for pool, size in in_host.items() if size and pool not in known]
    return tuple(mixed)


def with_measured(split: Split, event: WarmUpCompleted) -> Split:
    """Returns the split with measured bytes; as it was where none were measured."""
    if not event.share_bytes:
        return split
    on_devices = [share for share in split.shares if share.need != NO_MEMORY]
    shares: list[Share] = []
    for share, weight_bytes in zip(on_devices, event.share_bytes, strict=False):
        need = MemoryNeed(weight_bytes=weight_bytes, workspace_bytes=event.workspace_bytes)
        shares.append(structs.replace(share, need=_share_need(need, weight_bytes, is_home=not shares)))
    others = [share for share in split.shares if share.need == NO_MEMORY]
    return Split((*shares, *others), split.num_host_parts)


# ---- the pools that a claim concerns ----


def pinned(pool: PoolState) -> list[Slot]:
    """Returns the ready pinned models with memory on the device.

    A pinned model that still loads is charged by a guess, which must not refuse other models.
    """
    own = [slot for slot in pool.slots.values() if slot.state == "ready" and slot.is_pinned]
    return own + [slot for slot in pool.neighbours.guests(pool) if slot.state == "ready" and slot.is_pinned]


def must_split(pool: PoolState, slot: Slot) -> bool:
    """Tells whether a claim can be served only by splitting the model: it may be, its device can never hold it alone
    beside pinned models, and it is not loaded yet."""
    need = slot.need
    if slot.home is not None or slot.state != "waiting_space" or need is None or not need.parts:
        return False
    return never_fits(need, pinned(pool), pool.budget_bytes)


def pools_of(home: PoolState, slot: Slot) -> list[PoolState]:
    """Returns the pools whose devices may hold parts of the model, its home first."""
    others = home.neighbours.others(home)
    return [home, *(pool for pool in others if slot.model_id in pool.current and not pool.is_draining)]


def device_rooms(
    pools: Sequence[PoolState], need: MemoryNeed, staying: Sequence[Sequence[Slot]], limits: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns (pool, bytes) for weights beside the slots that stay on each device and the workspace."""
    workspace = MemoryNeed(workspace_bytes=need.workspace_bytes)
    home, *others = zip(pools, staying, limits, strict=True)
    rooms = [(home[0].index, home[2] - total_bytes(charges(home[1], workspace)))]
    return rooms + [
        (pool.index, limit - total_bytes(charges(slots)) - need.workspace_bytes) for pool, slots, limit in others
    ]


def target(home: PoolState, slot: Slot, *, within_budgets: bool = False) -> Split | None:
    """Returns the split over all memory that can become free; None where that is not enough.

    Args:
        within_budgets: as if no other process used the devices.
    """
    need, pools = slot.need or NO_MEMORY, pools_of(home, slot)
    limits = [pool.budget_bytes if within_budgets else pool.limit_bytes() for pool in pools]
    rooms = device_rooms(pools, need, [pinned(pool) for pool in pools], limits)
    return cut(need, rooms, [(pool.index, host_room(pool)) for pool in pools])


def host_room(pool: PoolState) -> int:
    """Returns the bytes of a host budget for parts of split models, beside pinned models."""
    kept = sum(slot.host_bytes for slot in pool.in_state("parked") if slot.is_pinned)
    splits = (slot.split for slot in pool.neighbours.in_main_memory(pool) if slot.is_pinned and slot.state == "ready")
    shares = (split.share_of(pool.index) for split in splits if split is not None)
    return pool.host_budget_bytes - kept - sum(share.host_bytes for share in shares if share is not None)


def visitors(pool: PoolState) -> list[Slot]:
    """Returns copies of the other pools' claims that wait for memory of this device too, with their share as the need.

    They keep their place among this pool's claims, so that younger ones do not take the memory from them.
    """
    if not pool.neighbours.is_used:
        return []
    return [*_visiting(pool, ((other, slot) for other in pool.neighbours.others(pool) for slot in other.claims()))]


def _visiting(pool: PoolState, claims: Iterable[tuple[PoolState, Slot]]) -> Iterator[Slot]:
    for other, slot in claims:
        split = target(other, slot) if must_split(other, slot) else None
        share = split.share_of(pool.index) if split is not None else None
        if share is not None and share.need != NO_MEMORY:
            yield structs.replace(slot, need=share.need, home=other.index)


def claimed_host_bytes(pool: PoolState) -> int:
    """Returns the bytes of this host budget that claims of split models wait for: no model is parked there."""
    if not pool.neighbours.is_used:
        return 0
    claims = ((home, slot) for home in pool.neighbours.pools for slot in home.claims() if must_split(home, slot))
    splits = [split for home, slot in claims if (split := target(home, slot)) is not None]
    return sum(share.host_bytes for split in splits if (share := split.share_of(pool.index)) is not None)


def is_first_in(pool: PoolState, slot: Slot) -> bool:
    """Tells whether no claim of this pool, or that waits for memory of its device, is served before `slot`."""
    rules, now_s = pool.rules, pool.now_s
    place = is_patient(slot, rules, now_s), slot.claim or 0

    def is_before(claim: Slot) -> bool:  # asked first, because the splits of all claims cost far more
        return (is_patient(claim, rules, now_s), claim.claim or 0) < place

    if any(_can_be_served(pool, claim) for claim in pool.claims() if is_before(claim)):
        return False
    others = pool.neighbours.others(pool)
    older = ((other, claim) for other in others for claim in other.claims() if is_before(claim))
    return next(_visiting(pool, older), None) is None


def _can_be_served(pool: PoolState, claim: Slot) -> bool:
    """Tells whether a claim takes part in its pool's queue: what frees memory there can serve it."""
    if must_split(pool, claim):
        return target(pool, claim) is not None
    immovable = pinned(pool)
    if never_fits(claim.claimed_need, immovable, pool.budget_bytes):
        return False
    need = claim.measured if claim.state == "parked" else (claim.need or NO_MEMORY)
    room = pool.budget_bytes - total_bytes(charges(immovable))
    return any(missing_bytes(immovable, form.capped(room), pool.limit_bytes()) == 0 for form in need.forms)
