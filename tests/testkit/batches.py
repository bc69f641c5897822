"""Runs batches without a server: a folder with its database, lines that answer themselves, and a death at any step."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from msgspec import structs
from sqlalchemy import Engine, event

from router.batches.batch_run import BatchRun
from router.batches.batch_runner import BatchRunner
from router.batches.database import open_database
from router.batches.folder import DataFolder
from router.batches.leases import Leases
from router.batches.parts import Execute, LineAnswer, LineWork, RunParts, RunPolicy
from router.batches.records import BatchRecord, FileRecord, Quota, Segment
from router.batches.store import BatchStore
from router.schemas.batches import BatchError, BatchStatus

OWNER = "key:web"
INPUT_ID, BATCH_ID = "file-" + "1" * 32, "batch_" + "2" * 32
QUOTA = Quota(max_files=100, max_bytes=10**9, max_unfinished=3, max_stored=2 * 10**9)
MAX_LINE_BYTES = 10_000
HOUR_S = 3600.0
Value = TypeVar("Value")

BATCH = BatchRecord(
    id=BATCH_ID, owner=OWNER, endpoint="/v1/embeddings", input_file_id=INPUT_ID, completion_window="1h",
    status="validating", created_at=0.0, expires_at=HOUR_S,
)  # fmt: skip


def line(custom_id: str, text: str = "a", **more: Any) -> str:
    """Return one line of an input file; `more` replaces fields."""
    body = {"model": "mini", "input": text}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body} | more)


def file_record(file_id: str = INPUT_ID, **more: Any) -> FileRecord:
    record = FileRecord(
        id=file_id, owner=OWNER, purpose="batch", filename="in.jsonl", bytes=10, created_at=0.0, expires_at=10.0**9
    )
    return structs.replace(record, **more)


async def echo(work: LineWork) -> LineAnswer:
    """Answer with the body, as an endpoint answers with vectors."""
    await asyncio.sleep(0)
    return LineAnswer(200, work.body)


class Killed(BaseException):
    """The process has died at this step."""


class Fuse:
    """Counts the steps of one life, and ends it: from then on every step fails, as nothing of a dead process runs."""

    def __init__(self, steps: float = float("inf"), rng: random.Random | None = None) -> None:
        self.left = steps
        self.rng = rng or random.Random(0)

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    @property
    def is_dying(self) -> bool:
        """Whether the next step is the last."""
        return self.left < 1


class MortalFolder(DataFolder):
    """A folder whose writes may be cut anywhere."""

    def __init__(self, root: Path, fuse: Fuse) -> None:
        super().__init__(root)
        self._fuse = fuse

    def append(self, file: BinaryIO, data: bytes) -> None:
        if self._fuse.is_dying:
            file.write(data[: self._fuse.rng.randrange(len(data) + 1)])
            file.flush()
        self._fuse.step()
        super().append(file, data)
        self._fuse.step()

    def publish(self, source: Path, file_id: str) -> None:
        self._fuse.step()
        super().publish(source, file_id)
        self._fuse.step()

    def delete_segments(self, batch_id: str, epochs: Iterable[int]) -> None:
        self._fuse.step()
        super().delete_segments(batch_id, list(epochs))


class MortalLeases(Leases):
    """Leases whose transactions are the last thing that a process does, or the first that it does not do."""

    def __init__(self, engine: Engine, holder: str, clock: Callable[[], float], fuse: Fuse) -> None:
        super().__init__(engine, holder, clock)
        self._fuse = fuse

    def begin(self, batch: BatchRecord, total: int) -> None:
        self._around(lambda: super(MortalLeases, self).begin(batch, total))

    def advance(self, batch: BatchRecord, segment: Segment) -> None:
        self._around(lambda: super(MortalLeases, self).advance(batch, segment))

    def begin_finalizing(self, batch: BatchRecord) -> bool:
        return self._around(lambda: super(MortalLeases, self).begin_finalizing(batch))

    def finish(
        self, batch: BatchRecord, status: BatchStatus, files: Mapping[str, FileRecord], errors: Sequence[BatchError]
    ) -> None:
        self._around(lambda: super(MortalLeases, self).finish(batch, status, files, errors))

    def _around(self, transaction: Callable[[], Value]) -> Value:
        self._fuse.step()
        done = transaction()
        self._fuse.step()
        return done


class BatchWorld:
    """One folder and database, and the servers on it.

    Attributes:
        now_s: what all clocks tell.
        allowed: the owners that may run batches.
        counted: the outcomes that were counted.
        ended: the batches that were counted, with their seconds.
    """

    def __init__(self, root: Path, database: str | None = None) -> None:
        self.root = root
        self.now_s = 0.0
        self.allowed = {OWNER}
        self.counted: list[tuple[str, int]] = []
        self.ended: list[tuple[str, float]] = []
        self.folder = DataFolder(root)
        self.folder.create()
        self.engine = open_database(database or f"sqlite:///{root / 'batches.db'}")
        if database is None:  # these deaths are of processes, not of machines, and a sync takes 10 ms on a busy disk
            event.listen(self.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
            self.engine.dispose()
        self.store = BatchStore(self.engine, QUOTA, lambda: self.now_s)
        self.leases = self.leases_of("looker")

    def leases_of(self, holder: str) -> Leases:
        return Leases(self.engine, holder, lambda: self.now_s)

    def add(self, text: bytes, batch: BatchRecord = BATCH) -> None:
        """Store an input file and a batch of it."""
        self.folder.file(batch.input_file_id).write_bytes(text)
        self.store.add_file(file_record(batch.input_file_id, owner=batch.owner, bytes=len(text)))
        self.store.add_batch(batch)

    @contextmanager
    def server(
        self, execute: Execute = echo, *, holder: str = "server", fuse: Fuse | None = None, **policy: Any
    ) -> Iterator[BatchRunner]:
        """Yield the runner of one server, which nothing runs yet."""
        fuse = fuse or Fuse()
        bounds = {
            "max_line_bytes": MAX_LINE_BYTES,
            "retention_s": HOUR_S,
            "flush_s": 0.0,
            "poll_s": 0.01,
            "outage_s": 0.0,
        }
        with ThreadPoolExecutor(4) as executor:
            parts = RunParts(
                folder=MortalFolder(self.root, fuse),
                leases=MortalLeases(self.engine, holder, lambda: self.now_s, fuse),
                execute=execute,
                policy=RunPolicy(**(bounds | policy)),
                executor=executor,
                share=lambda: 4,
                may_run=self.allowed.__contains__,
                on_line=lambda outcome, number: self.counted.append((outcome, number)),
                on_end=lambda status, seconds: self.ended.append((status, seconds)),
                sleep=lambda _: asyncio.sleep(0),
            )
            yield BatchRunner(self.store, parts)

    def batch(self, batch: BatchRecord = BATCH) -> BatchRecord:
        return self.store.batch(batch.owner, batch.id)

    def output(self, batch: BatchRecord = BATCH) -> bytes:
        """Return the output file; empty without one."""
        return self._bytes(self.batch(batch).output_file_id)

    def errors(self, batch: BatchRecord = BATCH) -> bytes:
        """Return the error file; empty without one."""
        return self._bytes(self.batch(batch).error_file_id)

    def _bytes(self, file_id: str | None) -> bytes:
        if file_id is None:
            return b""
        record = self.store.file(OWNER, file_id)
        data = self.folder.file(file_id).read_bytes()
        assert len(data) == record.bytes
        return data


def with_id(batch: BatchRecord, number: int, **more: Any) -> BatchRecord:
    """Return a batch with ids and an input of its own."""
    return structs.replace(batch, **{"id": f"batch_{number:032x}", "input_file_id": f"file-{number:032x}"} | more)


def parsed(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(row) for row in text.splitlines()]


def make_run(runner: BatchRunner) -> BatchRun:
    """Claim the next batch as this server, to run it without the server's loop."""
    batch = runner._parts.leases.claim(Counter())
    assert batch is not None
    return BatchRun(runner._parts, batch)


async def run_here(world: BatchWorld, execute: Execute = echo, **options: Any) -> None:
    """Run the next batch on a new server."""
    with world.server(execute, **options) as runner:
        await make_run(runner).run()
