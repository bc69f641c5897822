"""Who gets memory, and at whose cost: what the pool looks at after every event. Synchronous, no clock, no I/O.

`assign` walks everything and starts what can start, so that no event handler needs to know whom it unblocked.
"""

from functools import partial

from engines.errors import OutOfMemory
from engines.pool.eviction import (
    can_be_victim,
    charges,
    choose_victims,
    deficit_bytes,
    may_pass,
    missing_bytes,
    never_fits,
    total_bytes,
    without_leaving,
)
from engines.pool.messages import ArmTimer, ReadMemory, StartLoad, StartLocate
from engines.pool.reasons import IDLE, held_by_others, kept_out, load_hangs, makes_room, still_loading
from engines.pool.slot import CHARGED, NO_MEMORY, MemoryNeed, Slot
from engines.pool.state import PoolState
from engines.types import format_bytes


def next_deadlines(state: PoolState, deficit_since_s: float | None) -> list[float]:
    """Every such moment that is still to come; `deficit_since_s`: since when memory is over the budget."""
    found = [slot.retry_at_s for slot in state.in_state("failed") if slot.is_wanted]
    ready = state.in_state("ready")
    found += [slot.idle_at_s for slot in ready if is_idle_evictable(slot)]
    deadline_s = state.next_deadline_s()
    if deadline_s is not None:
        found.append(deadline_s)
    claims = state.claims()
    if claims:
        found += [claims[0].claimed_at_s + state.rules.patience_s, state.ceiling_until_s]
    if deficit_since_s is not None:
        found.append(deficit_since_s + state.rules.patience_s)
    if claims or deficit_since_s is not None:
        found += [slot.evictable_from_s(state.rules) for slot in ready if not slot.is_pinned]
    return [at_s for at_s in found if at_s > state.now_s]


def is_idle_evictable(slot: Slot) -> bool:
    """Whether idleness alone may end its stay, now or later."""
    return slot.state == "ready" and not slot.leases and not slot.is_pinned and slot.keep_alive_s >= 0


class Admission:
    """The queue for memory of one device. `is_fresh`: the device was read in this very step."""

    def __init__(self, state: PoolState) -> None:
        self.state = state
        self.is_fresh = False
        self._is_reading = False
        self._is_contested = False
        self._deficit_since_s: float | None = None
        self._armed_at_s: float | None = None

    def on_reading(self) -> None:
        self.is_fresh, self._is_reading = True, False

    def on_tick(self) -> None:
        """The timer rang, perhaps a little early: it must be set again even for the same moment."""
        self._armed_at_s = None

    def may_unblock_others(self, slot: Slot) -> bool:
        """Whether anything could follow from the end of this slot's last lease: the warm path ends here if not.

        A model's idle time needs no new timer while one rings earlier: what that one sees sets the next.
        """
        if slot.state != "ready" or self._is_contested:
            return True
        return is_idle_evictable(slot) and (self._armed_at_s is None or self._armed_at_s > slot.idle_at_s)

    def assign(self) -> None:
        """Let time and room have their effect: the order below is the order of precedence.

        While nothing can be loaded or freed, nobody leaves: who is in memory serves on.
        """
        self._end_patience()
        self._end_hopeless_waits()
        self._end_quarantines()
        if not self.state.blocked:
            self._evict_idle()
        self._start_fetches()
        self._queue_for_space()
        if not self.state.blocked:
            self._pay_deficit()
            self._serve_claims()
        self._arm_timer()
        self._is_contested = bool(self.state.claims()) or self._deficit_since_s is not None
        self.is_fresh = False

    # ---- time ----

    def _end_patience(self) -> None:
        for slot, waiter_id in self.state.expired():
            self.state.fail(slot, waiter_id, still_loading(slot))

    def _end_hopeless_waits(self) -> None:
        """While nothing can be loaded, only what warms up can be waited for: its load is over."""
        for slot in self.state.slots.values() if self.state.blocked else ():
            if slot.state != "warming":
                self.state.fail_waiters(slot, partial(load_hangs, slot, self.state.blocked))

    def _end_quarantines(self) -> None:
        """A failed model that was asked to reside is tried again unasked; others wait for the next request."""
        for slot in self.state.in_state("failed"):
            if slot.is_wanted and self.state.now_s >= slot.retry_at_s:
                end_quarantine(self.state, slot, "the quarantine is over")
                self.state.make_claim(slot)

    def _evict_idle(self) -> None:
        for slot in self.state.in_state("ready"):
            if is_idle_evictable(slot) and self.state.now_s >= slot.idle_at_s:
                self.state.drain(slot, f"{IDLE} of {slot.keep_alive_s:g} s")

    # ---- files ----

    def _start_fetches(self) -> None:
        """One fetch per model: a new generation waits until the old one's download has ended."""
        busy = {slot.model_id for slot in self.state.in_state("fetching")}
        for slot in self.state.in_state("absent"):
            if slot.claim is not None and slot.work is None and slot.model_id not in busy:
                self.state.move(slot, "fetching", "wanted")
                self.state.start(slot, StartLocate(slot.slot_id, slot.spec))

    def _queue_for_space(self) -> None:
        for slot in self.state.in_state("cold"):
            if slot.claim is not None:
                self.state.move(slot, "waiting_space", "wanted")

    # ---- room ----

    def need(self, slot: Slot) -> MemoryNeed:
        """What to charge for a load: guesses are cut to what the pinned models leave."""
        pinned = self._immovable()
        return (slot.need or NO_MEMORY).capped(self.state.budget_bytes - total_bytes(charges(pinned)))

    def _immovable(self) -> list[Slot]:
        """Pinned and measured; one that still loads is charged by a guess, which must not refuse anybody."""
        return [slot for slot in self.state.in_state("ready") if slot.is_pinned]

    def _pay_deficit(self) -> None:
        """A model measured larger than estimated: others make room for what it already holds, by the same rules."""
        if deficit_bytes(self.state.charged(), self.state.budget_bytes) == 0:
            self._deficit_since_s = None
            return
        if self._deficit_since_s is None:
            self._deficit_since_s = self.state.now_s
        is_overdue = self.state.now_s >= self._deficit_since_s + self.state.rules.patience_s
        self._make_room(NO_MEMORY, None, self.state.budget_bytes, is_overdue=is_overdue)

    def _serve_claims(self) -> None:
        """Oldest first. Five cases:

        1. a claim that can never fit beside the pinned models is refused, whatever its place;
        2. while a model loads, nobody else starts: its true size is not known yet;
        3. a claim that other processes keep out, whoever of ours left, waits for them, and nobody waits for it; of
           its waiters those that another host could take are sent there;
        4. the oldest of the rest makes room for itself;
        5. a younger one passes when it fits now and delays no older one.
        """
        immovable, limit = self._immovable(), self.state.limit_bytes()
        claims = []
        for slot in self.state.claims():
            if never_fits(slot.need or NO_MEMORY, immovable, self.state.budget_bytes):
                self._refuse(slot)  # (1)
            elif missing_bytes(immovable, self.need(slot), limit) > 0:
                self._send_on(slot, limit)  # (3)
            else:
                claims.append(slot)
        if not claims or self.state.in_state("loading", "warming"):  # (2)
            return
        head = claims[0]
        is_overdue = self.state.now_s >= head.claimed_at_s + self.state.rules.patience_s
        if self._make_room(self.need(head), head, limit, is_overdue=is_overdue):
            self._admit(head)  # (4)
            return
        passing = next((slot for at, slot in enumerate(claims) if at and self._may_pass(slot, claims[:at])), None)
        if passing is not None:
            self._admit(passing)  # (5)

    def _make_room(self, need: MemoryNeed, claimant: Slot | None, limit: int, *, is_overdue: bool) -> bool:
        """Whether `need` fits now; if not, sees to it that it will. Five cases:

        1. it fits;
        2. it will fit when those that are leaving have left: wait for them;
        3. idle victims suffice: they leave;
        4. the claim is overdue, and idle and busy victims suffice: they get no new leases and drain;
        5. nothing suffices yet: nobody leaves.
        """
        charged = self.state.charged()
        if missing_bytes(charged, need, limit) == 0:
            return True  # (1)
        staying = without_leaving(charged)
        if missing_bytes(staying, need, limit) == 0:
            return False  # (2)
        victims = choose_victims(staying, self._candidates(even_leased=False), need, limit)  # (3)
        if victims is None and is_overdue:
            victims = choose_victims(staying, self._candidates(even_leased=True), need, limit)  # (4)
        if victims and claimant is not None and self.state.now_s >= self.state.ceiling_until_s:
            self._read()  # others may have taken the device meanwhile, and then these would leave in vain
            return False
        missing = missing_bytes(staying, need, limit)
        for victim in victims or ():  # (5)
            self._evict(victim, claimant, need, missing)
        return False

    def _candidates(self, *, even_leased: bool) -> list[Slot]:
        state = self.state
        return [
            slot
            for slot in state.slots.values()
            if can_be_victim(slot, state.rules, state.now_s, even_leased=even_leased)
        ]

    def _evict(self, victim: Slot, claimant: Slot | None, need: MemoryNeed, missing: int) -> None:
        """Taking turns is when the claimant itself last left for this victim: more memory would end it."""
        if claimant is None:
            self.state.drain(victim, f"memory is over the budget by {format_bytes(missing)}")
            return
        is_turn = claimant.evicted_for == victim.model_id
        cause = makes_room(claimant, need, missing, is_turn=is_turn)
        self.state.drain(victim, cause, claimant.model_id, missing if is_turn else 0)

    def _may_pass(self, slot: Slot, older: list[Slot]) -> bool:
        need = self.need(slot)
        if missing_bytes(self.state.charged(), need, self.state.limit_bytes()) > 0:
            return False
        since_s = min(other.claimed_at_s for other in older)
        stayers = [other for other in self.state.charged() if other.is_pinned or other.load_began_at_s >= since_s]
        if not may_pass(need, [self.need(other) for other in older], stayers, self.state.limit_bytes()):
            return False
        return not self._takes_promised_room(need, self.need(older[0]))

    def _takes_promised_room(self, need: MemoryNeed, head: MemoryNeed) -> bool:
        """Whether models are leaving so that the oldest claim fits, and it would not fit any more."""
        staying, limit = without_leaving(self.state.charged()), self.state.limit_bytes()
        is_on_its_way = missing_bytes(staying, head, limit) == 0
        return is_on_its_way and not may_pass(need, [head], staying, limit)

    def _admit(self, slot: Slot) -> None:
        """The device is read before each load: other processes use it too. The answer comes back as an event."""
        if not self.is_fresh:
            self._read()
            return
        if slot.files is None:
            raise RuntimeError(f"bug: {slot.model_id} waits for space without files")
        need = self.need(slot)
        self.state.move(slot, "loading", f"{format_bytes(need.total_bytes)} admitted")
        slot.reserved, slot.load_began_at_s = need, self.state.now_s
        self.state.start(slot, StartLoad(slot.slot_id, slot.spec, slot.files, need))

    def _read(self) -> None:
        """Have the device read, once for everyone who wants to know."""
        if not self._is_reading:
            self._is_reading = True
            self.state.effects.append(ReadMemory())

    def _refuse(self, slot: Slot) -> None:
        """Waiting would not help; an operator's word would."""
        message = kept_out(slot, total_bytes(charges(self._immovable())), self.state.budget_bytes)
        self.state.fail_waiters(slot, lambda: OutOfMemory(message, stage="load"))
        self.state.drop_claim(slot, message)

    def _send_on(self, slot: Slot, limit_bytes: int) -> None:
        """A claim whose last waiter moves on is dropped: it would only keep others from this host later."""
        moving = [waiter_id for waiter_id, waiter in slot.waiters.items() if waiter.may_move]
        message = held_by_others(slot, self.need(slot), limit_bytes)
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
    """The next attempt has all its second chances again."""
    slot.had_oom = slot.had_refetch = False
    state.move(slot, "cold" if slot.files else "absent", cause)


def claimed_bytes(state: PoolState) -> int:
    """Weights that claims will need and are not charged yet: placement counts them, or herds over-commit a host."""
    return sum(
        s.need.weight_bytes for s in state.slots.values() if s.claim is not None and s.need and s.state not in CHARGED
    )
