"""`Leases`: gives each unfinished batch to one server at a time, and journals how far it is. Blocking: use a thread.

A lease has an epoch, one more than that of the lease before. Every write names its epoch, so that a server that was
suspended and has lost its lease can change nothing any more.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, insert, select, update

from router.batches.database import BATCHES, FILES, SEGMENTS
from router.batches.records import UNFINISHED, BatchRecord, FileRecord, Segment
from router.batches.store import to_record
from router.schemas.batches import BatchError, BatchStatus

LEASE_S = 30.0
_CANDIDATES = 100
_END_TIMES: Mapping[str, str] = {
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelled": "cancelled_at",
}


class LeaseLost(Exception):
    """Another server has taken the batch over."""


class Leases:
    """Hands out batches, and writes their progress.

    Args:
        engine: of the database.
        holder: the name of this server, unique among all servers on the database and their restarts.
        clock: Unix time in seconds; servers on one database need clocks that differ by less than a lease.
    """

    def __init__(self, engine: Engine, holder: str, clock: Callable[[], float]) -> None:
        self._engine = engine
        self.holder = holder
        self._clock = clock

    def now(self) -> float:
        """Return the Unix time in seconds, as all times of batches are told."""
        return self._clock()

    def read(self, batch: BatchRecord) -> BatchRecord:
        """Return the batch as it is now, without a write.

        Raises:
            LeaseLost.
        """
        with self._engine.begin() as connection:
            found = self._read(connection, batch.id)
        if (found.epoch, found.holder) != (batch.epoch, self.holder):
            raise LeaseLost(batch.id)
        return found

    def claim(self, running: Counter[str]) -> BatchRecord | None:
        """Take an unfinished batch that no server holds; None if there is none.

        The owner with the fewest batches of `running` on this server comes first, then the oldest batch.
        """
        now_s = self._clock()
        free = (
            select(BATCHES)
            .where(BATCHES.c.status.in_(UNFINISHED), BATCHES.c.lease_until <= now_s)
            .order_by(BATCHES.c.created_at, BATCHES.c.id)
            .limit(_CANDIDATES)
        )
        with self._engine.begin() as connection:
            found = [to_record(row, BatchRecord) for row in connection.execute(free).mappings()]
            for batch in sorted(found, key=lambda batch: running[batch.owner]):
                taken = connection.execute(
                    update(BATCHES)
                    .where(BATCHES.c.id == batch.id, BATCHES.c.epoch == batch.epoch, BATCHES.c.lease_until <= now_s)
                    .values(epoch=batch.epoch + 1, holder=self.holder, lease_until=now_s + LEASE_S)
                )
                if taken.rowcount:
                    connection.execute(
                        insert(SEGMENTS).values(batch_id=batch.id, epoch=batch.epoch + 1, output_bytes=0, error_bytes=0)
                    )
                    return self._read(connection, batch.id)
        return None

    def renew(self, batch: BatchRecord) -> BatchRecord:
        """Extend the lease; return the batch as it is now.

        Raises:
            LeaseLost.
        """
        with self._engine.begin() as connection:
            self._update(connection, batch, lease_until=self._clock() + LEASE_S)
            return self._read(connection, batch.id)

    def release(self, batch: BatchRecord, retry_in_s: float = 0.0) -> None:
        """Give the batch back, for any server to take in `retry_in_s`. Does nothing once the lease is lost."""
        with self._engine.begin() as connection:
            try:
                self._update(connection, batch, holder="", lease_until=self._clock() + retry_in_s)
            except LeaseLost:
                return

    def begin(self, batch: BatchRecord, total: int) -> None:
        """Record that the input is valid; a batch that is being cancelled keeps that status.

        Raises:
            LeaseLost.
        """
        with self._engine.begin() as connection:
            self._update(connection, batch, total=total)
            connection.execute(
                update(BATCHES)
                .where(BATCHES.c.id == batch.id, BATCHES.c.status == "validating")
                .values(status="in_progress", in_progress_at=self._clock())
            )

    def advance(self, batch: BatchRecord, segment: Segment) -> None:
        """Journal the progress in `batch`, and the bytes of its segment that are on disk.

        Raises:
            LeaseLost: nothing was journaled.
        """
        progress = ("input_offset", "next_line", "completed", "failed")
        with self._engine.begin() as connection:
            self._update(connection, batch, **{name: getattr(batch, name) for name in progress})
            connection.execute(
                update(SEGMENTS)
                .where(SEGMENTS.c.batch_id == batch.id, SEGMENTS.c.epoch == batch.epoch)
                .values(output_bytes=segment.output_bytes, error_bytes=segment.error_bytes)
            )

    def begin_finalizing(self, batch: BatchRecord) -> bool:
        """Record that all lines are done; False if the batch has been cancelled meanwhile.

        Raises:
            LeaseLost.
        """
        with self._engine.begin() as connection:
            self._update(connection, batch)
            done = connection.execute(
                update(BATCHES)
                .where(BATCHES.c.id == batch.id, BATCHES.c.status.in_(("in_progress", "finalizing")))
                .values(status="finalizing", finalizing_at=self._clock())
            )
            return bool(done.rowcount)

    def segments(self, batch_id: str) -> list[Segment]:
        """Return the journaled segments of a batch, in the order of its lines."""
        found = select(SEGMENTS.c.epoch, SEGMENTS.c.output_bytes, SEGMENTS.c.error_bytes)
        with self._engine.begin() as connection:
            rows = connection.execute(found.where(SEGMENTS.c.batch_id == batch_id).order_by(SEGMENTS.c.epoch))
            return [to_record(row, Segment) for row in rows.mappings()]

    def finish(
        self, batch: BatchRecord, status: BatchStatus, files: Mapping[str, FileRecord], errors: Sequence[BatchError]
    ) -> None:
        """End a batch, and publish its files.

        Args:
            batch: the batch with its lease.
            status: how it ended.
            files: by column, `output_file_id` or `error_file_id`.
            errors: why it failed as a whole.

        Raises:
            LeaseLost: nothing was published.
        """
        with self._engine.begin() as connection:
            published = {column: record.id for column, record in files.items()}
            self._update(
                connection,
                batch,
                status=status,
                holder="",
                errors=msgspec.to_builtins(list(errors)) or None,
                **{_END_TIMES[status]: self._clock()},
                **published,
            )
            for record in files.values():
                connection.execute(insert(FILES).values(msgspec.to_builtins(record)))

    def _update(self, connection: Connection, batch: BatchRecord, **values: Any) -> None:
        """Write columns of the batch if this lease is still its last one."""
        mine = (BATCHES.c.id == batch.id, BATCHES.c.epoch == batch.epoch, BATCHES.c.holder == self.holder)
        done = connection.execute(update(BATCHES).where(*mine).values(**(values or {"epoch": batch.epoch})))
        if not done.rowcount:
            raise LeaseLost(batch.id)

    @staticmethod
    def _read(connection: Connection, batch_id: str) -> BatchRecord:
        found = select(BATCHES).where(BATCHES.c.id == batch_id)
        return to_record(connection.execute(found).mappings().one(), BatchRecord)
