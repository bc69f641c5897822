"""Computes the fields of the pool's events that programs read."""

from msgspec import Struct

from engines.pool.reasons import DAMAGED, EVICTED, IDLE, SHUTDOWN
from engines.pool.slot import Slot
from engines.types import State

_BY_CAUSE = {EVICTED: "operator", SHUTDOWN: "shutdown", DAMAGED: "damaged"}


class EventDetails(Struct, frozen=True, kw_only=True):
    """The fields of `engines.types.Event` for programs."""

    reason: str = ""
    seconds: float = 0.0
    estimated_bytes: int = 0
    measured_bytes: int = 0


NO_DETAILS = EventDetails()


def event_details(slot: Slot, target: State, now_s: float) -> EventDetails:
    """Returns the event fields for the slot's step from its present state to `target`. Four cases:

    1. a load has succeeded, or a parked model is back;  2. an eviction begins to free memory: its requests have ended;
    3. a download, load or warm-up has failed, whether it is retried or not;  4. any other step.
    """
    step = (slot.state, target)
    if step == ("warming", "ready"):
        return EventDetails(
            seconds=slot.load_s or 0.0, estimated_bytes=slot.estimated_bytes, measured_bytes=slot.reserved.total_bytes
        )  # (1)
    if step in (("draining", "unloading"), ("draining", "parking")):
        return EventDetails(reason=_eviction_reason(slot), seconds=now_s - slot.ready_at_s)  # (2)
    if step == ("waking", "ready"):
        return EventDetails(seconds=slot.wake_s or 0.0)  # (1)
    is_failure = target == "failed" or (slot.state in ("loading", "unloading") and target in ("cold", "fetching"))
    if is_failure and slot.failure is not None:
        return EventDetails(reason=slot.failure.kind)  # (3)
    return NO_DETAILS  # (4)


def _eviction_reason(slot: Slot) -> str:
    """Returns the eviction's reason from a fixed list, for metrics; `cause` is the text for people."""
    cause = slot.leaving_cause or ""
    if slot.is_retired:
        return "registry"
    if slot.leaving_for:
        return "room"
    return _BY_CAUSE.get(cause, "idle" if cause.startswith(IDLE) else "over_budget")
