"""What goes into the pool's state machine: what callers ask, and how outside work ended. Frozen, without behaviour.

A waiter, a lease and an operator's command are all known by an integer that the shell draws: `waiter_id`.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from engines.errors import EngineError
from engines.pool.reasons import DAMAGED, EVICTED, IDLE, SHUTDOWN
from engines.pool.slot import Failure, Need, Slot
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
    """Look on disk, else ask for the size. Ends in `Located` or `FetchFailed`."""

    slot_id: int
    spec: ModelSpec


class StartFetch(Struct, frozen=True):
    """Bring the files. Ends in `Fetched` or `FetchFailed`."""

    slot_id: int
    spec: ModelSpec


class Discard(Struct, frozen=True):
    """Remove a corrupt file, or all. Ends in `Discarded`."""

    slot_id: int
    spec: ModelSpec
    file: str | None


class ReadMemory(Struct, frozen=True):
    """Read the device. Ends in `BudgetChanged`."""


class StartLoad(Struct, frozen=True):
    """Build the engine; `need` is charged already. Ends in `Loaded` or `LoadFailed`."""

    slot_id: int
    spec: ModelSpec
    files: ModelFiles
    need: Need


class StartWarm(Struct, frozen=True):
    """Warm the engine up. Ends in `Warmed` or `WarmFailed`."""

    slot_id: int


class StartUnload(Struct, frozen=True):
    """Free the engine; nobody holds a lease on it. Ends in `Unloaded`, whatever happens."""

    slot_id: int


class ArmTimer(Struct, frozen=True):
    """Send a `Tick` at this moment and at no other; None: no timer."""

    at_s: float | None


_BY_CAUSE = {EVICTED: "operator", SHUTDOWN: "shutdown", DAMAGED: "damaged"}


class Facts(Struct, frozen=True, kw_only=True):
    """See `engines.types.Event`."""

    reason: str = ""
    seconds: float = 0.0
    estimated_bytes: int = 0
    measured_bytes: int = 0


NO_FACTS = Facts()


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
    facts: Facts = NO_FACTS


Effect = (
    Grant | Done | Fail | Emit | ArmTimer | ReadMemory
    | StartLocate | StartFetch | Discard | StartLoad | StartWarm | StartUnload
)  # fmt: skip


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


NEVER = float("inf")


# ---- events: what callers ask -------------------------------------------------------------------------------


class Acquire(Struct, frozen=True):
    """A request wants a lease. Answered by exactly one `Grant` or `Fail`, unless it cancels first."""

    waiter_id: int
    model_id: str
    keep_alive_s: float | None = None
    deadline_s: float = NEVER
    may_move: bool = False


class Cancel(Struct, frozen=True):
    """Whoever `waiter_id` is has gone: stop waiting, give back the lease, or give up the eviction. Never an error."""

    waiter_id: int


class Release(Struct, frozen=True):
    """The lease granted to `waiter_id` ends."""

    waiter_id: int


class Preload(Struct, frozen=True):
    """Load without a request; an operator's word, so it also ends a quarantine.

    `is_tentative`: where the load fails, another host is asked, so the model is neither pinned nor tried again here.
    """

    model_id: str
    is_pin: bool = False
    is_tentative: bool = False


class Evict(Struct, frozen=True):
    """An operator wants the model's memory back. Answered by exactly one `Done` or `Fail`, unless it cancels first."""

    waiter_id: int
    model_id: str
    is_forced: bool = False


class Reload(Struct, frozen=True):
    """The registry's models from now on."""

    specs: Mapping[str, ModelSpec]


class Drain(Struct, frozen=True):
    """Shut down: admit nothing new, let what was admitted finish, free everything."""


class Tick(Struct, frozen=True):
    """Time passed."""


# ---- events: how outside work ended -------------------------------------------------------------------------


class Found(Struct, frozen=True):
    """The look around at start: the files are on disk already. Old news unless the model is absent."""

    slot_id: int
    files: ModelFiles
    need: Need


class Sized(Struct, frozen=True):
    """What the model takes, asked for without any wish to load it. Old news when that is known already."""

    slot_id: int
    need: Need


class Located(Struct, frozen=True):
    """Looked on disk. `files` None: not whole there; `need` None: the size is unknown until the download is done."""

    slot_id: int
    files: ModelFiles | None
    need: Need | None


class Fetched(Struct, frozen=True):
    """The files are on disk, verified."""

    slot_id: int
    files: ModelFiles
    need: Need


class FetchFailed(Struct, frozen=True):
    """Looking, asking or downloading failed."""

    slot_id: int
    failure: Failure


class FetchProgress(Struct, frozen=True):
    """A download came this far."""

    slot_id: int
    done_bytes: int
    total_bytes: int


class Discarded(Struct, frozen=True):
    """A corrupt file is gone, or may not be removed."""

    slot_id: int
    is_removed: bool


class Damaged(Struct, frozen=True):
    """The files that a model was loaded from, or will be, are not what they should be. Old news for other files."""

    slot_id: int
    files: ModelFiles
    failure: Failure


class BudgetChanged(Struct, frozen=True):
    """The device was read. `ceiling_bytes`: what this process could have at most now; others use the device too."""

    budget_bytes: int
    ceiling_bytes: int | None = None


class Blocked(Struct, frozen=True):
    """Nothing can be loaded or freed here: why, in words; empty when that is over."""

    reason: str


class Loaded(Struct, frozen=True):
    """The engine exists."""

    slot_id: int


class LoadFailed(Struct, frozen=True):
    """No engine came of it, and no memory is held."""

    slot_id: int
    failure: Failure


class Warmed(Struct, frozen=True):
    """The engine ran once; these are measured."""

    slot_id: int
    weight_bytes: int
    workspace_bytes: int


class WarmFailed(Struct, frozen=True):
    """The engine exists and is no good; it must be unloaded."""

    slot_id: int
    failure: Failure


class Unloaded(Struct, frozen=True):
    """The memory is free."""

    slot_id: int


PoolEvent = (
    Acquire | Cancel | Release | Preload | Evict | Reload | Drain | Tick
    | Found | Sized | Located | Fetched | FetchFailed | FetchProgress | Discarded | Damaged | BudgetChanged
    | Blocked | Loaded | LoadFailed | Warmed | WarmFailed | Unloaded
)  # fmt: skip
