"""Bulk jobs on a Ray cluster with a fake model whose windows take a while, for the tests of `embedyard embed --ray`.

python -m tests.testkit.ray_jobs ADDRESS IN OUT    runs a job, as a process that a test kills
"""

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engines.errors import UnsupportedModel
from engines.spec import Output
from router.bulk.job import BulkJob, run_job
from router.bulk.journal import JobState
from router.bulk.ray_data import RayRunner, join_cluster, plan_devices
from router.bulk.records import VectorWidths, WindowAnswer
from tests.unit.router.bulk.kit import FakeEmbedder, Silent, job_of

WINDOW_S = 0.15


class ActorEmbedder(FakeEmbedder):
    """Computes slowly, and writes its process id and each window's first text to a file.

    Args:
        log: the file.
        outputs: what to compute.
        poison: the process ends itself at a window with this text.
    """

    def __init__(self, log: Path, outputs: tuple[Output, ...] = ("dense",), poison: str = "") -> None:
        super().__init__(outputs)
        self._log, self._poison = log, poison

    async def embed(self, texts: list[str]) -> WindowAnswer:
        with self._log.open("a") as log:
            log.write(f"{os.getpid()} {texts[0]}\n")
        if self._poison in texts:
            os._exit(1)
        time.sleep(WINDOW_S)  # noqa: ASYNC251  # a device that computes
        return await super().embed(texts)


class BrokenEmbedder(FakeEmbedder):
    """Cannot load its model."""

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        raise UnsupportedModel("no such architecture")


class UnequalDevices(FakeEmbedder):
    """Tells other facts on each device."""

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        return VectorWidths(16, 4), {"id": "fake", "dtype": str(os.getpid())}


def run_on(address: str, job: BulkJob, open_embedder: Any) -> JobState:
    """Run a job on a cluster, and leave it."""
    join_cluster(address)
    runner = RayRunner(job, open_embedder, plan_devices(("auto",)), lambda line: None)
    return asyncio.run(run_job(job, runner, Silent()))


if __name__ == "__main__":
    cluster, source, target = sys.argv[1:]
    described = job_of(Path(source), Path(target))
    run_on(cluster, described, partial(ActorEmbedder, Path(f"{target}.log")))
