"""The orders in which models leave the device and main memory (`eviction: lru | cost`).

`lru_order` needs a slot only. The cost order needs the pool's state too: how long a model takes to come back depends on
whether main memory would have room for it.
"""

from collections.abc import Sequence
from functools import cached_property

from engines.pool.eviction import VictimOrder, can_leave_host, choose_parked_victims, lru_order
from engines.pool.slot import Slot
from engines.pool.state import PoolState
from engines.types import Tier

COPIED_BYTES_PER_S = 10e9
"""The rate at which a model is assumed to come back from main memory that has not done so before: PCIe 4 gives twice as
much from pinned memory, and half of it from pageable memory."""


def victim_order(state: PoolState) -> VictimOrder:
    """Returns the order in which models leave the device for others, as of this step."""
    return lru_order if state.rules.eviction == "lru" else CostOrder(state).on_device


def host_victim_order(state: PoolState) -> VictimOrder:
    """Returns the order in which parked models leave main memory for others, as of this step."""
    return lru_order if state.rules.eviction == "lru" else CostOrder(state).in_host


def wake_seconds(slot: Slot) -> float:
    """Returns how long the model takes to come back from main memory, as last time, else by its bytes."""
    weight_bytes = slot.reserved.weight_bytes or slot.measured.weight_bytes
    return slot.wake_s or weight_bytes / COPIED_BYTES_PER_S


class CostOrder:
    """Sorts idle before busy models, then by the cost that their absence is expected to have for each byte freed.

    That is the rate at which requests come (decayed, up to a factor that all models share) × the seconds that a request
    then waits longer ÷ bytes. It is the ordering of a knapsack by value per size; with equal loads and sizes it is by
    frequency. A model that leaves the device comes back from main memory where it would be parked, else from disk; one
    that leaves main memory comes back from disk, which takes so much longer. The cost of models that
    it would displace there counts too.

    Several models that leave at once may each count on the same free main memory.
    """

    def __init__(self, state: PoolState) -> None:
        self._state = state

    def on_device(self, slot: Slot) -> tuple[bool, float, float]:
        """Returns the key of a model that would leave the device."""
        displaced = self._displaced_by(slot)
        if displaced is None:
            cost = self._heat(slot) * (slot.load_s or 0.0)
        else:
            cost = self._heat(slot) * wake_seconds(slot) + sum(self._host_cost(other) for other in displaced)
        return bool(slot.leases), cost / max(1, slot.reserved.weight_bytes), slot.used_at_s

    def in_host(self, slot: Slot) -> tuple[bool, float, float]:
        """Returns the key of a model that would leave main memory, or not be parked there."""
        return bool(slot.leases), *self._host_key(slot)

    def next_tier(self, slot: Slot) -> Tier:
        """Returns where a model that leaves the device now will be."""
        return "disk" if self._displaced_by(slot) is None else "host"

    def _displaced_by(self, slot: Slot) -> Sequence[Slot] | None:
        """Returns the parked models that leave main memory for a model that leaves the device now; None if it does not
        fit beside those that come later, as in `engines.pool.parking.Parking`."""
        if not self._state.may_park(slot):
            return None
        missing = slot.reserved.weight_bytes - self._host_room
        if missing <= 0:
            return ()
        key = self._host_key(slot)
        order = self.in_host
        return choose_parked_victims((o for o in self._movable if self._host_key(o) < key), missing, order) or None

    def _host_key(self, slot: Slot) -> tuple[float, float]:
        return self._host_cost(slot) / max(1, slot.reserved.weight_bytes or slot.host_bytes), slot.used_at_s

    def _host_cost(self, slot: Slot) -> float:
        return self._heat(slot) * max(0.0, (slot.load_s or 0.0) - wake_seconds(slot))

    def _heat(self, slot: Slot) -> float:
        return slot.heat_now(self._state.now_s, self._state.rules.heat_decay_s)

    @cached_property
    def _host_room(self) -> int:
        """The bytes of main memory that are free, or will be, beside the models that are on their way there."""
        state = self._state
        leaving = sum(slot.host_bytes for slot in state.in_state("unloading", "waking"))
        coming = sum(slot.reserved.weight_bytes for slot in state.in_state("draining") if state.may_park(slot))
        return state.host_budget_bytes - state.host_used_bytes() + leaving - coming

    @cached_property
    def _movable(self) -> list[Slot]:
        """The parked models that may leave main memory for another."""
        state = self._state
        return [slot for slot in state.in_state("parked") if can_leave_host(slot, state.rules, state.now_s)]
