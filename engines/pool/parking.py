"""Keeps models that left the device in main memory (parked), within a second budget, the host budget.

    draining ─► parking ─► parked ─► waking ─► ready
                   │          │         └─► unloading   it gives other vectors, or was replaced
                   │          └─► unloading             it leaves main memory for a model in later eviction order
                   └─► unloading                        replaced, or an operator wants its memory

The bytes of a parked model count against the host budget only; while they are copied, against both budgets.
`engines/pool/admission.py` decides when a parked model gets device memory back: its claim is one like others.
"""

from collections.abc import Callable

from engines.pool.completions import become_ready
from engines.pool.eviction import can_be_victim, can_leave_host, choose_parked_victims
from engines.pool.messages import HostBudgetChanged, ParkCompleted, ParkErrored, WakeCompleted, WakeErrored
from engines.pool.neighbour_messages import NeighbourEvicts
from engines.pool.reasons import EVICTED, HOST_IDLE, shutting_down
from engines.pool.slot import NO_MEMORY, Slot
from engines.pool.split_admission import evict, without_staying
from engines.pool.splitting import claimed_host_bytes
from engines.pool.state import PoolState
from engines.pool.victim_order import host_victim_order, victim_order
from engines.types import format_bytes


class Parking:
    """Manages the host budget of one device."""

    def __init__(self, state: PoolState) -> None:
        self.state = state
        self.handlers: dict[type, Callable[..., bool | None]] = {
            HostBudgetChanged: self._budget_changed,
            ParkCompleted: self._parked,
            ParkErrored: self._park_failed,
            WakeCompleted: self._woken,
            WakeErrored: self._wake_failed,
        }

    # ---- decisions, after every event ----

    def evict_idle(self) -> None:
        """Frees parked models that nobody asked for during their `host_keep_alive`."""
        for slot in self.state.in_state("parked"):
            if is_host_idle_evictable(slot) and self.state.now_s >= slot.host_idle_at_s:
                self.state.unload(slot, f"{HOST_IDLE} of {slot.spec.host_keep_alive_s:g} s")

    def reduce_deficit(self) -> None:
        """Frees parked models, in eviction order, while they exceed the host budget."""
        missing = self.state.host_used_bytes() - self._leaving_bytes() - self.state.host_budget_bytes
        order = host_victim_order(self.state)
        free = [slot for slot in self.state.in_state("parked") if slot.claim is None and not slot.is_pinned]
        for slot in sorted(free, key=order):
            if missing <= 0:
                return
            missing -= slot.host_bytes
            self.state.unload(slot, "parked models are over the host budget")
        if missing > 0:
            self._evict_split(missing)

    def _evict_split(self, missing: int) -> None:
        """Evicts models with layers in main memory, of any pool, while these are over this host budget."""
        held = self.state.neighbours.in_main_memory(self.state)
        rules, now_s = self.state.rules, self.state.now_s
        for slot in sorted(held, key=victim_order(self.state)):
            if missing > 0 and can_be_victim(slot, rules, now_s, even_leased=True):
                home = self.state.index if slot.home is None else slot.home
                share = slot.split.share_of(self.state.index) if slot.split is not None else None
                missing -= share.host_bytes if share is not None else 0
                evict(self.state, home, NeighbourEvicts(slot.slot_id, "layers are over the host budget"))

    def place(self) -> None:
        """Parks or unloads draining models without leases."""
        for slot in self.state.in_state("draining"):
            if slot.leases:
                continue
            self.state.unload_if_free(slot)
            if slot.state == "draining" and not self.state.blocked:
                self._place(slot)

    def _place(self, slot: Slot) -> None:
        """Moves a model to main memory if it fits there. Four cases:

        1. it fits: it is parked;  2. it will fit once other models have left main memory: it waits for them;
        3. parked models that come before it in eviction order leave for it;  4. else it is unloaded.
        """
        used = self.state.host_used_bytes() + claimed_host_bytes(self.state)
        missing = used + slot.reserved.weight_bytes - self.state.host_budget_bytes
        if missing <= 0:
            self.state.park(slot)  # (1)
            return
        missing -= self._leaving_bytes()
        if missing <= 0:
            return  # (2)
        order = host_victim_order(self.state)
        rules, now_s = self.state.rules, self.state.now_s
        free = [other for other in self.state.in_state("parked") if can_leave_host(other, rules, now_s)]
        victims = choose_parked_victims((o for o in free if order(o) < order(slot)), missing, order)
        for victim in victims:
            size = format_bytes(slot.reserved.weight_bytes)
            self.state.unload(victim, f"left main memory for {slot.model_id}, which takes {size}")  # (3)
        if not victims:
            slot.leaves_to = "disk"
            self.state.unload_if_free(slot)  # (4)

    def _leaving_bytes(self) -> int:
        """Returns the bytes of main memory that are being freed."""
        leaving = without_staying(self.state.neighbours.in_main_memory(self.state))
        shares = (slot.split.share_of(self.state.index) for slot in leaving if slot.split is not None)
        of_split = sum(share.host_bytes for share in shares if share is not None)
        return of_split + sum(slot.host_bytes for slot in self.state.in_state("unloading", "waking"))

    # ---- results of asynchronous work ----

    def _budget_changed(self, event: HostBudgetChanged) -> None:
        self.state.host_budget_bytes = event.budget_bytes

    def _parked(self, event: ParkCompleted) -> None:
        """Charges main memory only. Two cases: 1. nobody wants it there any more: unloaded;  2. parked."""
        slot = self.state.finish(event.slot_id, "park")
        slot.host_bytes, slot.reserved = event.host_bytes, NO_MEMORY
        if not self.state.may_park(slot):
            self.state.unload(slot, slot.leaving_cause or "")  # (1)
            return
        self.state.move(slot, "parked", f"{format_bytes(event.host_bytes)} in main memory", slot.leaving_for)  # (2)
        slot.parked_at_s = self.state.now_s
        slot.leaving_cause = slot.leaving_for = slot.leaves_to = None
        self.state.notify_evictors(slot)

    def _park_failed(self, event: ParkErrored) -> None:
        slot = self.state.finish(event.slot_id, "park")
        self.state.unload(slot, f"could not be parked ({event.failure.kind})")

    def _woken(self, event: WakeCompleted) -> None:
        """Charges the device only. Three cases: 1. replaced in the meantime: unloaded;  2. ready: all waiters are
        granted in this step;  3. and if it is being evicted, it drains after them."""
        slot = self.state.finish(event.slot_id, "wake")
        slot.host_bytes = 0
        slot.wake_s = slot.came_s = self.state.now_s - slot.load_began_at_s
        if slot.is_retired or (self.state.is_draining and not slot.waiters):
            self.state.unload(slot, slot.leaving_cause or "")  # (1)
            return
        self.state.move(slot, "ready", f"back from main memory after {slot.wake_s:.3f} s")
        slot.ready_at_s, slot.wakes = self.state.now_s, slot.wakes + 1
        become_ready(self.state, slot)  # (2), (3)

    def _wake_failed(self, event: WakeErrored) -> None:
        """Unloads the engine; the requests that wait for it have it loaded from its files, which checks it anew."""
        slot = self.state.finish(event.slot_id, "wake")
        if slot.leaving_cause == EVICTED:
            self.state.clear_preload(slot)
        if self.state.is_draining:
            self.state.fail_waiters(slot, shutting_down)
        self.state.unload(slot, f"could not be brought back from main memory ({event.failure.kind})")


def is_host_idle_evictable(slot: Slot) -> bool:
    """Tells whether a parked model may leave main memory for idleness, now or later."""
    is_free = slot.state == "parked" and slot.claim is None and not slot.is_pinned
    return is_free and slot.spec.host_keep_alive_s >= 0
