"""Runs jobs on a real Ray cluster of two nodes on this machine, two actors.

Run by `test_ray_data.py` in a separate process, because Ray changes the process it runs in; by hand:

    python -m pytest -o asyncio_mode=strict -o filterwarnings=default tests/unit/router/bulk/ray_suite.py
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from router.bulk.job import BulkJob, run_job
from router.bulk.ray_data import DevicePlan, RayRunner, join_cluster
from router.bulk.readers import Columns
from router.bulk.records import BulkError, BulkStopped
from tests.testkit.ray_jobs import ActorEmbedder, BrokenEmbedder, UnequalDevices, run_on
from tests.testkit.servers import MODULE, ROOT, environment
from tests.unit.router.backends.ray_suite import STORE_BYTES, add_node
from tests.unit.router.bulk.kit import FakeEmbedder, Silent, job_of, run
from tests.unit.router.bulk.test_job import published, write_input

import ray  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

COLUMNS = Columns(id="id", kept=("title",))
MODEL = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    add_node(made)
    yield made.address
    ray.shutdown()
    made.shutdown()


def wait_for(path: Path, lines: int) -> list[str]:
    until = time.monotonic() + 60
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


@pytest.mark.parametrize(("name", "outputs"), [
    ("out.jsonl", ("dense",)), ("out.parquet", ("dense", "sparse", "multi_vector")),
])  # fmt: skip
def test_the_files_are_those_of_a_job_without_a_cluster(
    address: str, tmp_path: Path, name: str, outputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "in.jsonl")
    (tmp_path / "out").mkdir()
    job = job_of(Path("in.jsonl"), tmp_path / "out" / name, columns=COLUMNS, outputs=outputs)
    state = run_on(address, job, partial(FakeEmbedder, outputs))

    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")
    assert (state.rows, state.refused) == (57, 3)


def test_a_job_whose_actor_is_killed_has_each_id_once(address: str, tmp_path: Path) -> None:
    source, log = write_input(tmp_path / "in.jsonl", 120), tmp_path / "log"
    (tmp_path / "out").mkdir()
    job = job_of(source, tmp_path / "out" / "out.jsonl", columns=COLUMNS)
    killer = threading.Thread(target=lambda: os.kill(int(wait_for(log, 4)[3].split()[0]), signal.SIGKILL))
    killer.start()
    run_on(address, job, partial(ActorEmbedder, log))
    killer.join()

    pids = {line.split()[0] for line in log.read_text().splitlines()}
    assert len(pids) == 3, "two actors, and one in the place of the killed one"
    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")


def test_a_job_whose_driver_is_killed_goes_on_behind_what_was_committed(address: str, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 120)
    (tmp_path / "out").mkdir()
    job, log = job_of(source, tmp_path / "out" / "out.jsonl"), tmp_path / "out" / "out.jsonl.log"
    command = [sys.executable, "-W", "ignore", "-m", "tests.testkit.ray_jobs", address, str(source), str(job.out)]
    with (tmp_path / "printed").open("w") as printed, subprocess.Popen(command, cwd=ROOT, stderr=printed) as driver:
        commits = len(wait_for(tmp_path / "out" / "out.jsonl.journal", 5)) - 1
        driver.kill()
    assert not job.out.exists()
    log.unlink()
    run_on(address, job, partial(ActorEmbedder, tmp_path / "log"))
    log.unlink(missing_ok=True)

    assert published(tmp_path / "out") == undisturbed(job, tmp_path / "whole")
    assert len((tmp_path / "log").read_text().splitlines()) <= 18 - commits, "of 18 windows"


def test_a_window_that_ends_its_actor_again_and_again_stops_the_job(address: str, tmp_path: Path) -> None:
    job = job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    log = tmp_path / "log"
    with pytest.raises(BulkStopped, match="the cluster has lost a window"):
        run_on(address, job, partial(ActorEmbedder, log, poison="text 30 "))

    assert not job.out.exists()
    assert 2 <= sum("text 28" in line for line in log.read_text().splitlines()) <= 4


@pytest.mark.parametrize(("open_embedder", "kind", "message"), [
    (BrokenEmbedder, BulkError, "no such architecture"),
    (UnequalDevices, BulkError, "the devices of the cluster differ in dtype"),
])  # fmt: skip
def test_what_ends_a_job_is_told_as_without_a_cluster(
    address: str, tmp_path: Path, open_embedder: Any, kind: type[Exception], message: str
) -> None:
    job = job_of(write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    with pytest.raises(kind, match=message):
        run_on(address, job, open_embedder)


def test_an_address_where_nothing_listens_is_told(tmp_path: Path) -> None:
    with pytest.raises(BulkError, match=r"no Ray cluster answers at 127.0.0.1:1: .* --ray local"):
        join_cluster("127.0.0.1:1")
    with pytest.raises(BulkError, match="Ray Client"):
        join_cluster("ray://127.0.0.1:10001")


def test_a_column_that_a_file_lacks_is_told(address: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\none\n")
    job = job_of(tmp_path / "in.csv", tmp_path / "out.jsonl", columns=Columns(text="body"))
    with pytest.raises(BulkError, match="has no column 'body'"):
        run_on(address, job, FakeEmbedder)


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
    begun_s = time.monotonic()
    asyncio.run(cancel_once_told())

    assert "all devices are in use" in lines[0]
    assert time.monotonic() - begun_s < 30


def test_the_command_has_the_bytes_of_the_ordinary_form(address: str, tmp_path: Path) -> None:
    """With a real model."""
    write_input(tmp_path / "in.jsonl", 60)
    command = [*MODULE, "embed", MODEL, "in.jsonl", "--id-column", "id", "--window", "8", "-o"]
    environ = environment(str(tmp_path / "state"))
    alone = ["taskset", "-c", "0", *command, "whole.jsonl"]
    found = [
        subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=100)
        for words in (alone, [*command, "ray.jsonl", "--ray", address])
    ]

    assert [done.returncode for done in found] == [1, 1], found
    assert "ray.jsonl: 58 texts" in found[1].stderr
    assert "Traceback" not in found[1].stderr
    assert "Warning" not in found[1].stderr
    for name in (".jsonl", ".jsonl.errors.jsonl"):
        assert (tmp_path / f"ray{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
