"""Bulk jobs on a Ray cluster with a fake model, for the tests of `embedyard embed --ray`.

python -m tests.testkit.ray_jobs ADDRESS IN OUT LOG TEXT    runs a job that waits at a text, for a test that kills it
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engines.errors import UnsupportedModel
from router.bulk.job import BulkJob, run_job
from router.bulk.journal import JobState
from router.bulk.ray_data import RayRunner, join_cluster, plan_devices
from router.bulk.records import VectorWidths, WindowAnswer
from tests.unit.router.bulk.kit import FakeEmbedder, Silent, job_of


class ActorEmbedder(FakeEmbedder):
    """Writes its process id and each window's first text to a file.

    Args:
        log: the file.
        dies_at: a process that is the first to have a window with this text kills itself.
        waits_at: a window with this text takes until `log` with the suffix `.go` exists.
    """

    def __init__(self, log: Path, dies_at: str = "", waits_at: str = "") -> None:
        super().__init__()
        self._log, self._dies_at, self._waits_at = log, dies_at, waits_at

    async def embed(self, texts: list[str]) -> WindowAnswer:
        is_first = not self._log.exists() or f" {texts[0]}\n" not in self._log.read_text()
        with self._log.open("a") as log:
            log.write(f"{os.getpid()} {texts[0]}\n")
        if self._dies_at in texts and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        while self._waits_at in texts and not self._log.with_suffix(".go").exists():  # noqa: ASYNC110  # a file of another process
            await asyncio.sleep(0.01)
        return await super().embed(texts)


class BrokenEmbedder(FakeEmbedder):
    """Cannot load its model."""

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        raise UnsupportedModel("no such architecture")


class UnequalDevices(FakeEmbedder):
    """Tells other facts on each device."""

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        return VectorWidths(16, 4), {"id": "fake", "dtype": hex(id(self))}


def run_on(address: str, job: BulkJob, open_embedder: Any) -> JobState:
    """Run a job on a cluster, and leave it."""
    join_cluster(address)
    runner = RayRunner(job, open_embedder, plan_devices(("auto",)), lambda line: None)
    return asyncio.run(run_job(job, runner, Silent()))


if __name__ == "__main__":
    cluster, source, target, written, text = sys.argv[1:]
    described = job_of(Path(source), Path(target))
    run_on(cluster, described, partial(ActorEmbedder, Path(written), waits_at=text))
