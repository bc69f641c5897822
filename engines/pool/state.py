"""The pool's memory: all slots, who waits, who holds a lease. Every change of a slot goes through here.

Small verbs only; when to use them is decided in `engines/pool/state_machine.py` (events) and
`engines/pool/admission.py` (room).
"""

import heapq
from collections.abc import Callable, Iterator, Mapping

from engines.errors import EngineError
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
    StartUnload,
    StartWarm,
    event_details,
)
from engines.pool.reasons import EVICTED
from engines.pool.slot import CHARGED, EDGES, NO_MEMORY, MemoryNeed, PoolPolicy, Slot, Waiter, Work
from engines.spec import ModelSpec
from engines.types import State

_WORK: dict[type, Work] = {
    StartLocate: "locate", StartFetch: "fetch", Discard: "discard",
    StartLoad: "load", StartWarm: "warm", StartUnload: "unload",
}  # fmt: skip


class PoolState:
    """Slots by id (all generations) and by model (the current one), and the effects of the step in progress."""

    def __init__(self, specs: Mapping[str, ModelSpec], budget_bytes: int, rules: PoolPolicy) -> None:
        self.rules = rules
        self.budget_bytes = budget_bytes
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
        self._next_slot = 0
        self._next_claim = 0
        for spec in specs.values():
            self.add_slot(spec)

    # ---- looking ----

    def in_state(self, *states: State) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.state in states]

    def charged(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.state in CHARGED]

    def claims(self) -> list[Slot]:
        """Those that wait for memory, oldest first."""
        return sorted(self.in_state("waiting_space"), key=lambda slot: slot.claim or 0)

    def limit_bytes(self) -> int:
        """The budget, or less while a fresh reading says that others use the device."""
        if self.ceiling_bytes is None or self.now_s >= self.ceiling_until_s:
            return self.budget_bytes
        return min(self.budget_bytes, self.ceiling_bytes)

    def is_too_large(self, need: MemoryNeed | None) -> bool:
        """Known for certain not to fit even alone; a guess never refuses a model."""
        return need is not None and total_bytes([need.known()]) > self.budget_bytes

    def expired(self) -> Iterator[tuple[Slot, int]]:
        """Waiters whose patience has ended; forgets the deadlines of those that left."""
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
        slot = Slot(slot_id=self._next_slot, spec=spec)
        self._next_slot += 1
        self.slots[slot.slot_id] = self.current[spec.model_id] = slot
        return slot

    def move(self, slot: Slot, target: State, cause: str, claimant: str | None = None, missing_bytes: int = 0) -> None:
        """The one place where a slot's state changes; every change is an event."""
        if target not in EDGES[slot.state]:
            raise RuntimeError(f"bug: {slot.model_id} may not go from {slot.state} to {target} ({cause})")
        emit = Emit(
            slot.slot_id, slot.model_id, "state", slot.state, target, cause, claimant,
            missing_bytes=missing_bytes, facts=event_details(slot, target, self.now_s),
        )  # fmt: skip
        self.effects.append(emit)
        slot.state = target
        if target == "warming":
            slot.estimated_bytes = slot.reserved.total_bytes
        if target == "waiting_space":
            slot.claimed_at_s = self.now_s
        if target not in CHARGED:
            slot.reserved = NO_MEMORY
        if target == "retired":
            del self.slots[slot.slot_id]

    def start(self, slot: Slot, effect: Effect) -> None:
        """Outside work begins; at most one piece for a slot."""
        if slot.work is not None:
            raise RuntimeError(f"bug: {slot.model_id} has {slot.work} under way and cannot start {effect!r}")
        slot.work = _WORK[type(effect)]
        self.effects.append(effect)

    def finish(self, slot_id: int, *work: Work) -> Slot:
        """The slot whose outside work has just ended."""
        slot = self.slots[slot_id]
        if slot.work not in work:
            raise RuntimeError(f"bug: {slot.model_id} has {slot.work} under way, but {'/'.join(work)} ended")
        slot.work = None
        return slot

    def retire(self, slot: Slot) -> None:
        """Last stop of a slot without memory or work; those who wait for it to go are told."""
        self.move(slot, "retired", slot.leaving_cause or "replaced")
        self.notify_evictors(slot)

    def drain(self, slot: Slot, cause: str, claimant: str | None = None, missing_bytes: int = 0) -> None:
        """No new leases from now on; freed in this same step when there are none."""
        self.move(slot, "draining", cause, claimant, missing_bytes)
        slot.leaving_cause, slot.leaving_for = cause, claimant
        self.unload_if_free(slot)

    def unload_if_free(self, slot: Slot) -> None:
        if slot.state == "draining" and not slot.leases:
            slot.evictions += 1
            slot.evicted_for = slot.leaving_for
            if slot.leaving_cause == EVICTED:
                slot.operator_pin = False  # not before: an eviction that is given up leaves the pin
            self.unload(slot, slot.leaving_cause or "")

    def unload(self, slot: Slot, cause: str) -> None:
        """The bytes stay charged until the shell says that they are free."""
        self.move(slot, "unloading", cause, slot.leaving_for)
        self.start(slot, StartUnload(slot.slot_id))

    # ---- claims, waiters, leases ----

    def make_claim(self, slot: Slot) -> None:
        """A place in the queue for memory, kept whoever leaves."""
        if slot.claim is None:
            slot.claim = self._next_claim
            self._next_claim += 1

    def drop_claim(self, slot: Slot, cause: str) -> None:
        slot.claim, slot.is_wanted = None, False
        if slot.state == "waiting_space":
            self.move(slot, "cold", cause)

    def forget_wishes(self, slot: Slot) -> None:
        """An operator wants the model away: it comes back for those who wait, and for nobody else."""
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
        """In the step that made the slot ready, or the next claim would evict it before its waiters wake."""
        waiters, slot.waiters = slot.waiters, {}
        for waiter in waiters.values():
            self.grant(slot, waiter)

    def give_back(self, slot: Slot, waiter_id: int) -> None:
        slot.leases.remove(waiter_id)
        slot.last_used_at_s = self.now_s
        del self.holders[waiter_id]

    def fail(self, slot: Slot, waiter_id: int, error: EngineError) -> None:
        del slot.waiters[waiter_id], self.holders[waiter_id]
        self.effects.append(Fail(waiter_id, error))

    def fail_waiters(self, slot: Slot, make_error: Callable[[], EngineError]) -> None:
        """Everyone gets an error of their own: a shared one would gather every caller's traceback."""
        for waiter_id in list(slot.waiters):
            self.fail(slot, waiter_id, make_error())

    def notify_evictors(self, slot: Slot) -> None:
        for waiter_id in slot.evictors:
            del self.holders[waiter_id]
            self.effects.append(Done(waiter_id))
        slot.evictors = set()

    def fail_evictors(self, slot: Slot, make_error: Callable[[], EngineError]) -> None:
        """Their eviction will not be."""
        for waiter_id in slot.evictors:
            del self.holders[waiter_id]
            self.effects.append(Fail(waiter_id, make_error()))
        slot.evictors = set()
