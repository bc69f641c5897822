"""Runs a bulk job: reads windows of records, has them embedded, and commits each once it is on the disk.

What a window holds depends on the input alone, so that a job that was killed goes on with the same windows.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import msgspec
import orjson
from msgspec import Struct

from router.bulk.journal import DATA, ERRORS, IDS, SPACE, Disk, JobState, Journal, open_journal
from router.bulk.readers import read_records
from router.bulk.records import Cursor, EmbedOptions, Record, Refusal, VectorWidths, WindowAnswer
from router.bulk.sources import Columns, Source
from router.bulk.writers import JobShape, OutputFormat, WindowWriter, open_writer

_WINDOW_TEXTS = 2048
_WINDOW_CHARS = 2**19
"""About 130,000 tokens: on two cores 16 s of a small model, which is what a kill costs at the most. Texts are sorted by
length within a window."""

_WINDOW_CHARS_TOKENS = 2**16
"""With a vector for each token: 1,024 wide, 16,000 tokens take 64 MB."""


class Embedder(Protocol):
    """Computes the outputs of windows.

    `lanes`: windows that it takes at once.
    """

    lanes: int

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """Make the model ready; return its widths, and what else its vectors depend on.

        Raises:
            BulkError, BulkStopped.
        """

    async def embed(self, texts: list[str]) -> WindowAnswer:
        """Return the outputs of texts; refusals are about single texts.

        Raises:
            BulkError, BulkStopped: for the whole job.
        """

    async def close(self) -> None:
        """Free everything."""


class WindowRunner(Protocol):
    """Reads and computes the windows of one job."""

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """See `Embedder.open`."""

    def run(self, start: Cursor) -> "AsyncGenerator[tuple[TextWindow, WindowAnswer | None]]":
        """Yield the windows behind a place, in the order of the input, with their outputs.

        The answer is None where no text of the window can be embedded.

        Raises:
            BulkError, BulkStopped: for the whole job.
        """

    async def close(self) -> None:
        """Free everything."""


class Observer(Protocol):
    """Is told how far a job is."""

    def begin(self, state: JobState) -> None:
        """The job begins, or goes on, behind this state."""

    def advance(self, state: JobState) -> None:
        """A window was committed."""


class BulkJob(Struct, frozen=True, kw_only=True):
    """What is read, computed and written.

    Args:
        window_texts: the most texts of a window.
    """

    sources: tuple[Source, ...]
    columns: Columns
    options: EmbedOptions
    out: Path
    format: OutputFormat
    overwrite: bool = False
    window_texts: int = _WINDOW_TEXTS

    @property
    def window_chars(self) -> int:
        """The characters from which on a window takes no further text."""
        return _WINDOW_CHARS_TOKENS if "multi_vector" in self.options.outputs else _WINDOW_CHARS

    def describe(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that the bytes of the output depend on, as JSON; files by their size and time."""
        files = [(str(Path(source.path).absolute()), source.format, *_stamp(source)) for source in self.sources]
        described = {
            "input": files, "columns": self.columns, "options": self.options, "format": self.format,
            "window": (self.window_texts, self.window_chars),
            "model": {name: value for name, value in model.items() if name != SPACE}, SPACE: model.get(SPACE, ""),
        }  # fmt: skip
        return msgspec.json.decode(msgspec.json.encode(described), type=dict[str, Any])


def _stamp(source: Source) -> tuple[int, int]:
    if source.path == "-":
        return 0, 0
    found = Path(source.path).stat()
    return found.st_size, found.st_mtime_ns


class TextWindow(Struct, frozen=True):
    """Records that are computed and committed together."""

    records: list[Record]

    @property
    def good(self) -> list[Record]:
        """Those whose text can be embedded."""
        return [record for record in self.records if record.refusal is None]


async def run_job(job: BulkJob, runner: WindowRunner, observer: Observer, disk: Disk | None = None) -> JobState:
    """Run the job from where it stopped to its end; returns its final state.

    Cancelled, it keeps the windows that are committed.

    Raises:
        BulkError: the job cannot run as it is described.
        BulkStopped: it stopped before its end; run it again.
    """
    try:
        widths, model = await runner.open()
        shape = JobShape(sources=job.sources, columns=job.columns, options=job.options, widths=widths)
        writer = open_writer(job.format, shape)
        journal = open_journal(job.out, job.describe(model), disk or Disk(), overwrite=job.overwrite)
        try:
            observer.begin(journal.state)
            if not journal.state.is_ready:
                await _commit_windows(runner, _Committer(journal, writer, observer))
            await asyncio.to_thread(_publish, journal, writer)
            return journal.state
        finally:
            journal.close()
    finally:
        await runner.close()


async def _commit_windows(runner: WindowRunner, committer: "_Committer") -> None:
    async with aclosing(runner.run(committer.cursor)) as answers:
        async for window, answer in answers:
            commit = asyncio.ensure_future(asyncio.to_thread(committer.commit, window, answer))
            try:
                await asyncio.shield(commit)
            except asyncio.CancelledError:
                await commit  # the files are closed next
                raise


def _publish(journal: Journal, writer: WindowWriter) -> None:
    state = journal.state
    writers = {DATA: lambda partial, target: writer.finish(partial, target, state.rows)}
    if writer.has_ids_file:
        writers[IDS] = lambda partial, target: _copy(partial, target)
    if state.refused:
        writers[ERRORS] = lambda partial, target: _copy(partial, target)
    journal.publish(writers)


def _copy(partial: Path, target: Any) -> None:
    with partial.open("rb") as source:
        while piece := source.read(2**20):
            target.write(piece)


def read_windows(job: BulkJob, start: Cursor) -> Iterator[TextWindow]:
    """Yield the windows behind a place.

    Raises:
        BulkError: see `read_records`.
    """
    records: list[Record] = []
    num_chars = 0
    for record in read_records(job.sources, job.columns, start):
        records.append(record)
        num_chars += len(record.text)
        if len(records) >= job.window_texts or num_chars >= job.window_chars:
            yield TextWindow(records)
            records, num_chars = [], 0
    if records:
        yield TextWindow(records)


class EmbedderRunner:
    """Keeps the lanes of an embedder busy (`WindowRunner`), also while a window is committed.

    Args:
        job: what is read.
        embedder: computes.
    """

    def __init__(self, job: BulkJob, embedder: Embedder) -> None:
        self._job, self._embedder = job, embedder

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """See `WindowRunner`."""
        return await self._embedder.open()

    async def run(self, start: Cursor) -> AsyncGenerator[tuple[TextWindow, WindowAnswer | None]]:
        """See `WindowRunner`; the next window is read while one is computed."""
        windows = read_windows(self._job, start)
        running: deque[tuple[TextWindow, asyncio.Task[WindowAnswer | None]]] = deque()
        try:
            while (window := await asyncio.to_thread(next, windows, None)) is not None:
                done = await _first(running) if len(running) == self._embedder.lanes else None
                running.append((window, asyncio.create_task(self._embed(window))))
                await asyncio.sleep(0)  # the task begins before the last window is committed
                if done is not None:
                    yield done
            while running:
                yield await _first(running)
        finally:
            for _, task in running:
                task.cancel()
            await asyncio.gather(*(task for _, task in running), return_exceptions=True)

    async def close(self) -> None:
        """See `WindowRunner`."""
        await self._embedder.close()

    async def _embed(self, window: TextWindow) -> WindowAnswer | None:
        texts = [record.text for record in window.good]
        return await self._embedder.embed(texts) if texts else None


async def _first(
    running: "deque[tuple[TextWindow, asyncio.Task[WindowAnswer | None]]]",
) -> tuple[TextWindow, WindowAnswer | None]:
    """Wait for the first of the windows that are computed, and take it off."""
    window, task = running[0]
    answer = await task
    running.popleft()
    return window, answer


class _Committer:
    """Appends windows to the job's files, and commits them."""

    def __init__(self, journal: Journal, writer: WindowWriter, observer: Observer) -> None:
        self._journal, self._writer, self._observer = journal, writer, observer
        if not journal.state.sizes[0]:
            journal.append(DATA, writer.head())

    @property
    def cursor(self) -> Cursor:
        """Where the next window begins."""
        return self._journal.state.cursor

    def commit(self, window: TextWindow, answer: WindowAnswer | None) -> None:
        """Write a window; on a thread, as it waits for the disk."""
        good, refused = window.good, {r.number: r.refusal for r in window.records if r.refusal is not None}
        if answer is not None:
            refused |= {good[index].number: refusal for index, refusal in answer.refusals.items()}
            good = [record for record in good if record.number not in refused]
        if answer is not None and good:
            for piece in self._writer.encode(good, answer.vectors):
                self._journal.append(DATA, piece)
            self._journal.append(IDS, self._writer.encode_ids(good))
        lines = (_error_line(record, refused[record.number]) for record in window.records if record.number in refused)
        self._journal.append(ERRORS, b"".join(lines))
        self._journal.commit(
            window.records[-1].after,
            rows=len(good),
            refused=len(refused),
            tokens=answer.num_tokens if answer is not None else 0,
        )
        self._observer.advance(self._journal.state)


def _error_line(record: Record, refusal: Refusal) -> bytes:
    error = {"code": refusal.code, "message": refusal.message}
    return orjson.dumps({"id": record.id, "line": record.number, "error": error}, option=orjson.OPT_APPEND_NEWLINE)
