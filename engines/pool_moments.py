"""When time alone changes what the pool would decide: the moments its timer is set for. Pure.

Deciding compares the clock with these same sums, so that no rounding lets a moment pass unseen.
"""

from engines.pool_state import PoolState
from engines.slots import Slot


def moments(state: PoolState, deficit_since_s: float | None) -> list[float]:
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
        found += [slot.matures_at_s(state.rules) for slot in ready if not slot.is_pinned]
    return [at_s for at_s in found if at_s > state.now_s]


def is_idle_evictable(slot: Slot) -> bool:
    """Whether idleness alone may end its stay, now or later."""
    return slot.state == "ready" and not slot.leases and not slot.is_pinned and slot.keep_alive_s >= 0
