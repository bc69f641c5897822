"""`BatchService`: the files and batches of one server. It keeps disk and database off the event loop."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from secrets import token_hex
from typing import Any, Literal, TypeVar

from msgspec import Struct
from sqlalchemy.exc import SQLAlchemyError

from router.batches.batch_runner import BatchRunner
from router.batches.database import bind_folder, open_database
from router.batches.folder import DataFolder, is_id, new_id
from router.batches.leases import Leases
from router.batches.parts import Execute, RunParts, RunPolicy
from router.batches.records import BatchRecord, FileRecord, Page, Quota, Room
from router.batches.store import BatchStore
from router.batches.upload import Upload
from router.config.settings import Settings, SettingsError
from router.errors import ObjectNotFound, QuotaExceeded, StorageUnavailable, TooManyRequests
from router.schemas.batches import CreateBatchRequest, Purpose

MAX_UNFINISHED = 100
"""Unfinished batches of one key."""
MAX_UPLOADS, MAX_UPLOADS_OF_OWNER = 16, 4
"""Uploads at the same time."""
_OTHER_FOLDER = (
    "BATCH_DATABASE belongs to another DATA_DIR: all servers on one database share one folder (a network file system); "
    "mount it here, or use another database"
)
_WRITE_BYTES = 2**20
_LOOK_BYTES = 64 * 2**20
_STOP_GRACE_S = 10.0
_QUEUED_S = 10.0
"""How long a call waits for a thread: those that wait for a lock of the database must not make all others hang."""
_THREADS = 8
"""Twice as many as batches run at once: each may keep one busy for seconds."""
Value = TypeVar("Value")


class ServiceHooks(Struct, frozen=True, kw_only=True):
    """What the service needs of the server.

    Attributes:
        may_run: whether an owner may still run batches.
        on_line: told how many lines were journaled as `completed` or `failed`.
        on_end: told the status with which a batch has ended, and its seconds since it was created.
        clock: Unix time in seconds.
    """

    may_run: Callable[[str], bool]
    on_line: Callable[[str, int], None]
    on_end: Callable[[str, float], None]
    clock: Callable[[], float] = time.time


class BatchService:
    """Holds the folder, the database and the runner of one server.

    Args:
        settings: with DATA_DIR.
        hooks: of the server.

    Raises:
        SettingsError: the folder or the database cannot be used.
    """

    def __init__(self, settings: Settings, hooks: ServiceHooks) -> None:
        assert settings.data_dir is not None, "without it there is no service"
        self._settings = settings
        self._hooks = hooks
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="batches")
        self.folder = DataFolder(settings.data_dir)
        try:
            self.folder.create()
            self._database = open_database(settings.batch_database or f"sqlite:///{settings.data_dir / 'batches.db'}")
            if settings.batch_database is not None and not bind_folder(self._database, self.folder.identity()):
                raise SettingsError((_OTHER_FOLDER,))
        except OSError as error:
            raise SettingsError((f"DATA_DIR cannot be used: {error.strerror}",)) from None
        except (SQLAlchemyError, ImportError) as error:
            raise SettingsError((f"BATCH_DATABASE cannot be used: {type(error).__name__}",)) from None
        quota = Quota(
            max_files=settings.max_files_per_key,
            max_bytes=settings.max_bytes_per_key,
            max_unfinished=MAX_UNFINISHED,
            max_stored=settings.max_stored_bytes,
        )
        self._store = BatchStore(self._database, quota, hooks.clock)
        self._leases = Leases(self._database, token_hex(16), hooks.clock)
        self._runner: BatchRunner | None = None
        self._uploads = Counter[str]()
        self._uploading_bytes = 0

    @asynccontextmanager
    async def running(self, execute: Execute, draining: asyncio.Event) -> AsyncIterator[None]:
        """Run batches inside the block, until the server drains; then their leases are given back."""
        policy = RunPolicy(max_line_bytes=self._settings.max_body_bytes, retention_s=self._settings.file_retention_s)
        runner = BatchRunner(
            self._store,
            RunParts(
                folder=self.folder,
                leases=self._leases,
                execute=execute,
                policy=policy,
                executor=self._executor,
                share=lambda: max(1, self._settings.batch_concurrency // max(1, runner.num_running)),
                may_run=self._hooks.may_run,
                on_line=self._hooks.on_line,
                on_end=self._hooks.on_end,
            ),
        )
        self._runner = runner
        tasks = asyncio.create_task(runner.run()), asyncio.create_task(_stop_when(draining, runner))
        try:
            yield
        finally:
            tasks[1].cancel()
            await runner.stop(_STOP_GRACE_S)
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self._close)

    @property
    def counts(self) -> Mapping[str, int]:
        """Batches by status, a few seconds old."""
        return self._runner.counts if self._runner is not None else {}

    async def upload(self, owner: str, content_type: str, chunks: AsyncIterator[bytes]) -> FileRecord:
        """Store the file of a multipart body.

        Raises:
            InvalidValue, FileTooLarge, QuotaExceeded, TooManyRequests, StorageUnavailable.
        """
        with self._counted(owner) as written:
            room = min(
                await self._io(self._store.check_room, owner), Room(self._settings.max_file_bytes, "MAX_FILE_BYTES")
            )
            path = self.folder.new_upload()
            upload = Upload(content_type, path, room)
            try:
                async for data in _merged(chunks):
                    await self._check_disk(written, len(data))
                    await self._io(upload.write, data)
                return await asyncio.shield(asyncio.ensure_future(self._finish(self._publish, owner, upload, path)))
            finally:
                await asyncio.shield(asyncio.ensure_future(self._finish(upload.abandon)))

    async def _check_disk(self, written: Counter[str], num_bytes: int) -> None:
        """Count the bytes that are about to be written, and refuse them if all uploads together fill the storage.

        What is stored is asked for every 64 MiB of an upload: in between others may end, which were counted here.
        """
        if written["bytes"] % _LOOK_BYTES < num_bytes:
            written["stored"] = await self._io(self._store.stored_bytes)
        written["bytes"] += num_bytes
        self._uploading_bytes += num_bytes
        if written["stored"] + self._uploading_bytes > self._settings.max_stored_bytes:
            raise QuotaExceeded(
                f"Storage full: {written['stored']} bytes are stored for all keys, and {self._uploading_bytes} are in "
                f"uploads (maximum {self._settings.max_stored_bytes}, MAX_STORED_BYTES); delete files, or wait until "
                "others expire"
            )

    def _publish(self, owner: str, upload: Upload, path: Any) -> FileRecord:
        uploaded = upload.finish()
        now_s = self._hooks.clock()
        keep_s = min(self._settings.file_retention_s, uploaded.expires_after_s or float("inf"))
        record = FileRecord(
            id=new_id("file-"),
            owner=owner,
            purpose="batch",
            filename=uploaded.filename,
            bytes=uploaded.num_bytes,
            created_at=now_s,
            expires_at=now_s + keep_s,
        )
        self.folder.publish(path, record.id)
        try:
            self._store.add_file(record)
        except BaseException:
            self.folder.delete_files([record.id])
            raise
        return record

    async def file(self, owner: str, file_id: str) -> FileRecord:
        """Return a file of the owner; ObjectNotFound if it has none of this id."""
        _check_id(file_id, "file-")
        return await self._io(self._store.file, owner, file_id)

    async def files(self, owner: str, page: Page, purpose: Purpose | None) -> tuple[list[FileRecord], bool]:
        """Return one page of the owner's files, and whether there are more."""
        if page.after is not None:
            _check_id(page.after, "file-")
        return await self._io(self._store.files, owner, page, purpose)

    async def content(self, owner: str, file_id: str) -> tuple[FileRecord, AsyncIterator[bytes]]:
        """Return a file and its bytes, in pieces.

        Raises:
            ObjectNotFound: the owner has no such file.
            StorageUnavailable: its bytes are not on this server's disk.
        """
        record = await self.file(owner, file_id)
        file = await self._io(self.folder.open, file_id)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while data := await self._io(file.read, _WRITE_BYTES):
                    yield data
            finally:
                file.close()

        return record, pieces()

    async def delete_file(self, owner: str, file_id: str) -> None:
        """Delete a file; ObjectNotFound, or FileInUse while a batch reads it."""
        _check_id(file_id, "file-")
        await self._io(self._store.delete_file, owner, file_id)
        await self._io(self.folder.delete_files, [file_id])

    async def create_batch(self, owner: str, wanted: CreateBatchRequest) -> BatchRecord:
        """Add a batch, which begins soon.

        Raises:
            ObjectNotFound: the owner has no such input file.
            QuotaExceeded: the owner has too many unfinished batches.
        """
        _check_id(wanted.input_file_id, "file-")
        now_s = self._hooks.clock()
        record = BatchRecord(
            id=new_id("batch_"),
            owner=owner,
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            completion_window=wanted.completion_window,
            status="validating",
            created_at=now_s,
            expires_at=now_s + window_s(wanted.completion_window),
            metadata=wanted.metadata,
        )
        await self._io(self._store.add_batch, record)
        self._wake(record.id)
        return record

    async def batch(self, owner: str, batch_id: str) -> BatchRecord:
        """Return a batch of the owner; ObjectNotFound if it has none of this id."""
        _check_id(batch_id, "batch_")
        return await self._io(self._store.batch, owner, batch_id)

    async def batches(self, owner: str, page: Page) -> tuple[list[BatchRecord], bool]:
        """Return one page of the owner's batches, and whether there are more."""
        if page.after is not None:
            _check_id(page.after, "batch_")
        return await self._io(self._store.batches, owner, page)

    async def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        """Ask for the end of a batch; ObjectNotFound, or BatchFinished."""
        _check_id(batch_id, "batch_")
        record = await self._io(self._store.cancel, owner, batch_id)
        self._wake(batch_id)
        return record

    def _wake(self, batch_id: str) -> None:
        if self._runner is not None:
            self._runner.wake(batch_id)

    @contextmanager
    def _counted(self, owner: str) -> Iterator[Counter[str]]:
        """Count an upload while it runs; yield the counter of its bytes."""
        if self._uploads.total() >= MAX_UPLOADS or self._uploads[owner] >= MAX_UPLOADS_OF_OWNER:
            raise TooManyRequests(
                f"Upload limit reached: {self._uploads[owner]} uploads of this key (maximum {MAX_UPLOADS_OF_OWNER}), "
                f"{self._uploads.total()} of all (maximum {MAX_UPLOADS}); retry"
            )
        self._uploads[owner] += 1
        written = Counter[str]()
        try:
            yield written
        finally:
            self._uploading_bytes -= written["bytes"]
            self._uploads[owner] -= 1
            self._uploads += Counter()  # without the owners that have none

    def _close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._database.dispose()

    async def _io(self, function: Callable[..., Value], *args: Any) -> Value:
        """Call on a thread.

        Raises:
            StorageUnavailable: it failed, or no thread was free in time; then it was not called.
        """
        queued = self._executor.submit(function, *args)
        called = asyncio.wrap_future(queued)
        with _translated():
            try:
                await asyncio.wait({called}, timeout=_QUEUED_S)
            except asyncio.CancelledError:
                called.cancel()
                raise
            if not called.done() and queued.cancel():
                raise StorageUnavailable("The storage of files and batches is busy; retry", retry_after_s=5.0)
            return await called

    async def _finish(self, function: Callable[..., Value], *args: Any) -> Value:
        """Call on a thread, however long one is waited for."""
        with _translated():
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


@contextmanager
def _translated() -> Iterator[None]:
    """Raise StorageUnavailable for errors of the disk and the database."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise StorageUnavailable(
            f"The storage of files and batches is not available ({type(error).__name__}); retry", retry_after_s=5.0
        ) from error


async def _stop_when(draining: asyncio.Event, runner: BatchRunner) -> None:
    await draining.wait()
    await runner.stop(_STOP_GRACE_S)


def window_s(text: str) -> float:
    """Return the seconds of a `completion_window`."""
    unit = {"m": 60.0, "h": 3600.0, "d": 86400.0}[text[-1]]
    return int(text[:-1]) * unit


async def _merged(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Merge chunks to about 1 MiB, because each call on a thread takes 0.1 ms."""
    found: list[bytes] = []
    num_bytes = 0
    async for chunk in chunks:
        found.append(chunk)
        num_bytes += len(chunk)
        if num_bytes >= _WRITE_BYTES:
            yield b"".join(found)
            found, num_bytes = [], 0
    if found:
        yield b"".join(found)


def _check_id(text: str, prefix: Literal["file-", "batch_"]) -> None:
    """Refuse what no id of ours looks like before it reaches the database."""
    if not (is_id(text) and text.startswith(prefix)):
        name = "file" if prefix == "file-" else "batch"
        raise ObjectNotFound(f"No {name} {text[:100]!r}: the ids of this key's begin with {prefix}")
