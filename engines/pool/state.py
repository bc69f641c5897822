"""The pool's state: all slots, waiters and leases, and the operations that change them.

`engines/pool/state_machine.py` (events) and `engines/pool/admission.py` (memory) decide when to use them.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping

from engines.errors import EngineError, ModelTooLarge
from engines.pool.event_details import event_details
from engines.pool.eviction import total_bytes
from engines.pool.messages import (
    Discard,
    Done,
    Effect,
    Emit,
    Fail,
    Grant,
    StartFetch,
    StartLoad,
    StartLocate,
    StartPark,
    StartUnload,
    StartWake,
    StartWarm,
)
from engines.pool.neighbours import Neighbours
from engines.pool.reasons import DAMAGED, EVICTED, cannot_be_split, too_large
from engines.pool.slot import CHARGED, EDGES, HOST_CHARGED, NO_MEMORY, MemoryNeed, PoolPolicy, Slot, Waiter, Work
from engines.spec import ModelSpec
from engines.types import State

_WORK: dict[type, Work] = {
    StartLocate: "locate", StartFetch: "fetch", Discard: "discard",
    StartLoad: "load", StartWarm: "warm", StartUnload: "unload",
    StartPark: "park", StartWake: "wake",
}  # fmt: skip


class PoolState:
    """Holds slots by id (all generations) and by model (the current one), and the effects of the step in progress.

    `neighbours`: the pools with which this one may share a model; `index`: its own among them.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        budget_bytes: int,
        rules: PoolPolicy,
        host_budget_bytes: int = 0,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.neighbours = neighbours or Neighbours()
        self.index = self.neighbours.join(self)
        self.rules = rules
        self.budget_bytes = budget_bytes
        self.host_budget_bytes = host_budget_bytes
        self.ceiling_bytes: int | None = None
        self.ceiling_until_s = 0.0
        self.is_draining = False
        self.blocked = ""
        self.now_s = 0.0
        self.slots: dict[int, Slot] = {}
        self.current: dict[str, Slot] = {}
        self.holders: dict[int, Slot] = {}
        self.effects: list[Effect] = []
        self._deadlines: list[tuple[float, int]] = []
        for spec in specs.values():
            self.add_slot(spec)

    # ---- queries ----

    def in_state(self, *states: State) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.state in states]

    def charged(self) -> list[Slot]:
        """Returns the slots with memory on the device, and copies of other pools' slots with a share of it."""
        return [slot for slot in self.slots.values() if slot.state in CHARGED] + self.neighbours.guests(self)

    def claims(self) -> list[Slot]:
        """Returns the slots that wait for memory, oldest claim first."""
        waiting = self.in_state("waiting_space")
        waiting += [slot for slot in self.in_state("parked") if slot.claim is not None]
        return sorted(waiting, key=lambda slot: slot.claim or 0)

    def host_used_bytes(self) -> int:
        """Returns the bytes that are charged to the host budget."""
        return sum(slot.host_bytes for slot in self.slots.values()) + self.neighbours.host_bytes(self)

    def holds_memory(self) -> bool:
        """Tells whether any model is in memory, on the device or parked."""
        return any(slot.state in CHARGED or slot.host_bytes for slot in self.slots.values())

    def may_park(self, slot: Slot) -> bool:
        """Tells whether a model that leaves the device may stay in main memory. Four cases:

        1. there is no host budget, the host shuts down, or it is split;  2. nobody will ask for this generation again;
        3. its files are damaged, and so are its weights perhaps;  4. it leaves for others or for idleness, or as an
        operator has it.
        """
        if not self.host_budget_bytes or self.is_draining or slot.split is not None:
            return False  # (1)
        if slot.is_retired or slot.failure is not None or slot.leaving_cause == DAMAGED:
            return False  # (2), (3)
        return slot.leaves_to == "host" or (slot.leaves_to is None and slot.leaving_cause != EVICTED)  # (4)

    def limit_bytes(self) -> int:
        """Returns the budget, or less if a valid reading shows that other processes use the device."""
        if self.ceiling_bytes is None or self.now_s >= self.ceiling_until_s:
            return self.budget_bytes
        return min(self.budget_bytes, self.ceiling_bytes)

    def is_too_large(self, need: MemoryNeed | None) -> bool:
        """Tells whether the model certainly exceeds the budget even alone; a guess never refuses a model.

        One that may be split has all budgets; `engines.pool.split_admission` knows more, once its parts are known.
        """
        if need is None:
            return False
        budget = self.budget_bytes if need.parts is None else self.neighbours.capacity_bytes()
        return all(total_bytes([form.known()]) > budget for form in need.forms)

    def too_large(self, slot: Slot) -> ModelTooLarge:
        """The error of requests for a model that is too large."""
        if slot.need is None or slot.need.parts is None:
            return too_large(slot, self.budget_bytes)
        pools = self.neighbours.pools
        devices, host = sum(pool.budget_bytes for pool in pools), sum(pool.host_budget_bytes for pool in pools)
        return ModelTooLarge(cannot_be_split(slot, devices, host))

    def expired(self) -> Iterator[tuple[Slot, int]]:
        """Yields the waiters past their deadline; drops the deadlines of requests that no longer wait."""
        while self._deadlines and (self._deadlines[0][0] <= self.now_s or self._is_stale(self._deadlines[0][1])):
            _, waiter_id = heapq.heappop(self._deadlines)
            if not self._is_stale(waiter_id):
                yield self.holders[waiter_id], waiter_id

    def next_deadline_s(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    def _is_stale(self, waiter_id: int) -> bool:
        slot = self.holders.get(waiter_id)
        return slot is None or waiter_id not in slot.waiters

    # ---- slots ----

    def add_slot(self, spec: ModelSpec) -> Slot:
        slot = Slot(slot_id=next(self.neighbours.slot_ids), spec=spec)
        self.neighbours.is_used = self.neighbours.is_used or spec.offload == "allowed"
        self.slots[slot.slot_id] = self.current[spec.model_id] = slot
        return slot

    def move(self, slot: Slot, target: State, cause: str, claimant: str | None = None, missing_bytes: int = 0) -> None:
        """Changes a slot's state, the only place that does; emits an event."""
        if target not in EDGES[slot.state]:
            raise RuntimeError(f"bug: {slot.model_id} may not go from {slot.state} to {target} ({cause})")
        emit = Emit(
            slot.slot_id, slot.model_id, "state", slot.state, target, cause, claimant,
            missing_bytes=missing_bytes, details=event_details(slot, target, self.now_s),
        )  # fmt: skip
        self.effects.append(emit)
        slot.state = target
        if target == "warming":
            slot.estimated_bytes = slot.reserved.total_bytes
        if target == "waiting_space":
            slot.claimed_at_s = self.now_s
        if target not in CHARGED:
            slot.reserved = NO_MEMORY
            self.neighbours.remove(slot)
        if target not in HOST_CHARGED:
            slot.host_bytes = 0
        if target == "retired":
            del self.slots[slot.slot_id]

    def start(self, slot: Slot, effect: Effect) -> None:
        """Starts asynchronous work; at most one task per slot."""
        if slot.work is not None:
            raise RuntimeError(f"bug: {slot.model_id} already runs {slot.work} and cannot start {effect!r}")
        slot.work = _WORK[type(effect)]
        self.effects.append(effect)

    def finish(self, slot_id: int, *work: Work) -> Slot:
        """Marks the slot's asynchronous work as done; returns the slot."""
        slot = self.slots[slot_id]
        if slot.work not in work:
            raise RuntimeError(f"bug: {slot.model_id} runs {slot.work}, but {'/'.join(work)} ended")
        slot.work = None
        return slot

    def retire(self, slot: Slot) -> None:
        """Removes a slot without memory or work; completes its evictions."""
        self.move(slot, "retired", slot.leaving_cause or "replaced")
        self.notify_evictors(slot)

    def drain(self, slot: Slot, cause: str, claimant: str | None = None, missing_bytes: int = 0) -> None:
        """Stops granting leases on the slot; unloads it in this step if it has none."""
        self.move(slot, "draining", cause, claimant, missing_bytes)
        slot.leaving_cause, slot.leaving_for = cause, claimant
        self.unload_if_free(slot)

    def unload_if_free(self, slot: Slot) -> None:
        """Unloads a draining model once it has no leases; one that may be parked is left to
        `engines.pool.parking`, which acts in the same step."""
        if slot.state == "draining" and not slot.leases and not self.may_park(slot):
            self._count_eviction(slot)
            self.unload(slot, slot.leaving_cause or "")

    def park(self, slot: Slot) -> None:
        """Starts to move a draining model without leases to main memory; until that is done, both budgets are
        charged."""
        self._count_eviction(slot)
        self.move(slot, "parking", slot.leaving_cause or "", slot.leaving_for)
        slot.host_bytes = slot.reserved.weight_bytes
        self.start(slot, StartPark(slot.slot_id))

    def _count_eviction(self, slot: Slot) -> None:
        slot.evictions += 1
        slot.evicted_for = slot.leaving_for
        if slot.leaving_cause == EVICTED:
            slot.operator_pin = False  # not earlier: a cancelled eviction keeps the pin

    def unload(self, slot: Slot, cause: str) -> None:
        """Starts to free the engine; its bytes stay charged until `UnloadCompleted`."""
        self.move(slot, "unloading", cause, slot.leaving_for)
        self.start(slot, StartUnload(slot.slot_id))

    # ---- claims, waiters, leases ----

    def make_claim(self, slot: Slot) -> None:
        """Puts the slot in the queue for memory; cancelled requests do not remove it."""
        if slot.claim is None:
            slot.claim = next(self.neighbours.claims)
            slot.claimed_at_s = self.now_s

    def drop_claim(self, slot: Slot, cause: str) -> None:
        slot.claim, slot.is_wanted = None, False
        if slot.state == "waiting_space":
            self.move(slot, "cold", cause)

    def clear_preload(self, slot: Slot) -> None:
        """Drops pin and preload for an operator's eviction; keeps the claim only if requests wait."""
        slot.operator_pin = slot.is_wanted = False
        if not slot.waiters:
            self.drop_claim(slot, EVICTED)

    def add_waiter(self, slot: Slot, waiter: Waiter) -> None:
        slot.waiters[waiter.waiter_id] = waiter
        self.holders[waiter.waiter_id] = slot
        if waiter.deadline_s != float("inf"):
            heapq.heappush(self._deadlines, (waiter.deadline_s, waiter.waiter_id))

    def grant(self, slot: Slot, waiter: Waiter) -> None:
        if waiter.keep_alive_s is not None:
            slot.keep_alive_override_s = waiter.keep_alive_s
        slot.leases.add(waiter.waiter_id)
        slot.last_used_at_s = self.now_s
        self.holders[waiter.waiter_id] = slot
        self.effects.append(Grant(waiter.waiter_id, slot.slot_id))

    def grant_all(self, slot: Slot) -> None:
        """Grants all waiters, in the step that made the slot ready.

        Granted later, they could find the model evicted for the next claim.
        """
        waiters, slot.waiters = slot.waiters, {}
        for waiter in waiters.values():
            self.grant(slot, waiter)

    def end_lease(self, slot: Slot, waiter_id: int) -> None:
        slot.leases.remove(waiter_id)
        slot.last_used_at_s = self.now_s
        del self.holders[waiter_id]

    def fail(self, slot: Slot, waiter_id: int, error: EngineError) -> None:
        del slot.waiters[waiter_id], self.holders[waiter_id]
        self.effects.append(Fail(waiter_id, error))

    def fail_waiters(self, slot: Slot, make_error: Callable[[], EngineError]) -> None:
        """Fails all waiters, each with its own error object; a shared one would collect all callers' tracebacks."""
        for waiter_id in list(slot.waiters):
            self.fail(slot, waiter_id, make_error())

    def notify_evictors(self, slot: Slot) -> None:
        for waiter_id in slot.evictors:
            del self.holders[waiter_id]
            self.effects.append(Done(waiter_id))
        slot.evictors = set()

    def fail_evictors(self, slot: Slot, make_error: Callable[[], EngineError]) -> None:
        """Fails all pending evictions of the slot."""
        for waiter_id in slot.evictors:
            del self.holders[waiter_id]
            self.effects.append(Fail(waiter_id, make_error()))
        slot.evictors = set()
