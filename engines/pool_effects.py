"""What comes out of the pool's state machine, for the shell to carry out in this order. Frozen, without behaviour."""

from typing import Literal

from msgspec import Struct

from engines.errors import EngineError
from engines.pool_facts import NO_FACTS, Facts
from engines.records import ModelFiles, State
from engines.slots import Need
from engines.spec import ModelSpec


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


class Emit(Struct, frozen=True):
    """Tell the world. The shell adds number, time and host to make an `engines.records.Event` of it.

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


class ArmTimer(Struct, frozen=True):
    """Send a `Tick` at this moment and at no other; None: no timer."""

    at_s: float | None


Effect = (
    Grant | Done | Fail | Emit | ArmTimer | ReadMemory
    | StartLocate | StartFetch | Discard | StartLoad | StartWarm | StartUnload
)  # fmt: skip
