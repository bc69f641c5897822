"""Decides how patient the claims of flex requests are: they use memory that other models leave idle. Pure."""

from engines.pool.slot import PoolPolicy, Slot
from engines.pool.state import PoolState


def is_patient(slot: Slot, rules: PoolPolicy, now_s: float) -> bool:
    """Tells whether a claim waits rather than evict a model in use: only flex requests made it, and not long ago."""
    return slot.is_flex_claim and not slot.is_wanted and now_s < slot.claimed_at_s + rules.flex_patience_s


def is_spared(slot: Slot, rules: PoolPolicy, now_s: float) -> bool:
    """Tells whether a model is used too often to be evicted for a patient claim."""
    return bool(slot.leases) or now_s < slot.used_at_s + rules.flex_idle_s


def patient_last(claims: list[Slot], rules: PoolPolicy, now_s: float) -> list[Slot]:
    """Returns claims in order, patient ones behind the others: they delay none."""
    return sorted(claims, key=lambda slot: is_patient(slot, rules, now_s))


def patience_deadlines(state: PoolState) -> list[float]:
    """Returns the times at which a patient claim may be admitted without an event."""
    rules = state.rules
    patient = [slot for slot in state.claims() if is_patient(slot, rules, state.now_s)]
    if not patient:
        return []
    idle = [slot.used_at_s + rules.flex_idle_s for slot in state.in_state("ready")]
    return [*(slot.claimed_at_s + rules.flex_patience_s for slot in patient), *idle]
