"""Joins the pools of one process whose devices may hold parts of one model. Synchronous, no clock, no I/O.

A split model is a slot of one pool, its home. The other pools see it in their arithmetic as a guest: a copy of the
slot with what their own budget is charged. All budgets are charged in one step and credited in one step, so that no
model ever holds a part of its memory while it waits for the rest.
"""

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

from msgspec import structs

from engines.pool.neighbour_messages import NeighbourChanged, Notify
from engines.pool.slot import NO_MEMORY, Slot, Split

if TYPE_CHECKING:
    from engines.pool.state import PoolState


class Neighbours:
    """The pools that share models, and what their split models are charged for.

    Attributes:
        pools: in the order in which they joined.
        slot_ids, claims: numbers that no two pools use twice; the lower claim is the older one.
        names, devices: of the pools, where they have hosts.
        is_used: whether any model may be split; while none may, pools do not look at each other.
    """

    def __init__(self) -> None:
        self.pools: list[PoolState] = []
        self.names: list[str] = []
        self.devices: list[str] = []
        self.slot_ids, self.claims = count(), count()
        self.is_used = False
        self._placed: dict[int, tuple[int, Slot]] = {}
        self._was_involved = False

    def join(self, pool: "PoolState") -> int:
        """Adds a pool; returns its index."""
        self.pools.append(pool)
        return len(self.pools) - 1

    def name_of(self, index: int) -> str:
        """Returns what people call a pool."""
        return self.names[index] if index < len(self.names) else f"device {index}"

    def devices_of(self, split: Split) -> tuple[str, ...]:
        """Returns the devices of a split's shares, in the order of a pass."""
        return tuple(self.devices[share.pool] for share in split.shares if share.need != NO_MEMORY and self.devices)

    # ---- charges ----

    def place(self, slot: Slot, home: int, split: Split) -> None:
        """Charges every budget of a split at once."""
        slot.split = split
        slot.reserved = split.shares[0].need
        self._placed[slot.slot_id] = home, slot

    def remove(self, slot: Slot) -> None:
        """Credits every budget of a split at once."""
        slot.split = None
        self._placed.pop(slot.slot_id, None)

    def guests(self, pool: "PoolState") -> list[Slot]:
        """Returns copies of other pools' split models, each with what this pool's device is charged."""
        found = []
        for home, slot in self._placed.values():
            share = slot.split.share_of(pool.index) if slot.split is not None and home != pool.index else None
            if share is not None and share.need != NO_MEMORY:
                found.append(structs.replace(slot, reserved=share.need, home=home))
        return found

    def host_bytes(self, pool: "PoolState") -> int:
        """Returns what the host budget of this pool is charged for parts of split models."""
        splits = (slot.split for _, slot in self._placed.values() if slot.split is not None)
        shares = (share for split in splits if (share := split.share_of(pool.index)) is not None)
        return sum(share.host_bytes for share in shares)

    def in_main_memory(self, pool: "PoolState") -> list[Slot]:
        """Returns the split models, of any pool, with parts that this pool's host budget is charged for."""
        found = []
        for home, slot in self._placed.values():
            share = slot.split.share_of(pool.index) if slot.split is not None else None
            if share is not None and share.host_bytes:
                found.append(slot if home == pool.index else structs.replace(slot, home=home))
        return found

    def capacity_bytes(self) -> int:
        """Returns all budgets together, of devices and of main memory."""
        return sum(pool.budget_bytes + pool.host_budget_bytes for pool in self.pools)

    # ---- steps of other pools ----

    def set_time(self, now_s: float) -> None:
        """Sets the clock of all pools, which look at each other's deadlines."""
        for pool in self.pools if self.is_used else ():
            pool.now_s = now_s

    def others(self, pool: "PoolState") -> Iterator["PoolState"]:
        """Yields the other pools."""
        return (other for other in self.pools if other is not pool)

    def is_involved(self) -> bool:
        """Tells whether a split model is charged, or waits for memory."""
        if not self.is_used or len(self.pools) == 1:
            return False
        return bool(self._placed) or any(slot.need and slot.need.parts for p in self.pools for slot in p.claims())

    def notices(self, pool: "PoolState", *, has_changed: bool) -> list[Notify]:
        """Returns what other pools are told after a step of this one; nothing while no split model is involved, nor
        after a step that such a notice caused and that changed nothing: else two pools would call each other for ever.
        """
        was_involved, self._was_involved = self._was_involved, self.is_involved()
        if not (was_involved or self._was_involved) or not has_changed:
            return []
        return [Notify(other.index, NeighbourChanged()) for other in self.others(pool)]
