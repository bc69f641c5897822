"""What the database stores of files and batches, as frozen records. Times are Unix seconds."""

from typing import Final

from msgspec import Struct

from router.schemas.batches import (
    BatchError,
    BatchErrors,
    BatchObject,
    BatchRequestCounts,
    BatchStatus,
    Endpoint,
    FileObject,
    Purpose,
)

UNFINISHED: Final[tuple[BatchStatus, ...]] = ("validating", "in_progress", "finalizing", "cancelling")


class FileRecord(Struct, frozen=True, kw_only=True):
    """A file that is complete on disk. `owner`: who may see it."""

    id: str
    owner: str
    purpose: Purpose
    filename: str
    bytes: int
    created_at: float
    expires_at: float

    def to_object(self) -> FileObject:
        """Return what the API shows."""
        return FileObject(
            id=self.id,
            bytes=self.bytes,
            created_at=int(self.created_at),
            expires_at=int(self.expires_at),
            filename=self.filename,
            purpose=self.purpose,
        )


class BatchRecord(Struct, frozen=True, kw_only=True):
    """A batch, and how far it is.

    Attributes:
        input_offset: bytes of the input file whose lines are journaled.
        next_line: number of the first line behind them; lines are numbered from 1, blank ones too.
        epoch: how many leases the batch has had; the last one may write.
        holder: the server that has the lease; empty without one.
        lease_until: when another server may take the batch.
    """

    id: str
    owner: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created_at: float
    expires_at: float
    metadata: dict[str, str] | None = None
    errors: list[BatchError] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_offset: int = 0
    next_line: int = 1
    epoch: int = 0
    holder: str = ""
    lease_until: float = 0.0

    def to_object(self) -> BatchObject:
        """Return what the API shows."""
        return BatchObject(
            id=self.id,
            endpoint=self.endpoint,
            input_file_id=self.input_file_id,
            completion_window=self.completion_window,
            status=self.status,
            created_at=int(self.created_at),
            expires_at=int(self.expires_at),
            request_counts=BatchRequestCounts(total=self.total, completed=self.completed, failed=self.failed),
            errors=None if self.errors is None else BatchErrors(data=self.errors),
            output_file_id=self.output_file_id,
            error_file_id=self.error_file_id,
            in_progress_at=_seconds(self.in_progress_at),
            finalizing_at=_seconds(self.finalizing_at),
            completed_at=_seconds(self.completed_at),
            failed_at=_seconds(self.failed_at),
            expired_at=_seconds(self.expired_at),
            cancelling_at=_seconds(self.cancelling_at),
            cancelled_at=_seconds(self.cancelled_at),
            metadata=self.metadata,
        )


def _seconds(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)


class Segment(Struct, frozen=True, kw_only=True):
    """The journaled bytes of the two files that one lease of a batch has written."""

    epoch: int
    output_bytes: int
    error_bytes: int


class Quota(Struct, frozen=True, kw_only=True):
    """What one key may store and run, and what all keys together may store."""

    max_files: int
    max_bytes: int
    max_unfinished: int
    max_stored: int


class Room(Struct, frozen=True, order=True):
    """How many bytes may still be stored, and the setting that allows no more."""

    num_bytes: int
    setting: str


class Page(Struct, frozen=True, kw_only=True):
    """Which entries of a list are wanted: up to `limit` behind the one with the id `after`."""

    limit: int
    after: str | None = None
    is_ascending: bool = False
