"""A bulk job over a fake model, and disks that fail, for the tests of this folder."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engines.testing.engine import fake_vector
from engines.testing.outputs import fake_row
from router.bulk.job import BulkJob, EmbedderRunner, run_job
from router.bulk.journal import Disk, JobState
from router.bulk.records import EmbedOptions, Refusal, Vectors, VectorWidths, WindowAnswer
from router.bulk.sources import Columns, InputFormat, open_sources
from router.bulk.writers import output_format

TEXT = Columns()
TOO_LONG = Refusal("context_length_exceeded", "too long")


class Killed(BaseException):
    """Stands for kill -9."""


class FakeEmbedder:
    """Vectors are hashes of the texts; texts with `long` in them are refused. `windows` records the calls."""

    def __init__(self, outputs: Sequence[str] = ("dense",), lanes: int = 1, space: str = "") -> None:
        self.lanes, self._outputs, self._space = lanes, outputs, space
        self.windows: list[list[str]] = []

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        return VectorWidths(16, 4), {"id": "fake", "space": self._space}

    async def embed(self, texts: list[str]) -> WindowAnswer:
        self.windows.append(texts)
        await asyncio.sleep(0)
        good = [text for text in texts if "long" not in text]
        rows = [] if self._outputs == ("dense",) else [fake_row(text) for text in good]
        vectors = Vectors(
            dense=np.stack([fake_vector("fake", text) for text in good]) if good and "dense" in self._outputs else None,
            sparse=[(row.entries, row.weights) for row in rows] if "sparse" in self._outputs else None,
            tokens=[row.vectors for row in rows] if "multi_vector" in self._outputs else None,
        )
        refusals = {index: TOO_LONG for index, text in enumerate(texts) if "long" in text}
        return WindowAnswer(vectors=vectors, refusals=refusals, num_tokens=len(texts))

    async def close(self) -> None:
        pass


class Silent:
    """Observes nothing."""

    def begin(self, state: JobState) -> None:
        pass

    def advance(self, state: JobState) -> None:
        pass


class FastDisk(Disk):
    """Waits for no disk: a test's files need not survive the machine."""

    def sync(self, file: BinaryIO) -> None:
        pass

    def sync_folder(self, folder: Path) -> None:
        pass


class FailingDisk(FastDisk):
    """Kills the process at its n-th change, in the middle of it; what was not synced may be lost with it."""

    def __init__(self, fails_at: int, chance: random.Random) -> None:
        self._left, self._chance = fails_at, chance
        self._synced: dict[BinaryIO, int] = {}
        self.count = 0

    def append(self, file: BinaryIO, data: bytes) -> None:
        self._synced.setdefault(file, file.tell())
        if self._is_last():
            super().append(file, data[: self._chance.randrange(len(data) + 1)])
            self._die()
        super().append(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._die_if_last()
        if not file.closed:
            super().sync(file)
            self._synced[file] = file.tell()

    def truncate(self, file: BinaryIO, size: int) -> None:
        self._die_if_last()
        super().truncate(file, size)

    def rename(self, old: Path, new: Path) -> None:
        self._die_if_last()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._die_if_last()
        super().remove(path)

    def _is_last(self) -> bool:
        self.count += 1
        self._left -= 1
        return self._left == 0

    def _die_if_last(self) -> None:
        if self._is_last():
            self._die()

    def _die(self) -> None:
        for file, synced in self._synced.items():
            if not file.closed and file.writable() and file.tell() > synced:
                file.truncate(self._chance.randrange(synced, file.tell() + 1))
        raise Killed


def job_of(  # noqa: PLR0913  # the options of the command
    source: Path, out: Path, *, columns: Columns = TEXT, outputs: Any = ("dense",), window_texts: int = 7,
    given: InputFormat | None = None, overwrite: bool = False,
) -> BulkJob:  # fmt: skip
    return BulkJob(
        sources=open_sources([str(source)], given),
        columns=columns,
        options=EmbedOptions(outputs=outputs),
        out=out,
        format=output_format(out, None),
        window_texts=window_texts,
        overwrite=overwrite,
    )


def run(job: BulkJob, embedder: FakeEmbedder | None = None, disk: Disk | None = None) -> JobState:
    runner = EmbedderRunner(job, embedder or FakeEmbedder(job.options.outputs))
    return asyncio.run(run_job(job, runner, Silent(), disk or FastDisk()))
