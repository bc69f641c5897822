"""Messages of the pool's state machine: events go in, effects come out. Frozen records.

`waiter_id` identifies a waiting request, its lease, or an operator's command; `ModelPool` assigns it.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from engines.errors import EngineError
from engines.pool.event_details import NO_DETAILS, EventDetails
from engines.pool.neighbour_messages import NeighbourChanged, NeighbourEvicts, Notify, ReadingWanted
from engines.pool.slot import LoadFailure, MemoryNeed, Split
from engines.spec import ModelSpec
from engines.types import ModelFiles, State, Tier


class Grant(Struct, frozen=True):
    """Gives the waiter a lease on the slot's engine, held from this step on."""

    waiter_id: int
    slot_id: int


class Done(Struct, frozen=True):
    """Completes the eviction that `waiter_id` requested."""

    waiter_id: int


class Fail(Struct, frozen=True):
    """Fails the waiter with this error; it holds no lease."""

    waiter_id: int
    error: EngineError


class StartLocate(Struct, frozen=True):
    """Finds the files on disk, else asks the hub for their size. Ends in `FilesLocated` or `DownloadErrored`."""

    slot_id: int
    spec: ModelSpec


class StartFetch(Struct, frozen=True):
    """Downloads the files. Ends in `DownloadCompleted` or `DownloadErrored`."""

    slot_id: int
    spec: ModelSpec


class Discard(Struct, frozen=True):
    """Deletes a corrupt file, all files if None. Ends in `FilesDiscarded`."""

    slot_id: int
    spec: ModelSpec
    file: str | None


class ReadMemory(Struct, frozen=True):
    """Reads the device's memory. Ends in `BudgetChanged`."""


class StartLoad(Struct, frozen=True):
    """Builds the engine; `need` is charged already, or the shares of `split`, on `devices`. Ends in
    `LoadCompleted` or `LoadErrored`."""

    slot_id: int
    spec: ModelSpec
    files: ModelFiles
    need: MemoryNeed
    split: Split | None = None
    devices: tuple[str, ...] = ()


class StartWarm(Struct, frozen=True):
    """Warms the engine up. Ends in `WarmUpCompleted` or `WarmUpErrored`."""

    slot_id: int


class StartUnload(Struct, frozen=True):
    """Frees the engine, which has no leases. Always ends in `UnloadCompleted`."""

    slot_id: int


class StartPark(Struct, frozen=True):
    """Moves the weights of an engine without leases to main memory. Ends in `ParkCompleted` or `ParkErrored`."""

    slot_id: int


class StartWake(Struct, frozen=True):
    """Moves the weights of a parked engine back to the device. Ends in `WakeCompleted` or `WakeErrored`."""

    slot_id: int


class ArmTimer(Struct, frozen=True):
    """Sets the only timer: it sends `TimerFired` at `at_s`; None cancels it."""

    at_s: float | None


class Emit(Struct, frozen=True):
    """Publishes an event; `EventLog` adds number, time and host to make an `engines.types.Event` of it.

    `missing_bytes`: not 0 when two models take turns because they do not fit together; that many bytes would end it.
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
    details: EventDetails = NO_DETAILS


Effect = (
    Grant | Done | Fail | Emit | ArmTimer | ReadMemory | Notify
    | StartLocate | StartFetch | Discard | StartLoad | StartWarm | StartUnload | StartPark | StartWake
)  # fmt: skip


NEVER = float("inf")


# ---- events: requests and commands -------------------------------------------------------------------------------


class LeaseRequested(Struct, frozen=True):
    """A request needs a lease. Exactly one `Grant` or `Fail` follows, unless it is cancelled first."""

    waiter_id: int
    model_id: str
    keep_alive_s: float | None = None
    deadline_s: float = NEVER
    may_move: bool = False
    is_flex: bool = False


class LeaseCancelled(Struct, frozen=True):
    """The caller of `waiter_id` was cancelled: ends its wait, its lease or its eviction. Never fails."""

    waiter_id: int


class LeaseReleased(Struct, frozen=True):
    """The request `waiter_id` has finished with its lease."""

    waiter_id: int


class PreloadRequested(Struct, frozen=True):
    """An operator preloads a model; this also ends a quarantine.

    `is_tentative`: the caller tries another host if the load fails, so the model is neither pinned nor retried here.
    """

    model_id: str
    is_pin: bool = False
    is_tentative: bool = False


class EvictionRequested(Struct, frozen=True):
    """An operator evicts a model. Exactly one `Done` or `Fail` follows, unless it is cancelled first.

    `to`: `host` parks it where the host budget has room.
    """

    waiter_id: int
    model_id: str
    is_forced: bool = False
    to: Tier = "disk"


class RegistryReloaded(Struct, frozen=True):
    """The registry has changed to these models."""

    specs: Mapping[str, ModelSpec]


class DrainRequested(Struct, frozen=True):
    """The host shuts down: refuse new requests, let admitted ones finish, free all memory."""


class TimerFired(Struct, frozen=True):
    """The time set by `ArmTimer` has come."""


# ---- events: results of asynchronous work -------------------------------------------------------------------------


class FilesFound(Struct, frozen=True):
    """The scan at start found the files on disk. Ignored unless the model is absent."""

    slot_id: int
    files: ModelFiles
    need: MemoryNeed


class SizeEstimated(Struct, frozen=True):
    """The model's size was estimated without a request to load it. Ignored if the size is known already."""

    slot_id: int
    need: MemoryNeed


class FilesLocated(Struct, frozen=True):
    """The search on disk has ended.

    `files` None: not complete on disk. `need` None: the size is unknown until the download is done.
    """

    slot_id: int
    files: ModelFiles | None
    need: MemoryNeed | None


class DownloadCompleted(Struct, frozen=True):
    """The files are on disk and verified."""

    slot_id: int
    files: ModelFiles
    need: MemoryNeed


class DownloadErrored(Struct, frozen=True):
    """The search on disk, the request to the hub or the download failed."""

    slot_id: int
    failure: LoadFailure


class DownloadProgressed(Struct, frozen=True):
    """A running download reports its progress."""

    slot_id: int
    done_bytes: int
    total_bytes: int


class FilesDiscarded(Struct, frozen=True):
    """A corrupt file was deleted, or may not be deleted (`is_removed` false)."""

    slot_id: int
    is_removed: bool


class FilesDamaged(Struct, frozen=True):
    """Verification found damaged or replaced files. Ignored if the slot has other files by now."""

    slot_id: int
    files: ModelFiles
    failure: LoadFailure


class BudgetChanged(Struct, frozen=True):
    """The device was read. `ceiling_bytes`: the memory that this process can use at most beside other processes now."""

    budget_bytes: int
    ceiling_bytes: int | None = None


class HostBudgetChanged(Struct, frozen=True):
    """The host budget has changed; 0 parks no model."""

    budget_bytes: int


class LoadsBlocked(Struct, frozen=True):
    """A load hangs, so nothing can be loaded or freed; `reason` describes it, and is empty once it has ended."""

    reason: str


class LoadCompleted(Struct, frozen=True):
    """The engine was built."""

    slot_id: int


class LoadErrored(Struct, frozen=True):
    """The load failed; it holds no memory."""

    slot_id: int
    failure: LoadFailure


class WarmUpCompleted(Struct, frozen=True):
    """The engine ran once; its memory is measured: of a split model in `share_bytes`, the weights on each device and
    then those in main memory."""

    slot_id: int
    weight_bytes: int
    workspace_bytes: int
    share_bytes: tuple[int, ...] = ()


class WarmUpErrored(Struct, frozen=True):
    """The warm-up failed; the engine must be unloaded."""

    slot_id: int
    failure: LoadFailure


class UnloadCompleted(Struct, frozen=True):
    """The engine's memory is free."""

    slot_id: int


class ParkCompleted(Struct, frozen=True):
    """The weights are in main memory, `host_bytes` of them, and those on the device are free."""

    slot_id: int
    host_bytes: int


class ParkErrored(Struct, frozen=True):
    """The engine could not be parked and must be unloaded."""

    slot_id: int
    failure: LoadFailure


class WakeCompleted(Struct, frozen=True):
    """The weights are on the device again and gave the same vectors; main memory holds none of them."""

    slot_id: int


class WakeErrored(Struct, frozen=True):
    """The engine could not be brought back, or gives other vectors; it must be unloaded."""

    slot_id: int
    failure: LoadFailure


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
    | FilesDamaged
    | BudgetChanged
    | HostBudgetChanged
    | LoadsBlocked
    | LoadCompleted
    | LoadErrored
    | WarmUpCompleted
    | WarmUpErrored
    | UnloadCompleted
    | ParkCompleted
    | ParkErrored
    | WakeCompleted
    | WakeErrored
    | NeighbourChanged
    | NeighbourEvicts
    | ReadingWanted
)
