"""Decides which model gets memory next and which models are evicted for it. Synchronous, no clock, no I/O.

The pool calls `assign` after every event. It walks all slots and starts what can start, so that event handlers need
not track which models they unblock.
"""

from copy import copy
from functools import partial

from engines.errors import EngineError, OutOfMemory
from engines.pool.eviction import (
    can_be_victim,
    charges,
    choose_form,
    choose_victims,
    deficit_bytes,
    may_pass,
    missing_bytes,
    never_fits,
    total_bytes,
    without_leaving,
)
from engines.pool.flex import is_patient, is_spared, patience_deadlines, patient_last
from engines.pool.messages import ArmTimer, ReadMemory, StartLoad, StartLocate, StartWake
from engines.pool.neighbour_messages import NeighbourEvicts
from engines.pool.parking import Parking, is_host_idle_evictable
from engines.pool.reasons import IDLE, blocked_by_others, blocked_by_pinned, eviction_cause, load_hangs, still_loading
from engines.pool.slot import CHARGED, NO_MEMORY, MemoryNeed, Slot
from engines.pool.split_admission import SplitAdmission, evict
from engines.pool.splitting import must_split, pinned, pools_of, target, visitors
from engines.pool.state import PoolState
from engines.pool.victim_order import victim_order
from engines.types import format_bytes


def next_deadlines(state: PoolState, deficit_since_s: float | None) -> list[float]:
    """Returns all future times at which `assign` may act without an event.

    `deficit_since_s`: since when memory is over the budget, None if it is not.
    """
    found = [slot.retry_at_s for slot in state.in_state("failed") if slot.is_wanted]
    ready = state.in_state("ready")
    found += [slot.idle_at_s for slot in ready if is_idle_evictable(slot)]
    found += [slot.host_idle_at_s for slot in state.in_state("parked") if is_host_idle_evictable(slot)]
    deadline_s = state.next_deadline_s()
    if deadline_s is not None:
        found.append(deadline_s)
    claims = state.claims()
    ready += [slot for slot in state.neighbours.guests(state) if slot.state == "ready"]
    found += [at_s for slot in claims if must_split(state, slot) for at_s in neighbour_deadlines(state, slot)]
    if claims:
        oldest = patient_last(claims, state.rules, state.now_s)[0]
        found += [oldest.claimed_at_s + state.rules.overdue_after_s, state.ceiling_until_s, *patience_deadlines(state)]
    if deficit_since_s is not None:
        found.append(deficit_since_s + state.rules.overdue_after_s)
    if claims or deficit_since_s is not None:
        found += [slot.evictable_from_s(state.rules) for slot in ready if not slot.is_pinned]
    return [at_s for at_s in found if at_s > state.now_s]


def neighbour_deadlines(state: PoolState, slot: Slot) -> list[float]:
    """Returns the times at which memory of other pools may become free for a split claim without an event."""
    found = []
    for pool in pools_of(state, slot):
        found += [other.evictable_from_s(pool.rules) for other in pool.charged() if other.state == "ready"]
        found += [other.parked_at_s + pool.rules.min_residency_s for other in pool.in_state("parked")]
        found.append(pool.ceiling_until_s)
    return found


def is_idle_evictable(slot: Slot) -> bool:
    """Tells whether the model may be evicted for idleness, now or later."""
    return slot.state == "ready" and not slot.leases and not slot.is_pinned and slot.keep_alive_s >= 0


class Admission:
    """Manages the queue for memory of one device. `is_fresh`: the device was read in this step."""

    def __init__(self, state: PoolState) -> None:
        self.state = state
        self.parking = Parking(state)
        self.splits = SplitAdmission(state, self.read)
        self.is_fresh = False
        self._is_reading = False
        self._is_contested = False
        self._deficit_since_s: float | None = None
        self._armed_at_s: float | None = None

    def on_reading(self) -> None:
        self.is_fresh, self._is_reading = True, False

    def on_tick(self) -> None:
        """Forgets the timer that fired, perhaps slightly early: it must be armed again even for the same time."""
        self._armed_at_s = None

    def may_unblock_others(self, slot: Slot) -> bool:
        """Tells whether the end of this slot's last lease can affect other models; if not, `assign` is skipped.

        A model's idle time needs no new timer while an earlier one is armed: that one arms the next.
        """
        if slot.state != "ready" or self._is_contested or slot.split is not None:
            return True
        return is_idle_evictable(slot) and (self._armed_at_s is None or self._armed_at_s > slot.idle_at_s)

    def assign(self) -> None:
        """Applies elapsed time and free memory to all slots, in order of precedence.

        While a load hangs, nothing can be loaded or freed, so no model is evicted and ready models go on serving.
        """
        self._fail_expired_waiters()
        self._fail_blocked_waiters()
        self._end_quarantines()
        if not self.state.blocked:
            self._evict_idle()
            self.parking.evict_idle()
        self._start_fetches()
        self._queue_for_space()
        if not self.state.blocked:
            self._reduce_deficit()
            self._free_oversized()
            self._serve_claims()
            self.parking.reduce_deficit()
        self.parking.place()
        self._arm_timer()
        is_asked = bool(self.state.claims()) or self.state.neighbours.is_involved()
        self._is_contested = is_asked or self._deficit_since_s is not None
        self.is_fresh = False

    # ---- time ----

    def _fail_expired_waiters(self) -> None:
        for slot, waiter_id in self.state.expired():
            self.state.fail(slot, waiter_id, still_loading(slot))

    def _fail_blocked_waiters(self) -> None:
        """Fails waiters while a load hangs, except those of models that warm up: their load is complete."""
        for slot in self.state.slots.values() if self.state.blocked else ():
            if slot.state != "warming":
                self.state.fail_waiters(slot, partial(load_hangs, slot, self.state.blocked))

    def _end_quarantines(self) -> None:
        """Retries failed models that were preloaded; other models wait for the next request."""
        for slot in self.state.in_state("failed"):
            if slot.is_wanted and self.state.now_s >= slot.retry_at_s:
                end_quarantine(self.state, slot, "quarantine ended")
                self.state.make_claim(slot)

    def _evict_idle(self) -> None:
        for slot in self.state.in_state("ready"):
            if is_idle_evictable(slot) and self.state.now_s >= slot.idle_at_s:
                self.state.drain(slot, f"{IDLE} of {slot.keep_alive_s:g} s")

    # ---- files ----

    def _start_fetches(self) -> None:
        """Starts downloads, one per model: a new generation waits until the download of the old one has ended."""
        busy = {slot.model_id for slot in self.state.in_state("fetching")}
        for slot in self.state.in_state("absent"):
            if slot.claim is not None and slot.work is None and slot.model_id not in busy:
                self.state.move(slot, "fetching", "requested")
                self.state.start(slot, StartLocate(slot.slot_id, slot.spec))

    def _queue_for_space(self) -> None:
        for slot in self.state.in_state("cold"):
            if slot.claim is not None:
                self.state.move(slot, "waiting_space", "requested")

    # ---- memory ----

    def need(self, slot: Slot) -> MemoryNeed:
        """Returns the bytes to charge for a load: guesses are capped to the budget that pinned models leave."""
        return self._form(slot)[1]

    def _form(self, slot: Slot) -> tuple[int, MemoryNeed]:
        """Returns the form that a load would take now, and its bytes."""
        if slot.state == "parked":
            return slot.form, slot.measured
        share = self.splits.need_here(slot)
        if share is not None:
            return 0, share
        available_bytes = self.state.budget_bytes - total_bytes(charges(self._pinned()))
        return choose_form(slot.need or NO_MEMORY, self.state.charged(), available_bytes, self.state.limit_bytes())

    def _pinned(self) -> list[Slot]:
        return pinned(self.state)

    def _reduce_deficit(self) -> None:
        """Evicts models, by the usual rules, while measured models exceed the budget."""
        if deficit_bytes(self.state.charged(), self.state.budget_bytes) == 0:
            self._deficit_since_s = None
            return
        if self._deficit_since_s is None:
            self._deficit_since_s = self.state.now_s
        is_overdue = self.state.now_s >= self._deficit_since_s + self.state.rules.overdue_after_s
        self._free_memory(NO_MEMORY, None, self.state.budget_bytes, is_overdue=is_overdue)

    def _free_oversized(self) -> None:
        """Unloads parked models whose form cannot fit any more where another one, from disk, can."""
        immovable, budget_bytes = self._pinned(), self.state.budget_bytes
        for slot in self.state.in_state("parked"):
            need = slot.need or NO_MEMORY
            is_stuck = slot.claim is not None and never_fits(slot.measured, immovable, budget_bytes)
            if is_stuck and not never_fits(need, immovable, budget_bytes):
                self.state.unload(slot, "does not fit any more in the dtype that it is parked in")

    def _serve_claims(self) -> None:
        """Admits claims, oldest first, patient ones last (`engines/pool/flex.py`). Five cases:

        1. a claim that can never fit beside the pinned models is refused, whatever its position;
        2. while a model loads or warms up, no other load starts: its true size is not known yet;
        3. a claim that does not fit because of other processes, whatever is evicted, waits for their memory and does
           not hold up younger claims; its waiters that another host can serve fail and move there;
        4. the oldest other claim is admitted if it fits; else models are evicted for it;
        5. a younger claim passes if it fits now and delays no older one.
        """
        claims = patient_last(self._servable_claims(), self.state.rules, self.state.now_s)
        if not claims or any(slot.state in ("loading", "warming") for slot in self.state.charged()):  # (2)
            return
        if self._serve(claims[0]):
            return  # (4)
        passing = next((slot for at, slot in enumerate(claims) if at and self._may_pass(slot, claims[:at])), None)
        if passing is not None:
            self._admit(passing)  # (5)

    def _servable_claims(self) -> list[Slot]:
        """Returns the claims that what is freed here can serve, oldest first, with those of other pools that are split;
        deals with the others."""
        immovable, limit = self._pinned(), self.state.limit_bytes()
        claims = []
        for slot in self.state.claims():
            if must_split(self.state, slot):
                is_held = target(self.state, slot) is None
                error = self.splits.refusal(slot) if is_held else None  # what fits now fits the budgets too
                if error is not None:
                    self._refuse(slot, error)  # (1)
                    continue
            elif never_fits(slot.claimed_need, immovable, self.state.budget_bytes):
                message = blocked_by_pinned(slot, total_bytes(charges(immovable)), self.state.budget_bytes)
                self._refuse(slot, OutOfMemory(message, stage="load"))  # (1)
                continue
            else:
                is_held = missing_bytes(immovable, self.need(slot), limit) > 0
            if is_held:
                self._redirect_waiters(slot, limit)  # (3)
            else:
                claims.append(slot)
        others = visitors(self.state) if claims else []  # alone they are served in their pools
        return sorted([*claims, *others], key=lambda slot: slot.claim or 0)

    def _serve(self, head: Slot) -> bool:
        """Admits the oldest claim or frees memory for it; returns whether it was admitted. One of another pool is
        served there."""
        if head.home is not None:
            return False
        is_overdue = self.state.now_s >= head.claimed_at_s + self.state.rules.overdue_after_s
        if must_split(self.state, head):
            return self.splits.serve(head, is_overdue=is_overdue)
        is_free = self._free_memory(self.need(head), head, self.state.limit_bytes(), is_overdue=is_overdue)
        if is_free:
            self._admit(head)
        return is_free

    def _free_memory(self, need: MemoryNeed, claimant: Slot | None, limit: int, *, is_overdue: bool) -> bool:
        """Returns whether `need` fits now; if not, evicts models if that makes it fit. Five cases:

        1. it fits;
        2. it will fit when the models that are draining or unloading are free: wait for them;
        3. evicting idle models suffices: they are evicted; for a patient claim, those that are idle for long;
        4. the claim is overdue, and evicting idle and busy models suffices: they get no new leases and drain;
        5. nothing suffices yet: no model is evicted.
        """
        charged = self.state.charged()
        if missing_bytes(charged, need, limit) == 0:
            return True  # (1)
        staying = without_leaving(charged)
        if missing_bytes(staying, need, limit) == 0:
            return False  # (2)
        order = victim_order(self.state)
        is_polite = claimant is not None and is_patient(claimant, self.state.rules, self.state.now_s)
        victims = choose_victims(staying, self._candidates(even_leased=False, is_polite=is_polite), need, limit, order)
        if victims is None and is_overdue and not is_polite:
            victims = choose_victims(staying, self._candidates(even_leased=True), need, limit, order)  # (4)
        if victims and claimant is not None and self.state.now_s >= self.state.ceiling_until_s:
            self.read()  # the reading is old: other processes may hold the memory, and the evictions would be in vain
            return False
        missing = missing_bytes(staying, need, limit)
        for victim in victims or ():  # (5)
            self._evict(victim, claimant, need, missing)
        return False

    def _candidates(self, *, even_leased: bool, is_polite: bool = False) -> list[Slot]:
        state = self.state
        return [
            slot
            for slot in (*state.slots.values(), *state.neighbours.guests(state))
            if can_be_victim(slot, state.rules, state.now_s, even_leased=even_leased)
            and not (is_polite and is_spared(slot, state.rules, state.now_s))
        ]

    def _evict(self, victim: Slot, claimant: Slot | None, need: MemoryNeed, missing: int) -> None:
        """Evicts one victim.

        If the claimant was last evicted for this victim, the two take turns, and more memory would end the thrashing.
        """
        home = self.state.index if victim.home is None else victim.home
        if claimant is None:
            cause = f"memory is over the budget by {format_bytes(missing)}"
            evict(self.state, home, NeighbourEvicts(victim.slot_id, cause))
            return
        is_turn = claimant.evicted_for == victim.model_id
        cause = eviction_cause(claimant, need, missing, is_turn=is_turn)
        event = NeighbourEvicts(victim.slot_id, cause, claimant.model_id, missing if is_turn else 0)
        evict(self.state, home, event)

    def _may_pass(self, slot: Slot, older: list[Slot]) -> bool:
        if slot.home is not None or must_split(self.state, slot):
            return False  # it would have to delay no claim on several devices
        need = self.need(slot)
        if missing_bytes(self.state.charged(), need, self.state.limit_bytes()) > 0:
            return False
        since_s = min(other.claimed_at_s for other in older)
        stayers = [other for other in self.state.charged() if other.is_pinned or other.load_began_at_s >= since_s]
        if not may_pass(need, [self.need(other) for other in older], stayers, self.state.limit_bytes()):
            return False
        return not self._takes_reserved_memory(need, self.need(older[0]))

    def _takes_reserved_memory(self, need: MemoryNeed, head: MemoryNeed) -> bool:
        """Tells whether evictions in progress make the oldest claim fit, and `need` would take that memory from it."""
        staying, limit = without_leaving(self.state.charged()), self.state.limit_bytes()
        is_on_its_way = missing_bytes(staying, head, limit) == 0
        return is_on_its_way and not may_pass(need, [head], staying, limit)

    def _admit(self, slot: Slot) -> None:
        """Starts a load if the device was read in this step, else requests a reading: other processes use it too."""
        if not self.is_fresh:
            self.read()
            return
        if slot.state == "parked":
            self._wake(slot)
            return
        if slot.files is None:
            raise RuntimeError(f"bug: {slot.model_id} waits for space without files")
        slot.form, need = self._form(slot)
        form = f" in {slot.loaded_spec.dtype}" if slot.spec.smaller_dtypes else ""
        self.state.move(slot, "loading", f"{format_bytes(need.total_bytes)} admitted{form}")
        slot.reserved, slot.load_began_at_s = need, self.state.now_s
        self.state.start(slot, StartLoad(slot.slot_id, slot.loaded_spec, slot.files, need))

    def _wake(self, slot: Slot) -> None:
        """Charges device memory to a parked model and starts to bring it back; until then both budgets are charged."""
        self.state.move(slot, "waking", f"{format_bytes(slot.measured.total_bytes)} admitted")
        slot.reserved, slot.load_began_at_s = slot.measured, self.state.now_s
        self.state.start(slot, StartWake(slot.slot_id))

    def read(self) -> None:
        """Requests a reading of the device, unless one is in progress. The result is an event."""
        if not self._is_reading:
            self._is_reading = True
            self.state.effects.append(ReadMemory())

    def _refuse(self, slot: Slot, error: EngineError) -> None:
        """Refuses a claim that cannot fit until an operator unpins a model or raises the budget."""
        self.state.fail_waiters(slot, partial(copy, error))
        self.state.drop_claim(slot, str(error))

    def _redirect_waiters(self, slot: Slot, limit_bytes: int) -> None:
        """Fails the waiters that another host can serve.

        Drops the claim if none is left, as it would delay other models later.
        """
        moving = [waiter_id for waiter_id, waiter in slot.waiters.items() if waiter.may_move]
        message = blocked_by_others(slot, self.need(slot), limit_bytes)
        for waiter_id in moving:
            self.state.fail(slot, waiter_id, OutOfMemory(message, stage="load"))
        if moving and not slot.waiters and not slot.is_wanted:
            self.state.drop_claim(slot, message)

    # ---- timer ----

    def _arm_timer(self) -> None:
        at_s = min(next_deadlines(self.state, self._deficit_since_s), default=None)
        if at_s != self._armed_at_s:
            self._armed_at_s = at_s
            self.state.effects.append(ArmTimer(at_s))


def end_quarantine(state: PoolState, slot: Slot, cause: str) -> None:
    """Ends a quarantine; the next attempt may again retry once after each kind of failure."""
    slot.had_oom = slot.had_refetch = False
    state.move(slot, "cold" if slot.files else "absent", cause)


def claimed_bytes(state: PoolState) -> int:
    """Sums the weights of claims that are not charged yet.

    Placement counts them; otherwise a burst of requests would over-commit one host.
    """
    return sum(
        s.claimed_need.weight_bytes for s in state.slots.values() if s.claim is not None and s.state not in CHARGED
    )
