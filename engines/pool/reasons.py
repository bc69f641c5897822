"""What the pool tells callers and operators: every message has both numbers and the remedy."""

from engines.errors import (
    EngineError,
    LoadFailed,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    ModelTooLarge,
    OutOfMemory,
    ShuttingDown,
)
from engines.pool.slot import LoadFailure, MemoryNeed, Slot
from engines.types import format_bytes

EVICTED = "evicted by an operator"
SHUTDOWN = "the host shuts down"
DAMAGED = "its files were damaged or replaced on the disk"
IDLE = "idle for its keep_alive"


def known_bytes(need: MemoryNeed | None) -> int:
    return need.known().total_bytes if need else 0


def too_large(slot: Slot, budget_bytes: int) -> ModelTooLarge:
    return ModelTooLarge(
        f"model {slot.model_id!r} needs {format_bytes(known_bytes(slot.need))} and the memory budget is "
        f"{format_bytes(budget_bytes)}; raise the budget or choose a smaller model or dtype"
    )


def load_error(slot: Slot, failure: LoadFailure, now_s: float) -> EngineError:
    """The cause for those who waited, and for those who ask during the quarantine."""
    wait_s = max(0.1, slot.retry_at_s - now_s)
    message = f"model {slot.model_id!r} failed to load ({failure.kind}): {failure.message}; "
    message += f"next attempt in {wait_s:.0f} s at the earliest"
    if failure.is_oom:
        return OutOfMemory(message, retry_after_s=wait_s, stage="load")
    return LoadFailed(message, retry_after_s=wait_s, kind=failure.kind)


def not_found(model_id: str) -> ModelNotFound:
    return ModelNotFound(f"no model {model_id!r} on this host; see the list of models")


def shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; send the request to another one", retry_after_s=5.0)


def shut_down() -> ShuttingDown:
    """For those who had been admitted, at the end of the grace time."""
    return ShuttingDown("the server shut down before the request was done; send it again")


def still_loading(slot: Slot) -> ModelLoading:
    """What a caller hears whose patience ended; the load goes on."""
    doing = {"fetching": "downloading", "waiting_space": "waiting for memory"}.get(slot.state, slot.state)
    if slot.state == "fetching" and slot.fetch_total_bytes:
        doing += f" ({format_bytes(slot.fetched_bytes)} of {format_bytes(slot.fetch_total_bytes)})"
    return ModelLoading(
        f"model {slot.model_id!r} is still {doing} and was not ready in time; it goes on, ask again", retry_after_s=2.0
    )


def load_hangs(slot: Slot, blocked: str) -> LoadFailed:
    """What callers hear while nothing can be loaded."""
    return LoadFailed(
        f"model {slot.model_id!r} cannot be loaded: {blocked}, and nothing else can be loaded before it ends; if it "
        "does not, restart the server (BACKEND=process restarts its workers by itself)",
        retry_after_s=30.0,
        kind="load_hangs",
    )


def cannot_be_freed(slot: Slot, blocked: str) -> ModelInUse:
    """What an operator hears while nothing can be freed."""
    return ModelInUse(
        f"model {slot.model_id!r} cannot be freed: {blocked}, and it cannot be stopped; restart the server, or ask "
        "again when it has ended"
    )


def not_evicted(slot: Slot, timeout_s: float) -> ModelInUse:
    """Why an eviction had not gone through at its time-out. Two cases: 1. it leaves; 2. it stays."""
    if slot.state == "unloading":
        return ModelInUse(
            f"model {slot.model_id!r} leaves, but its memory is not free after {timeout_s:g} s; look again"
        )
    if slot.state in ("loading", "warming"):
        reason = f"model {slot.model_id!r} is still {slot.state} after {timeout_s:g} s, and a load cannot be stopped"
    else:
        reason = f"{len(slot.leases)} requests still run on model {slot.model_id!r} after {timeout_s:g} s"
    return ModelInUse(f"{reason}; it stays; try again later")


def preloaded_meanwhile(slot: Slot) -> ModelInUse:
    """What an operator hears whose eviction a later preload has overtaken."""
    return ModelInUse(f"model {slot.model_id!r} was preloaded while its eviction waited; it stays")


def evicted_meanwhile(slot: Slot) -> ModelInUse:
    """What an operator hears whose preload an eviction has overtaken."""
    return ModelInUse(f"model {slot.model_id!r} was evicted before its preload was answered; preload it again")


def kept_out(slot: Slot, pinned_bytes: int, budget_bytes: int) -> str:
    """Why waiting for memory would not help."""
    return (
        f"model {slot.model_id!r} needs {format_bytes(known_bytes(slot.need))}, but pinned models hold "
        f"{format_bytes(pinned_bytes)} of the budget of {format_bytes(budget_bytes)}; unpin one or raise the budget"
    )


def held_by_others(slot: Slot, need: MemoryNeed, limit_bytes: int) -> str:
    """Why a claim cannot be had now, whichever of our models left."""
    return (
        f"model {slot.model_id!r} needs {format_bytes(need.total_bytes)}, and other processes leave "
        f"{format_bytes(limit_bytes)} of this device's memory; end them, or ask again later"
    )


def makes_room(claimant: Slot, need: MemoryNeed, missing_bytes: int, *, is_turn: bool) -> str:
    """The cause of an eviction; the thrash of two models that cannot both fit is named as such."""
    cause = f"makes room for {claimant.model_id}, which needs {format_bytes(need.total_bytes)}; "
    cause += f"{format_bytes(missing_bytes)} are missing"
    return f"{cause}, so the two take turns" if is_turn else cause
