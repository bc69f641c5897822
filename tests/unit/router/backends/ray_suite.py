"""Runs the conformance suite for `BACKEND=ray`, on a real cluster of two nodes on this machine.

Run by `test_ray_suites.py` in a separate process, because Ray changes the process it runs in; by hand:

    python -m pytest -o asyncio_mode=strict -o filterwarnings=default tests/unit/router/backends/ray_suite.py
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from engines.types import HostSnapshot
from router.app import create_app
from router.backends.base import Backend
from router.backends.ray.connection import connect
from router.backends.ray.deploy import DeploymentPlan, deploy, from_environment
from router.backends.ray.environment import APP, DEPLOYMENT
from router.backends.ray.fleet import RayFleet
from router.backends.ray.replica_directory import REPLICAS
from router.backends.remote import RemoteBackend
from router.backends.worker_config import WorkerConfig
from router.config.settings import Settings
from router.registry.generation import first_generation
from router.registry.registry import Registry
from tests.testkit.backends import BUDGET, HOSTS, crowd, open_scripted_host, scripted, until
from tests.testkit.batches import line
from tests.testkit.ray_clusters import add_node
from tests.testkit.servers import serving as serving_app
from tests.testkit.thread_loop import LOOP
from tests.unit.router.backends.conformance import Conformance, Opened, call, homes, known, serving

import ray  # isort: skip
from ray import serve  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

REPLACED_S = 90.0
"""Seconds on a quiet machine; much longer where others use the cores."""
CONFIG = WorkerConfig(
    host_id="",
    device="cpu",
    cores=1,
    specs={},
    budget=BUDGET,
    settings=Settings(grace_seconds=5.0, log_level="error"),
    open=open_scripted_host,
)


@pytest.fixture(scope="module")
def cluster(ray_cluster: Cluster) -> Iterator[Cluster]:
    """Deploy three hosts: two on the head, the third on a second node."""
    connect(ray_cluster.address)
    deploy(CONFIG, DeploymentPlan(hosts=HOSTS, cpus=1.0))
    yield ray_cluster
    ray.shutdown()


@asynccontextmanager
async def routed() -> AsyncIterator[RemoteBackend]:
    handle = serve.get_deployment_handle(DEPLOYMENT, APP)
    backend = RemoteBackend(RayFleet(handle, REPLICAS, grace_s=2.0, poll_interval_s=0.1), {})
    await backend.start()
    yield backend
    await backend.aclose(grace_s=0)


@pytest.fixture
def opened() -> Opened:
    return routed


@pytest.fixture(scope="module")
def backend(cluster: Cluster) -> Iterator[Backend]:
    stack = AsyncExitStack()
    backend = LOOP.run(stack.enter_async_context(routed()))
    LOOP.run(until(backend, lambda hosts: len(hosts) == HOSTS))
    yield backend
    LOOP.run(stack.aclose())


class TestRay(Conformance):
    async def test_a_replica_that_is_killed_is_replaced_and_no_request_is_lost(self, backend: Backend) -> None:
        models = [scripted(f"m{index}", embed_s=0.005) for index in range(6)]
        async with serving(backend, *models):
            before = ids(backend.snapshots())
            async with crowd(backend, *(spec.model_id for spec in models)) as clients:
                await clients.until(20)
                os.kill(replica_pids()[0], signal.SIGKILL)
                await clients.until(20)
                after = await until(
                    backend, lambda hosts: len({host.host_id for host in hosts} - before) == 1, REPLACED_S
                )
                await clients.until(20)
            hosts = await until(
                backend, lambda hosts: len(homes(hosts)) == 6 and all(known(host) == 6 for host in hosts), REPLACED_S
            )  # the registry reaches the new one, too

        assert clients.wrong == []
        assert len(after) == len(hosts) == HOSTS

    def test_a_node_that_is_lost_loses_no_request(self, cluster: Cluster, backend: Backend) -> None:
        """Not a coroutine, because nodes are started from the main thread."""
        models = [scripted(f"m{index}", embed_s=0.005) for index in range(6)]
        stack = AsyncExitStack()
        LOOP.run(stack.enter_async_context(serving(backend, *models)))
        clients = LOOP.run(stack.enter_async_context(crowd(backend, *(spec.model_id for spec in models))))
        LOOP.run(clients.until(20))
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        LOOP.run(until(backend, lambda hosts: num_open(hosts) == HOSTS - 1, REPLACED_S))
        LOOP.run(clients.until(20))
        add_node(cluster)
        LOOP.run(until(backend, lambda hosts: num_open(hosts) == HOSTS, REPLACED_S))
        LOOP.run(stack.aclose())

        assert clients.wrong == []

    async def test_a_recycled_host_is_replaced_and_its_models_come_back(self, backend: Backend) -> None:
        async with serving(backend, scripted("a")):
            home = (await backend.preload("a", pin=True)).host_id
            await backend.recycle(home)
            hosts = await until(backend, lambda hosts: "a" in homes(hosts), REPLACED_S)

        assert home not in ids(hosts)
        assert len(hosts) == HOSTS

    async def test_what_was_read_last_holds_whichever_router_read_it_and_however_old_its_file_is(
        self, cluster: Cluster, backend: Backend
    ) -> None:
        async with serving(backend, scripted("new")):
            handle = serve.get_deployment_handle(DEPLOYMENT, APP)
            specs = {"old": scripted("old")}
            other = RemoteBackend(RayFleet(handle, REPLICAS, poll_interval_s=0.1), specs)
            await other.start()
            rolled_back = await until(other, lambda hosts: all(served(host) == ["old"] for host in hosts))
            answer = await other.run(call("old"))
            await other.aclose(grace_s=0)

        assert (len(rolled_back), len(answer.token_counts)) == (HOSTS, 1)

    async def test_the_metrics_of_all_hosts_are_those_of_the_server(self, cluster: Cluster, backend: Backend) -> None:
        spec = scripted("a")
        async with serving(backend, spec):
            fleet = RayFleet(serve.get_deployment_handle(DEPLOYMENT, APP), REPLICAS, poll_interval_s=0.1)
            registry = Registry(models={"a": spec}, default_model="a")
            app = create_app(Settings(), registry, RemoteBackend(fleet, registry.models))
            async with serving_app(app) as url, httpx.AsyncClient(base_url=url) as client:
                answer = await client.post("/v1/embeddings", json={"input": ["one", "two"]})
                metrics = (await client.get("/metrics")).text
                memory = (await client.get("/admin/memory")).json()

        assert [len(entry["embedding"]) for entry in answer.json()["data"]] == [16, 16]
        named = {line.split('host="')[1].split('"')[0] for line in metrics.splitlines() if "_budget_bytes{" in line}
        assert named == ids(backend.snapshots()) == {d["host_id"] for d in memory["devices"]}

    async def test_a_batch_of_the_server_is_computed_by_the_hosts(
        self, cluster: Cluster, backend: Backend, tmp_path: Path
    ) -> None:
        models = [scripted("a"), scripted("b")]
        async with serving(backend, *models):
            registry = Registry(models={spec.model_id: spec for spec in models}, default_model="a")
            fleet = RayFleet(serve.get_deployment_handle(DEPLOYMENT, APP), REPLICAS, poll_interval_s=0.1)
            app = create_app(Settings(data_dir=tmp_path), registry, RemoteBackend(fleet, registry.models))
            async with serving_app(app) as url, httpx.AsyncClient(base_url=f"{url}/v1") as client:
                answers = await batch_of(client, {f"{name}{n}": f"text {n}" for name in "ab" for n in range(20)})
                asked = await client.post("/embeddings", json={"input": "text 3", "model": "b"})
            hosts = backend.snapshots()

        assert homes(hosts).keys() >= {"a", "b"}
        assert len(answers) == 40
        assert answers["b3"] == asked.json()["data"][0]["embedding"]


async def batch_of(client: httpx.AsyncClient, texts: Mapping[str, str]) -> dict[str, list[float]]:
    """Run a batch, and return its vectors; a text's id begins with its model."""
    lines = "\n".join(line(name, body={"model": name[0], "input": text}) for name, text in texts.items())
    files = {"file": ("corpus.jsonl", lines.encode())}
    file = (await client.post("/files", files=files, data={"purpose": "batch"})).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = (await client.post("/batches", json=body)).json()
    while batch["status"] in {"validating", "in_progress", "finalizing"}:
        await asyncio.sleep(0.02)
        batch = (await client.get(f"/batches/{batch['id']}")).json()
    assert batch["status"] == "completed"
    content = (await client.get(f"/files/{batch['output_file_id']}/content")).text
    rows = map(json.loads, content.splitlines())
    return {row["custom_id"]: row["response"]["body"]["data"][0]["embedding"] for row in rows}


def served(host: HostSnapshot) -> list[str]:
    return [status.model_id for status in host.models]


def ids(hosts: tuple[HostSnapshot, ...]) -> set[str]:
    return {host.host_id for host in hosts}


def num_open(hosts: tuple[HostSnapshot, ...]) -> int:
    """Count the hosts that take calls."""
    return sum(not host.is_draining for host in hosts)


def replica_pids() -> list[int]:
    """Return the process ids of the replicas, by the process titles that Ray sets."""
    return [process.pid for process in psutil.process_iter(["cmdline"]) if is_replica(process.info["cmdline"])]


def is_replica(cmdline: list[str] | None) -> bool:
    return any(f"ServeReplica:{APP}:{DEPLOYMENT}" in word for word in cmdline or ())


async def test_the_same_deployment_can_be_made_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "registry.yaml"
    registry.write_text("version: 1\nmodels: [{name: a, source: org/a}]\n")
    monkeypatch.setenv("REGISTRY", str(registry))
    monkeypatch.setenv("MAX_CONCURRENT_REQUESTS", "100")

    made = from_environment({"hosts": "3", "gpus": "1", "cpus": "4"})

    deployment = made._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert deployment.max_ongoing_requests > 100
    (config,) = deployment.init_args
    assert config.generation == first_generation(config.specs)
