"""What goes into the pool's state machine: what callers ask, and how outside work ended. Frozen, without behaviour.

A waiter, a lease and an operator's command are all known by an integer that the shell draws: `waiter_id`.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from engines.errors import EngineError
from engines.pool.reasons import DAMAGED, EVICTED, IDLE, SHUTDOWN
from engines.pool.slot import LoadFailure, MemoryNeed, Slot
from engines.spec import ModelSpec
from engines.types import ModelFiles, State


class Grant(Struct, frozen=True):
    """The waiter holds a lease on the slot's engine from this step on."""

    waiter_id: int
    slot_id: int


class Done(Struct, frozen=True):
    """The eviction that `waiter_id` asked for is complete."""

    waiter_id: int


class Fail(Struct, frozen=True):
    """The waiter gets this error; it holds nothing."""

    waiter_id: int
    error: EngineError


class StartLocate(Struct, frozen=True):
    """Look on disk, else ask for the size. Ends in `FilesLocated` or `DownloadErrored`."""

    slot_id: int
    spec: ModelSpec


class StartFetch(Struct, frozen=True):
    """Bring the files. Ends in `DownloadCompleted` or `DownloadErrored`."""

    slot_id: int
    spec: ModelSpec


class Discard(Struct, frozen=True):
    """Remove a corrupt file, or all. Ends in `FilesDiscarded`."""

    slot_id: int
    spec: ModelSpec
    file: str | None


class ReadMemory(Struct, frozen=True):
    """Read the device. Ends in `BudgetChanged`."""


class StartLoad(Struct, frozen=True):
    """Build the engine; `need` is charged already. Ends in `LoadCompleted` or `LoadErrored`."""

    slot_id: int
    spec: ModelSpec
    files: ModelFiles
    need: MemoryNeed


class StartWarm(Struct, frozen=True):
    """Warm the engine up. Ends in `WarmUpCompleted` or `WarmUpErrored`."""

    slot_id: int


class StartUnload(Struct, frozen=True):
    """Free the engine; nobody holds a lease on it. Ends in `UnloadCompleted`, whatever happens."""

    slot_id: int


class ArmTimer(Struct, frozen=True):
    """Send a `TimerFired` at this moment and at no other; None: no timer."""

    at_s: float | None


_BY_CAUSE = {EVICTED: "operator", SHUTDOWN: "shutdown", DAMAGED: "damaged"}


class EventDetails(Struct, frozen=True, kw_only=True):
    """See `engines.types.Event`."""

    reason: str = ""
    seconds: float = 0.0
    estimated_bytes: int = 0
    measured_bytes: int = 0


NO_DETAILS = EventDetails()


class Emit(Struct, frozen=True):
    """Tell the world. The shell adds number, time and host to make an `engines.types.Event` of it.

    `missing_bytes`: not 0 when two models take turns because they cannot both fit; so many bytes would end it.
    """

    slot_id: int
    model_id: str
    kind: Literal["state", "progress"]
    source: State
    target: State
    cause: str = ""
    claimant: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    missing_bytes: int = 0
    facts: EventDetails = NO_DETAILS


Effect = (
    Grant | Done | Fail | Emit | ArmTimer | ReadMemory
    | StartLocate | StartFetch | Discard | StartLoad | StartWarm | StartUnload
)  # fmt: skip


def event_details(slot: Slot, target: State, now_s: float) -> EventDetails:
    """What the slot's step from its present state to `target` means. Four cases:

    1. a load has succeeded;  2. an eviction: its requests have ended;
    3. a fetch, load or warm-up has failed, whether it is tried again or not;  4. nothing to count.
    """
    step = (slot.state, target)
    if step == ("warming", "ready"):
        return EventDetails(
            seconds=slot.load_s or 0.0, estimated_bytes=slot.estimated_bytes, measured_bytes=slot.reserved.total_bytes
        )  # (1)
    if step == ("draining", "unloading"):
        return EventDetails(reason=_why_it_leaves(slot), seconds=now_s - slot.ready_at_s)  # (2)
    is_failure = target == "failed" or (slot.state in ("loading", "unloading") and target in ("cold", "fetching"))
    if is_failure and slot.failure is not None:
        return EventDetails(reason=slot.failure.kind)  # (3)
    return NO_DETAILS  # (4)


def _why_it_leaves(slot: Slot) -> str:
    """One word of a short list: people read the cause, programs count these."""
    cause = slot.leaving_cause or ""
    if slot.is_retired:
        return "registry"
    if slot.leaving_for:
        return "room"
    return _BY_CAUSE.get(cause, "idle" if cause.startswith(IDLE) else "over_budget")


NEVER = float("inf")


# ---- events: what callers ask -------------------------------------------------------------------------------


class LeaseRequested(Struct, frozen=True):
    """A request wants a lease. Answered by exactly one `Grant` or `Fail`, unless it cancels first."""

    waiter_id: int
    model_id: str
    keep_alive_s: float | None = None
    deadline_s: float = NEVER
    may_move: bool = False


class LeaseCancelled(Struct, frozen=True):
    """Whoever `waiter_id` is has gone: stop waiting, give back the lease, or give up the eviction. Never an error."""

    waiter_id: int


class LeaseReleased(Struct, frozen=True):
    """The lease granted to `waiter_id` ends."""

    waiter_id: int


class PreloadRequested(Struct, frozen=True):
    """Load without a request; an operator's word, so it also ends a quarantine.

    `is_tentative`: where the load fails, another host is asked, so the model is neither pinned nor tried again here.
    """

    model_id: str
    is_pin: bool = False
    is_tentative: bool = False


class EvictionRequested(Struct, frozen=True):
    """An operator wants the model's memory back. Answered by exactly one `Done` or `Fail`, unless it cancels first."""

    waiter_id: int
    model_id: str
    is_forced: bool = False


class RegistryReloaded(Struct, frozen=True):
    """The registry's models from now on."""

    specs: Mapping[str, ModelSpec]


class DrainRequested(Struct, frozen=True):
    """Shut down: admit nothing new, let what was admitted finish, free everything."""


class TimerFired(Struct, frozen=True):
    """Time passed."""


# ---- events: how outside work ended -------------------------------------------------------------------------


class FilesFound(Struct, frozen=True):
    """The look around at start: the files are on disk already. Old news unless the model is absent."""

    slot_id: int
    files: ModelFiles
    need: MemoryNeed


class SizeEstimated(Struct, frozen=True):
    """What the model takes, asked for without any wish to load it. Old news when that is known already."""

    slot_id: int
    need: MemoryNeed


class FilesLocated(Struct, frozen=True):
    """Looked on disk. `files` None: not whole there; `need` None: the size is unknown until the download is done."""

    slot_id: int
    files: ModelFiles | None
    need: MemoryNeed | None


class DownloadCompleted(Struct, frozen=True):
    """The files are on disk, verified."""

    slot_id: int
    files: ModelFiles
    need: MemoryNeed


class DownloadErrored(Struct, frozen=True):
    """Looking, asking or downloading failed."""

    slot_id: int
    failure: LoadFailure


class DownloadProgressed(Struct, frozen=True):
    """A download came this far."""

    slot_id: int
    done_bytes: int
    total_bytes: int


class FilesDiscarded(Struct, frozen=True):
    """A corrupt file is gone, or may not be removed."""

    slot_id: int
    is_removed: bool


class Damaged(Struct, frozen=True):
    """The files that a model was loaded from, or will be, are not what they should be. Old news for other files."""

    slot_id: int
    files: ModelFiles
    failure: LoadFailure


class BudgetChanged(Struct, frozen=True):
    """The device was read. `ceiling_bytes`: what this process could have at most now; others use the device too."""

    budget_bytes: int
    ceiling_bytes: int | None = None


class Blocked(Struct, frozen=True):
    """Nothing can be loaded or freed here: why, in words; empty when that is over."""

    reason: str


class LoadCompleted(Struct, frozen=True):
    """The engine exists."""

    slot_id: int


class LoadErrored(Struct, frozen=True):
    """No engine came of it, and no memory is held."""

    slot_id: int
    failure: LoadFailure


class WarmUpCompleted(Struct, frozen=True):
    """The engine ran once; these are measured."""

    slot_id: int
    weight_bytes: int
    workspace_bytes: int


class WarmUpErrored(Struct, frozen=True):
    """The engine exists and is no good; it must be unloaded."""

    slot_id: int
    failure: LoadFailure


class UnloadCompleted(Struct, frozen=True):
    """The memory is free."""

    slot_id: int


PoolEvent = (
    LeaseRequested
    | LeaseCancelled
    | LeaseReleased
    | PreloadRequested
    | EvictionRequested
    | RegistryReloaded
    | DrainRequested
    | TimerFired
    | FilesFound
    | SizeEstimated
    | FilesLocated
    | DownloadCompleted
    | DownloadErrored
    | DownloadProgressed
    | FilesDiscarded
    | Damaged
    | BudgetChanged
    | Blocked
    | LoadCompleted
    | LoadErrored
    | WarmUpCompleted
    | WarmUpErrored
    | UnloadCompleted
)
