"""Messages between the pools of one process, over whose devices a model may be split. Frozen records."""

from msgspec import Struct


class NeighbourChanged(Struct, frozen=True):
    """Another pool has changed where a split model is, or waits for memory: this pool may have to act."""


class NeighbourEvicts(Struct, frozen=True):
    """Another pool needs memory that a model of this pool holds, on a device or in main memory. Ignored unless the
    model is ready or parked."""

    slot_id: int
    cause: str
    claimant: str | None = None
    missing_bytes: int = 0


class ReadingWanted(Struct, frozen=True):
    """Another pool wants to place a share on this device, and needs a valid reading of it."""


class Notify(Struct, frozen=True):
    """Passes an event on to another pool (an index of `Neighbours.pools`), after all effects of this step."""

    pool: int
    event: NeighbourChanged | NeighbourEvicts | ReadingWanted
