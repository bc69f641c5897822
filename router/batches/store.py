"""`BatchStore`: the files and batches that clients see, each by its owner only. Blocking: call it on a thread."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import structs
from sqlalchemy import Connection, Engine, Select, and_, delete, func, insert, or_, select, update

from router.batches.database import BATCHES, FILES, SEGMENTS
from router.batches.records import UNFINISHED, BatchRecord, FileRecord, Page, Quota, Room, Segment
from router.errors import BatchFinished, FileInUse, ObjectNotFound, QuotaExceeded
from router.schemas.batches import Purpose

Record = TypeVar("Record", BatchRecord, FileRecord, Segment)
Listed = TypeVar("Listed", BatchRecord, FileRecord)


class BatchStore:
    """Reads and writes the rows of files and batches.

    Args:
        engine: of the database.
        quota: of each owner.
        clock: Unix time in seconds.
    """

    def __init__(self, engine: Engine, quota: Quota, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._quota = quota
        self._clock = clock

    # ---- files

    def check_room(self, owner: str) -> Room:
        """Return how many bytes the owner may still store.

        Raises:
            QuotaExceeded: none, or no further file.
        """
        with self._engine.begin() as connection:
            return self._room(connection, owner)

    def stored_bytes(self) -> int:
        """Return how many bytes all owners have stored, with what running batches have written."""
        with self._engine.begin() as connection:
            return _stored(connection)

    def add_file(self, record: FileRecord) -> None:
        """Add an uploaded file, whose bytes are on disk.

        Raises:
            QuotaExceeded: the owner has stored other files meanwhile.
        """
        with self._engine.begin() as connection:
            room = self._room(connection, record.owner)
            if record.bytes > room.num_bytes:
                raise QuotaExceeded(
                    f"File quota exceeded: the file has {record.bytes} bytes, and this key may store {room.num_bytes} "
                    f"more ({room.setting}); delete files"
                )
            connection.execute(insert(FILES).values(structs.asdict(record)))

    def file(self, owner: str, file_id: str) -> FileRecord:
        """Return a file of the owner.

        Raises:
            ObjectNotFound.
        """
        with self._engine.begin() as connection:
            return _file(connection, owner, file_id)

    def files(self, owner: str, page: Page, purpose: Purpose | None = None) -> tuple[list[FileRecord], bool]:
        """Return one page of the owner's files, and whether there are more.

        Raises:
            ObjectNotFound: there is no file `after`.
        """
        wanted = select(FILES).where(FILES.c.owner == owner)
        if purpose is not None:
            wanted = wanted.where(FILES.c.purpose == purpose)
        with self._engine.begin() as connection:
            after = _file(connection, owner, page.after) if page.after is not None else None
            return _page(connection, FileRecord, wanted, page, after)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Delete the row of a file.

        Raises:
            ObjectNotFound, FileInUse.
        """
        with self._engine.begin() as connection:
            _file(connection, owner, file_id, is_locked=True)  # no batch of it is added meanwhile
            user = connection.execute(
                select(BATCHES.c.id).where(BATCHES.c.input_file_id == file_id, BATCHES.c.status.in_(UNFINISHED))
            ).scalar()
            if user is not None:
                raise FileInUse(f"File {file_id} is read by {user}: cancel the batch, or wait until it has ended")
            connection.execute(delete(FILES).where(FILES.c.id == file_id))

    def drop_expired(self, limit: int = 100) -> list[str]:
        """Delete the rows of files whose time is over and that no unfinished batch reads; return their ids."""
        used = select(BATCHES.c.input_file_id).where(BATCHES.c.status.in_(UNFINISHED))
        expired = select(FILES.c.id).where(FILES.c.expires_at <= self._clock(), FILES.c.id.not_in(used)).limit(limit)
        with self._engine.begin() as connection:
            found = connection.execute(expired.with_for_update(skip_locked=True)).scalars().all()
            # once they are locked no batch of them is added, but one may have been since they were found
            ids = [*set(found) - set(connection.execute(used.where(BATCHES.c.input_file_id.in_(found))).scalars())]
            connection.execute(delete(FILES).where(FILES.c.id.in_(ids)))
        return ids

    def known_files(self, ids: Collection[str]) -> set[str]:
        """Return which of the ids are files of any owner."""
        with self._engine.begin() as connection:
            return set(connection.execute(select(FILES.c.id).where(FILES.c.id.in_(ids))).scalars())

    def drop_old_batches(self, before: float) -> None:
        """Delete the rows of batches that were made before that time and have ended."""
        old = select(BATCHES.c.id).where(BATCHES.c.created_at < before, BATCHES.c.status.not_in(UNFINISHED))
        with self._engine.begin() as connection:
            connection.execute(delete(SEGMENTS).where(SEGMENTS.c.batch_id.in_(old)))
            connection.execute(
                delete(BATCHES).where(BATCHES.c.created_at < before, BATCHES.c.status.not_in(UNFINISHED))
            )

    # ---- batches

    def add_batch(self, record: BatchRecord) -> None:
        """Add a batch of an input file of the same owner.

        Raises:
            ObjectNotFound: the owner has no such file.
            QuotaExceeded: the owner has too many unfinished batches, or nothing more may be stored.
        """
        with self._engine.begin() as connection:
            file = _file(connection, record.owner, record.input_file_id, is_locked=True)
            if file.purpose != "batch":
                raise ObjectNotFound(f"File {file.id} has the purpose {file.purpose}: a batch reads files for batch")
            self._room_of_all(connection)  # for its results
            count = connection.execute(
                select(func.count()).where(BATCHES.c.owner == record.owner, BATCHES.c.status.in_(UNFINISHED))
            ).scalar_one()
            if count >= self._quota.max_unfinished:
                raise QuotaExceeded(
                    f"Batch quota exceeded: this key has {count} unfinished batches (maximum "
                    f"{self._quota.max_unfinished}); wait until one has ended, or cancel one"
                )
            connection.execute(insert(BATCHES).values(msgspec.to_builtins(record)))

    def batch(self, owner: str, batch_id: str) -> BatchRecord:
        """Return a batch of the owner.

        Raises:
            ObjectNotFound.
        """
        with self._engine.begin() as connection:
            return _batch(connection, owner, batch_id)

    def batches(self, owner: str, page: Page) -> tuple[list[BatchRecord], bool]:
        """Return one page of the owner's batches, and whether there are more.

        Raises:
            ObjectNotFound: there is no batch `after`.
        """
        wanted = select(BATCHES).where(BATCHES.c.owner == owner)
        with self._engine.begin() as connection:
            after = _batch(connection, owner, page.after) if page.after is not None else None
            return _page(connection, BatchRecord, wanted, page, after)

    def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        """Ask for the end of a batch; its runner stops and keeps what is done. Idempotent until it has ended.

        Raises:
            ObjectNotFound, BatchFinished.
        """
        with self._engine.begin() as connection:
            _batch(connection, owner, batch_id)
            connection.execute(
                update(BATCHES)
                .where(BATCHES.c.id == batch_id, BATCHES.c.status.in_(("validating", "in_progress")))
                .values(status="cancelling", cancelling_at=self._clock())
            )
            found = _batch(connection, owner, batch_id)
        if found.status not in ("cancelling", "cancelled"):
            raise BatchFinished(f"Batch {batch_id} cannot be cancelled: its status is {found.status}")
        return found

    def unfinished_ids(self) -> set[str]:
        """Return the ids of all unfinished batches."""
        with self._engine.begin() as connection:
            return set(connection.execute(select(BATCHES.c.id).where(BATCHES.c.status.in_(UNFINISHED))).scalars())

    def count_by_status(self) -> dict[str, int]:
        """Return the number of batches by status."""
        with self._engine.begin() as connection:
            rows = connection.execute(select(BATCHES.c.status, func.count()).group_by(BATCHES.c.status)).all()
        return dict(tuple(row) for row in rows)

    def _room(self, connection: Connection, owner: str) -> Room:
        count, stored = connection.execute(
            select(func.count(), func.coalesce(func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
        ).one()
        if count >= self._quota.max_files:
            raise QuotaExceeded(
                f"File quota exceeded: this key has {count} files (maximum {self._quota.max_files}, "
                "MAX_FILES_PER_KEY); delete files"
            )
        if stored >= self._quota.max_bytes:
            raise QuotaExceeded(
                f"File quota exceeded: this key has stored {stored} bytes (maximum {self._quota.max_bytes}, "
                "MAX_BYTES_PER_KEY); delete files"
            )
        of_key = Room(int(self._quota.max_bytes - stored), "MAX_BYTES_PER_KEY")
        return min(of_key, self._room_of_all(connection))

    def _room_of_all(self, connection: Connection) -> Room:
        stored = _stored(connection)
        if stored >= self._quota.max_stored:
            raise QuotaExceeded(
                f"Storage full: {stored} bytes are stored for all keys (maximum {self._quota.max_stored}, "
                "MAX_STORED_BYTES); delete files, or wait until others expire"
            )
        return Room(self._quota.max_stored - stored, "MAX_STORED_BYTES")


def to_record(row: Mapping[Any, Any], kind: type[Record]) -> Record:
    """Build the record of a row, whose names are of a subclass of `str` that msgspec refuses."""
    return msgspec.convert({str(name): value for name, value in row.items()}, kind)


def _file(connection: Connection, owner: str, file_id: str, *, is_locked: bool = False) -> FileRecord:
    found = select(FILES).where(FILES.c.id == file_id, FILES.c.owner == owner)
    if is_locked:  # SQLite has no row locks and needs none: its transactions run one at a time
        found = found.with_for_update()
    row = connection.execute(found).mappings().one_or_none()
    if row is None:
        raise ObjectNotFound(f"No file {file_id!r}: GET /v1/files lists the files of this key")
    return to_record(row, FileRecord)


def _batch(connection: Connection, owner: str, batch_id: str) -> BatchRecord:
    found = select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.owner == owner)
    row = connection.execute(found).mappings().one_or_none()
    if row is None:
        raise ObjectNotFound(f"No batch {batch_id!r}: GET /v1/batches lists the batches of this key")
    return to_record(row, BatchRecord)


def _stored(connection: Connection) -> int:
    files = select(func.coalesce(func.sum(FILES.c.bytes), 0))
    running = (
        select(func.coalesce(func.sum(SEGMENTS.c.output_bytes + SEGMENTS.c.error_bytes), 0))
        .join(BATCHES, BATCHES.c.id == SEGMENTS.c.batch_id)
        .where(BATCHES.c.status.in_(UNFINISHED))
    )
    return sum(int(connection.execute(query).scalar_one()) for query in (files, running))


def _page(
    connection: Connection, kind: type[Listed], wanted: Select[Any], page: Page, after: Listed | None
) -> tuple[list[Listed], bool]:
    """Return the rows of a page behind `after`, by time of creation, and whether there are more."""
    created, ids = wanted.selected_columns.created_at, wanted.selected_columns.id
    if after is not None:
        is_later = or_(created > after.created_at, and_(created == after.created_at, ids > after.id))
        is_earlier = or_(created < after.created_at, and_(created == after.created_at, ids < after.id))
        wanted = wanted.where(is_later if page.is_ascending else is_earlier)
    columns: Sequence[Any] = (created, ids)
    order = [column if page.is_ascending else column.desc() for column in columns]
    rows = connection.execute(wanted.order_by(*order).limit(page.limit + 1)).mappings().all()
    return [to_record(row, kind) for row in rows[: page.limit]], len(rows) > page.limit
