"""Runs jobs on a real Ray cluster of two nodes on this machine, two actors.

Run by `test_ray_suites.py` in a separate process, because Ray changes the process it runs in; by hand:

    python -m pytest -o asyncio_mode=strict -o filterwarnings=default tests/unit/router/bulk/ray_suite.py
"""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from engines.spec import Output
from router.bulk.job import BulkJob, Embedder, run_job
from router.bulk.journal import JobState
from router.bulk.ray_data import DevicePlan, RayRunner, WindowWorker, join_cluster, window_blocks
from router.bulk.records import BulkError, BulkStopped, Cursor
from router.bulk.sources import Columns
from tests.testkit.ray_jobs import ActorEmbedder, BrokenEmbedder, UnequalDevices, run_on
from tests.testkit.servers import MODULE, ROOT, environment
from tests.unit.router.bulk.kit import FakeEmbedder, FastDisk, Silent, job_of, run
from tests.unit.router.bulk.test_job import published, write_input

import ray  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

COLUMNS = Columns(id="id", kept=("title",))
MODEL = "all-MiniLM-L6-v2"
HALFWAY = "text 60 "
WAIT_S = 150.0
"""Much longer than on a quiet machine (8 s): others may use the cores."""


@pytest.fixture
def address(ray_cluster: Cluster) -> str:
    return str(ray_cluster.address)


def wait_for(path: Path, lines: int) -> list[str]:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        found = path.read_text(errors="replace").splitlines() if path.exists() else []
        if len(found) >= lines:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{path.name} has fewer than {lines} lines")


def undisturbed(job: BulkJob, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    run(job_of(Path(job.sources[0].path), folder / job.out.name, columns=job.columns, outputs=job.options.outputs))
    return published(folder)


# Without the cluster: the same blocks, computed by two workers in this process.


def compute_here(monkeypatch: pytest.MonkeyPatch, *open_embedders: Callable[[], Embedder]) -> None:
    """Replace the pipeline by workers that take turns."""

    def answers(job: BulkJob, start: Cursor, *_: object) -> Generator[Any]:
        workers = cycle(WindowWorker(one) for one in open_embedders)
        yield from (worker(block) for worker, block in zip(workers, window_blocks(job, start), strict=False))

    monkeypatch.setattr("router.bulk.ray_data._answers", answers)


def run_here(job: BulkJob) -> JobState:
    runner = RayRunner(job, FakeEmbedder, DevicePlan(actors=2), lambda line: None)
    return asyncio.run(run_job(job, runner, Silent(), FastDisk()))


def test_every_output_has_the_bytes_of_a_job_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: tuple[Output, ...] = ("dense", "sparse", "multi_vector")
    compute_here(monkeypatch, *[partial(FakeEmbedder, outputs)] * 2)
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "in.jsonl")
    (tmp_path / "out").mkdir()
    job = job_of(Path("in.jsonl"), tmp_path / "out" / "out.parquet", columns=COLUMNS, outputs=outputs)
    state = run_here(job)

    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")
    assert (state.rows, state.refused) == (57, 3)


@pytest.mark.parametrize(("open_embedder", "message"), [
    (BrokenEmbedder, "no such architecture"),
    (UnequalDevices, "the devices of the cluster differ in dtype of the model: run the job on devices of one kind"),
])  # fmt: skip
def test_what_ends_a_job_is_told_as_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_embedder: Callable[[], Embedder], message: str
) -> None:
    compute_here(monkeypatch, open_embedder, open_embedder)
    with pytest.raises(BulkError, match=message):
        run_here(job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"))


def test_a_window_that_the_cluster_gave_up_stops_the_job_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(job: BulkJob, start: Cursor, *_: object) -> Generator[Any]:
        worker = WindowWorker(FakeEmbedder)
        yield from map(worker, islice(window_blocks(job, start), 3))
        raise RuntimeError("\nthe actor died 4 times\n  a traceback")

    monkeypatch.setattr("router.bulk.ray_data._answers", answers)
    with pytest.raises(BulkStopped, match=r"the cluster has lost a window: RuntimeError: the actor died 4 times$"):
        run_here(job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_column_that_a_file_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_here(monkeypatch, FakeEmbedder)
    (tmp_path / "in.csv").write_text("text\none\n")
    with pytest.raises(BulkError, match="has no column 'body'"):
        run_here(job_of(tmp_path / "in.csv", tmp_path / "out.jsonl", columns=Columns(text="body")))


def test_an_address_where_nothing_listens_is_told() -> None:
    with pytest.raises(BulkError, match=r"no Ray cluster answers at 127.0.0.1:1: .* --ray local"):
        join_cluster("127.0.0.1:1")
    with pytest.raises(BulkError, match="Ray Client"):
        join_cluster("ray://127.0.0.1:10001")


class WaitsForItsJoin(threading.Thread):
    """Stands for a thread of Ray Data's that takes long to see that it is stopped."""

    def __init__(self) -> None:
        super().__init__(name="iter_threaded", daemon=True)
        self._joined = threading.Event()

    def run(self) -> None:
        self._joined.wait()

    def join(self, timeout: float | None = None) -> None:
        self._joined.set()
        super().join(timeout)


def test_the_cluster_is_left_when_no_thread_of_the_pipeline_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because one that calls Ray later ends the process with status 1."""
    compute_here(monkeypatch, FakeEmbedder)
    thread = WaitsForItsJoin()
    thread.start()
    alive: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: alive.append(thread.is_alive()))
    run_here(job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"))

    assert alive == [False]


# On the cluster.


def test_a_job_whose_actor_is_killed_has_each_id_once(address: str, tmp_path: Path) -> None:
    source, log = write_input(tmp_path / "in.jsonl", 120), tmp_path / "log"
    (tmp_path / "out").mkdir()
    job = job_of(source, tmp_path / "out" / "out.jsonl", columns=COLUMNS)
    run_on(address, job, partial(ActorEmbedder, log, dies_at=HALFWAY))

    first_texts = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    assert len(first_texts) > len(set(first_texts)), "another process computed what the killed one had"
    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")


def test_a_job_whose_driver_is_killed_goes_on_behind_what_was_committed(address: str, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 120)
    (tmp_path / "out").mkdir()
    job, log = job_of(source, tmp_path / "out" / "out.jsonl"), tmp_path / "log"
    command = [sys.executable, "-W", "ignore", "-m", "tests.testkit.ray_jobs", address, str(source), str(job.out)]
    command += [str(log), HALFWAY]
    with (tmp_path / "printed").open("w") as printed, subprocess.Popen(command, cwd=ROOT, stderr=printed) as driver:
        commits = len(wait_for(tmp_path / "out" / "out.jsonl.journal", 5)) - 1
        driver.kill()
    assert not job.out.exists()
    log.with_suffix(".go").touch()
    run_on(address, job, partial(ActorEmbedder, tmp_path / "second"))

    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")
    assert len((tmp_path / "second").read_text().splitlines()) <= 18 - commits, "of 18 windows"


def test_a_job_without_a_free_device_says_so_and_can_be_cancelled(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    lines: list[str] = []
    monkeypatch.setattr("router.bulk.ray_data._NOTICE_S", 0.2)

    async def cancel_once_told() -> None:
        runner = RayRunner(job, FakeEmbedder, DevicePlan(actors=1, cpus=64), lines.append)
        task = asyncio.create_task(run_job(job, runner, Silent()))
        while not lines:  # noqa: ASYNC110  # a line is no event
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    join_cluster(address)
    asyncio.run(cancel_once_told())

    assert "all devices are in use" in lines[0]
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("Streaming", "iter_threaded"))]
    assert left == [], "a thread that calls Ray once the cluster is left ends the process"


def test_the_command_has_the_bytes_of_the_ordinary_form(address: str, tmp_path: Path) -> None:
    """With a real model."""
    write_input(tmp_path / "in.jsonl", 60)
    command = [*MODULE, "embed", MODEL, "in.jsonl", "--id-column", "id", "--window", "8", "-o"]
    environ = environment(str(tmp_path / "state"))
    alone = ["taskset", "-c", "0", *command, "whole.jsonl"]
    found = [
        subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=WAIT_S)
        for words in (alone, [*command, "ray.jsonl", "--ray", address])
    ]

    assert [done.returncode for done in found] == [1, 1], found
    assert "ray.jsonl: 58 texts" in found[1].stderr
    assert "Traceback" not in found[1].stderr
    assert "Warning" not in found[1].stderr
    for name in (".jsonl", ".jsonl.errors.jsonl"):
        assert (tmp_path / f"ray{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
