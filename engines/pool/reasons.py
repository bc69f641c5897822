"""Error messages and event causes of the pool, for clients and operators: both numbers and the remedy."""

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
from engines.precision import is_compared_at_load
from engines.types import format_bytes

EVICTED = "evicted by an operator"
SHUTDOWN = "the host shuts down"
DAMAGED = "its files were damaged or replaced on the disk"
IDLE = "idle for its keep_alive"
_DOING = {"fetching": "downloading", "waiting_space": "waiting for memory", "parked": "waiting for memory"}
HOST_IDLE = "parked and idle for its host_keep_alive"


def known_bytes(need: MemoryNeed | None) -> int:
    """Returns the bytes that the model needs for certain, in its smallest form."""
    return min(form.known().total_bytes for form in need.forms) if need else 0


def too_large(slot: Slot, budget_bytes: int) -> ModelTooLarge:
    both = ""
    if is_compared_at_load(slot.spec):
        both = f"; a first load in {slot.spec.dtype} compares with float32, unless `min_cosine: 0` is set"
    return ModelTooLarge(
        f"model {slot.model_id!r} needs {format_bytes(known_bytes(slot.need))}, but the memory budget is "
        f"{format_bytes(budget_bytes)}; raise the budget or choose a smaller model or dtype{both}"
    )


def load_error(slot: Slot, failure: LoadFailure, now_s: float) -> EngineError:
    """The error of requests that waited for a failed load, and of requests during the quarantine."""
    wait_s = max(0.1, slot.retry_at_s - now_s)
    message = f"model {slot.model_id!r} failed to load ({failure.kind}): {failure.message}; "
    message += f"retry after {wait_s:.0f} s"
    if failure.is_oom:
        return OutOfMemory(message, retry_after_s=wait_s, stage="load")
    return LoadFailed(message, retry_after_s=wait_s, kind=failure.kind)


def not_found(model_id: str) -> ModelNotFound:
    return ModelNotFound(f"model {model_id!r} not found on this host; see the list of models")


def shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; send the request to another one", retry_after_s=5.0)


def interrupted_by_shutdown() -> ShuttingDown:
    """The error of admitted requests that still run at the end of the grace time."""
    return ShuttingDown("the server shut down before the request was done; send it again")


def still_loading(slot: Slot) -> ModelLoading:
    """The error of a request whose load time-out has passed; the load continues."""
    doing = _DOING.get(slot.state, slot.state)
    if slot.state == "fetching" and slot.fetch_total_bytes:
        doing += f" ({format_bytes(slot.fetched_bytes)} of {format_bytes(slot.fetch_total_bytes)})"
    return ModelLoading(
        f"model {slot.model_id!r} was not ready in time: still {doing}; the load continues, retry later",
        retry_after_s=2.0,
    )


def load_hangs(slot: Slot, blocked: str) -> LoadFailed:
    """The error of requests for models that are not loaded while a load hangs."""
    return LoadFailed(
        f"model {slot.model_id!r} cannot be loaded: {blocked} and blocks all other loads; if it does not end, restart "
        "the server (BACKEND=process restarts its workers automatically)",
        retry_after_s=30.0,
        kind="load_hangs",
    )


def cannot_be_freed(slot: Slot, blocked: str) -> ModelInUse:
    """The error of an eviction while a load hangs."""
    return ModelInUse(
        f"model {slot.model_id!r} cannot be freed: {blocked} and cannot be interrupted; retry when it has ended, or "
        "restart the server"
    )


def eviction_timed_out(slot: Slot, timeout_s: float) -> ModelInUse:
    """The error of an eviction at its time-out; the model stays loaded unless it is unloading."""
    if slot.state == "unloading":
        return ModelInUse(
            f"model {slot.model_id!r} is unloading, but its memory is not free after {timeout_s:g} s; check again"
        )
    if slot.state in ("loading", "warming"):
        reason = (
            f"model {slot.model_id!r} is still {slot.state} after {timeout_s:g} s, and a load cannot be interrupted"
        )
    else:
        reason = f"model {slot.model_id!r} still has {len(slot.leases)} running requests after {timeout_s:g} s"
    return ModelInUse(f"{reason}; the eviction was cancelled, retry later")


def cancelled_by_preload(slot: Slot) -> ModelInUse:
    """The error of an eviction that a later preload has cancelled."""
    return ModelInUse(f"model {slot.model_id!r} was preloaded before its eviction was done; the eviction was cancelled")


def cancelled_by_eviction(slot: Slot) -> ModelInUse:
    """The error of a preload whose model was evicted meanwhile."""
    return ModelInUse(f"model {slot.model_id!r} was evicted before its preload was done; preload it again")


def blocked_by_pinned(slot: Slot, pinned_bytes: int, budget_bytes: int) -> str:
    """The message for a model that cannot fit beside the pinned models."""
    return (
        f"model {slot.model_id!r} needs {format_bytes(known_bytes(slot.need))}, but pinned models use "
        f"{format_bytes(pinned_bytes)} of the memory budget of {format_bytes(budget_bytes)}; unpin a model or raise "
        "the budget"
    )


def cannot_be_split(slot: Slot, device_bytes: int, host_bytes: int) -> str:
    """The message for a model that does not fit on all devices of its host and in main memory together."""
    need = slot.need
    size = sum(need.parts) + need.workspace_bytes if need and need.parts else known_bytes(need)
    return (
        f"model {slot.model_id!r} needs {format_bytes(size)}, the devices of this host have "
        f"{format_bytes(device_bytes)}, and the host budget {format_bytes(host_bytes)} of main memory, less what "
        "pinned models take; raise MEMORY_BUDGET or HOST_MEMORY_BUDGET, or choose a smaller dtype"
    )


def split_cause(claimant: Slot, need: MemoryNeed, missing_bytes: int, *, is_turn: bool) -> str:
    """The cause of an eviction for a claim of a model that is split."""
    cause = eviction_cause(claimant, need, missing_bytes, is_turn=is_turn)
    return cause.replace("; ", " here, as a part of it; ", 1)


def blocked_by_others(slot: Slot, need: MemoryNeed, limit_bytes: int) -> str:
    """The message for a model that does not fit because of other processes, whatever is evicted."""
    return (
        f"model {slot.model_id!r} needs {format_bytes(need.total_bytes)}, but other processes leave only "
        f"{format_bytes(limit_bytes)} of this device's memory; stop them or retry later"
    )


def eviction_cause(claimant: Slot, need: MemoryNeed, missing_bytes: int, *, is_turn: bool) -> str:
    """The cause of an eviction for a claim; names the thrashing of two models that do not fit together (`is_turn`)."""
    cause = f"evicted for {claimant.model_id}, which needs {format_bytes(need.total_bytes)}; "
    cause += f"{format_bytes(missing_bytes)} are missing"
    return f"{cause}, so the two take turns" if is_turn else cause
