"""What goes into the pool's state machine: what callers ask, and how outside work ended. Frozen, without behaviour.

A waiter, a lease and an operator's command are all known by an integer that the shell draws: `waiter_id`.
"""

from collections.abc import Mapping

from msgspec import Struct

from engines.records import ModelFiles
from engines.slots import Failure, Need
from engines.spec import ModelSpec

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
