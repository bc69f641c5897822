"""Admits models that are split over several devices: all budgets at once, or none. Synchronous, no clock, no I/O.

A split claim holds nothing while it waits, so that two of them cannot each hold what the other one needs. It keeps its
place in the queue of every device that it concerns (`engines.pool.splitting.visitors`): claims are served in the same
order on all of them, so that one of them is always first everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct, structs

from engines.errors import EngineError, ModelTooLarge, OutOfMemory
from engines.pool.eviction import (
    can_be_victim,
    can_leave_host,
    choose_parked_victims,
    choose_victims,
    missing_bytes,
    without_leaving,
)
from engines.pool.flex import is_patient, is_spared
from engines.pool.messages import StartLoad
from engines.pool.neighbour_messages import NeighbourEvicts, Notify, ReadingWanted
from engines.pool.reasons import cannot_be_split, split_cause
from engines.pool.slot import NO_MEMORY, MemoryNeed, Share, Slot, Split
from engines.pool.splitting import cut, device_rooms, is_first_in, must_split, pools_of, target
from engines.pool.state import PoolState
from engines.pool.victim_order import host_victim_order, victim_order
from engines.types import format_bytes


class Victim(Struct, frozen=True):
    """A model that leaves for a split claim, and what its pool is missing."""

    slot: Slot
    pool: PoolState
    missing_bytes: int

    @property
    def home(self) -> int:
        """The index of the pool whose model it is."""
        return self.pool.index if self.slot.home is None else self.slot.home


class SplitAdmission:
    """Serves the split claims of one pool. `read`: requests a reading of its device."""

    def __init__(self, state: PoolState, read: Callable[[], None]) -> None:
        self.state = state
        self._read = read

    def need_here(self, slot: Slot) -> MemoryNeed | None:
        """Returns what a split claim, of this pool or another, waits for on this device; None for other claims."""
        if slot.home is not None:
            return slot.need
        if not must_split(self.state, slot):
            return None
        split = target(self.state, slot)
        return split.shares[0].need if split is not None else NO_MEMORY

    def refusal(self, slot: Slot) -> EngineError | None:
        """Returns why a split claim can never be served; None where it can, if only once other processes leave."""
        if target(self.state, slot, within_budgets=True) is not None:
            return None
        pools = pools_of(self.state, slot)
        devices = sum(pool.budget_bytes for pool in pools)
        message = cannot_be_split(slot, devices, sum(pool.host_budget_bytes for pool in pools))
        is_alone = cut(slot.need or NO_MEMORY, *_whole(pools, slot.need or NO_MEMORY)) is None
        return ModelTooLarge(message) if is_alone else OutOfMemory(message, stage="load")

    def serve(self, slot: Slot, *, is_overdue: bool) -> bool:
        """Admits the oldest claim of this pool, or frees memory for it on all its devices. Six cases:

        1. other processes hold the memory: it waits;  2. an older claim of another device is served first, or a model
        loads there: it waits;  3. it fits now, with no more in main memory than it would have after evictions: it is
        admitted;  4. it fits once the models that are leaving have left: it waits;  5. evictions suffice: they begin;
        6. they do not suffice yet: no model is evicted.

        Returns:
            Whether it was admitted.
        """
        wanted = target(self.state, slot)
        if wanted is None or self.state.blocked:
            return False  # (1)
        pools = [pool for pool in pools_of(self.state, slot) if wanted.share_of(pool.index) is not None]
        if not all(_is_free_to_load(pool) and is_first_in(pool, slot) for pool in pools):
            return False  # (2)
        now = self._cut_now(slot, pools)
        if now is not None and now.num_host_parts <= wanted.num_host_parts:
            if self._are_read(pools):
                self._admit(slot, now)
                return True
            return False  # (3): in the step that the readings cause
        if not all(self._fits_after_leaving(pool, wanted) for pool in pools):  # (4)
            self._free_memory(slot, wanted, pools, is_overdue=is_overdue)
        return False

    def _free_memory(self, slot: Slot, wanted: Split, pools: Sequence[PoolState], *, is_overdue: bool) -> None:
        """Evicts models on all devices: cases 5 and 6 of `serve`."""
        victims = self._victims(slot, wanted, pools, even_leased=False)
        if victims is None and is_overdue and not is_patient(slot, self.state.rules, self.state.now_s):
            victims = self._victims(slot, wanted, pools, even_leased=True)
        if victims and self._are_read(pools):
            for victim in victims:
                self._evict(victim, slot, wanted)  # (5)

    # ---- room ----

    def _cut_now(self, slot: Slot, pools: Sequence[PoolState]) -> Split | None:
        need = slot.need or NO_MEMORY
        charged = [pool.charged() for pool in pools]
        rooms = device_rooms(pools, need, charged, [pool.limit_bytes() for pool in pools])
        return cut(need, rooms, [(pool.index, pool.host_budget_bytes - pool.host_used_bytes()) for pool in pools])

    def _fits_after_leaving(self, pool: PoolState, wanted: Split) -> bool:
        share = _share(wanted, pool)
        staying = without_leaving(pool.charged())
        return missing_bytes(staying, share.need, pool.limit_bytes()) == 0 and _missing_in_host(pool, share) <= 0

    def _are_read(self, pools: Sequence[PoolState]) -> bool:
        """Tells whether the readings of all devices are valid; requests those that are not."""
        stale = [pool for pool in pools if pool.now_s >= pool.ceiling_until_s]
        for pool in stale:
            if pool is self.state:
                self._read()
            else:
                self.state.effects.append(Notify(pool.index, ReadingWanted()))
        return not stale

    # ---- victims ----

    def _victims(
        self, slot: Slot, wanted: Split, pools: Sequence[PoolState], *, even_leased: bool
    ) -> list[Victim] | None:
        """Chooses the models that leave all devices for a split claim; None where that is not enough on one of them.

        A split model that leaves one device leaves them all.
        """
        found: dict[int, Victim] = {}
        for pool in pools:
            share, limit = _share(wanted, pool), pool.limit_bytes()
            staying = [other for other in without_leaving(pool.charged()) if other.slot_id not in found]
            candidates = [other for other in staying if self._may_leave(other, pool, slot, even_leased=even_leased)]
            order = victim_order(pool)
            chosen = choose_victims(staying, candidates, share.need, limit, order)
            if chosen is None:
                return None
            short = missing_bytes(staying, share.need, limit)
            found |= {victim.slot_id: Victim(victim, pool, short) for victim in chosen}
        for pool in pools:
            missing = _missing_in_host(pool, _share(wanted, pool)) - _host_bytes_of(found.values(), pool)
            if missing <= 0:
                continue
            held = [other for other in held_in_host(pool) if other.slot_id not in found]
            candidates = [
                other
                for other in held
                if self._may_leave_host(other, pool, slot)
                or self._may_leave(other, pool, slot, even_leased=even_leased)
            ]
            left = choose_parked_victims(candidates, missing, host_victim_order(pool))
            if not left:
                return None
            found |= {victim.slot_id: Victim(victim, pool, missing) for victim in left}
        return list(found.values())

    def _may_leave_host(self, other: Slot, pool: PoolState, claimant: Slot) -> bool:
        """Tells whether a parked model may leave main memory; also one that waits behind the claim, as it could not
        come back before."""
        if other.claim is not None and other.claim > (claimant.claim or 0):
            other = structs.replace(other, claim=None)
        return can_leave_host(other, pool.rules, self.state.now_s)

    def _may_leave(self, other: Slot, pool: PoolState, claimant: Slot, *, even_leased: bool) -> bool:
        rules, now_s = pool.rules, self.state.now_s
        is_spared_for_it = is_patient(claimant, rules, now_s) and is_spared(other, rules, now_s)
        return can_be_victim(other, rules, now_s, even_leased=even_leased) and not is_spared_for_it

    def _evict(self, victim: Victim, claimant: Slot, wanted: Split) -> None:
        need = _share(wanted, victim.pool).need
        is_turn = claimant.evicted_for == victim.slot.model_id
        cause = split_cause(claimant, need, victim.missing_bytes, is_turn=is_turn)
        missing = victim.missing_bytes if is_turn else 0
        evict(self.state, victim.home, NeighbourEvicts(victim.slot.slot_id, cause, claimant.model_id, missing))

    def _admit(self, slot: Slot, split: Split) -> None:
        if slot.files is None:
            raise RuntimeError(f"bug: {slot.model_id} waits for space without files")
        slot.form = 0
        self.state.neighbours.place(slot, self.state.index, split)
        self.state.move(slot, "loading", f"{describe(self.state, split)} admitted")
        slot.load_began_at_s = self.state.now_s
        devices = self.state.neighbours.devices_of(split)
        need = MemoryNeed(weight_bytes=sum(share.need.total_bytes + share.host_bytes for share in split.shares))
        self.state.start(slot, StartLoad(slot.slot_id, slot.loaded_spec, slot.files, need, split, devices))


def evict(state: PoolState, home: int, event: NeighbourEvicts) -> None:
    """Evicts a model of this pool, or tells its own pool to."""
    if home == state.index:
        leave(state, event)
    else:
        state.effects.append(Notify(home, event))


def leave(state: PoolState, event: NeighbourEvicts) -> None:
    """Begins to free a model of this pool for a claim of this or another pool. Three cases:

    1. ready and not pinned: drains;  2. parked: leaves main memory, and is loaded from its files if it has a claim;
    3. it has changed meanwhile.
    """
    slot = state.slots.get(event.slot_id)
    if slot is None or slot.is_pinned or state.blocked:
        return  # (3)
    if slot.state == "ready":
        state.drain(slot, event.cause, event.claimant, event.missing_bytes)  # (1)
    elif slot.state == "parked":
        state.unload(slot, event.cause)  # (2)


def describe(state: PoolState, split: Split) -> str:
    """Formats where the parts of a split model are."""
    return ", ".join(_places(state, split))


def _places(state: PoolState, split: Split) -> Iterator[str]:
    for share in split.shares:
        if share.need != NO_MEMORY:
            yield f"{format_bytes(share.need.total_bytes)} on {state.neighbours.name_of(share.pool)}"
    if split.num_host_parts:
        yield f"{format_bytes(split.host_bytes)} in main memory"


def _share(split: Split, pool: PoolState) -> Share:
    return split.share_of(pool.index) or Share(pool=pool.index)


def held_in_host(pool: PoolState) -> list[Slot]:
    """Returns the models in this pool's part of main memory: parked ones, and copies of split ones, of any pool, with
    the bytes that they hold there."""
    split = []
    for slot in pool.neighbours.in_main_memory(pool):
        share = slot.split.share_of(pool.index) if slot.split is not None else None
        if share is not None:
            split.append(structs.replace(slot, host_bytes=share.host_bytes))
    return pool.in_state("parked") + split


def _host_bytes_of(victims: Iterable[Victim], pool: PoolState) -> int:
    """Returns the bytes of this host budget that become free when split models leave their devices."""
    splits = (victim.slot.split for victim in victims if victim.slot.split is not None)
    return sum(share.host_bytes for split in splits if (share := split.share_of(pool.index)) is not None)


def _missing_in_host(pool: PoolState, share: Share) -> int:
    """Returns the bytes of main memory that are missing for a share once what is being freed there is free."""
    if not share.host_bytes:
        return 0
    leaving = sum(slot.host_bytes for slot in pool.in_state("unloading", "waking"))
    leaving += sum(slot.host_bytes for slot in without_staying(held_in_host(pool)) if slot.split is not None)
    return pool.host_used_bytes() - leaving + share.host_bytes - pool.host_budget_bytes


def without_staying(slots: Sequence[Slot]) -> list[Slot]:
    """Returns the slots that are on their way out of memory."""
    staying = {slot.slot_id for slot in without_leaving(slots)}
    return [slot for slot in slots if slot.slot_id not in staying]


def _is_free_to_load(pool: PoolState) -> bool:
    """Tells whether nothing loads or warms up on the device, whose true size is not known yet."""
    return not any(slot.state in ("loading", "warming") for slot in pool.charged())


def _whole(pools: Sequence[PoolState], need: MemoryNeed) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns all devices and host budgets as if no model were loaded."""
    rooms = device_rooms(pools, need, [()] * len(pools), [pool.budget_bytes for pool in pools])
    return rooms, [(pool.index, pool.host_budget_bytes) for pool in pools]
