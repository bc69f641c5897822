"""The figures of a step, for programs: what an event says beside its words for people. Pure; it changes nothing."""

from msgspec import Struct

from engines.pool_words import DAMAGED, EVICTED, IDLE, SHUTDOWN
from engines.records import State
from engines.slots import Slot

_BY_CAUSE = {EVICTED: "operator", SHUTDOWN: "shutdown", DAMAGED: "damaged"}


class Facts(Struct, frozen=True, kw_only=True):
    """See `engines.records.Event`."""

    reason: str = ""
    seconds: float = 0.0
    estimated_bytes: int = 0
    measured_bytes: int = 0


NO_FACTS = Facts()


def facts_of(slot: Slot, target: State, now_s: float) -> Facts:
    """What the slot's step from its present state to `target` means. Four cases:

    1. a load has succeeded;  2. an eviction: its requests have ended;
    3. a fetch, load or warm-up has failed, whether it is tried again or not;  4. nothing to count.
    """
    step = (slot.state, target)
    if step == ("warming", "ready"):
        return Facts(
            seconds=slot.load_s or 0.0, estimated_bytes=slot.estimated_bytes, measured_bytes=slot.charge.total_bytes
        )  # (1)
    if step == ("draining", "unloading"):
        return Facts(reason=_why_it_leaves(slot), seconds=now_s - slot.ready_at_s)  # (2)
    is_failure = target == "failed" or (slot.state in ("loading", "unloading") and target in ("cold", "fetching"))
    if is_failure and slot.failure is not None:
        return Facts(reason=slot.failure.kind)  # (3)
    return NO_FACTS  # (4)


def _why_it_leaves(slot: Slot) -> str:
    """One word of a short list: people read the cause, programs count these."""
    cause = slot.leaving_cause or ""
    if slot.is_retired:
        return "registry"
    if slot.leaving_for:
        return "room"
    return _BY_CAUSE.get(cause, "idle" if cause.startswith(IDLE) else "over_budget")
