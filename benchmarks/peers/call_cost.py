"""Measures the overhead of one call: the median seconds of calls to hosts of fake engines that answer at once.

`python benchmarks/peers/call_cost.py BACKEND NUM_CALLS` prints one JSON object. For `ray`, `RAY_ADDRESS` names a
cluster with resources for two hosts.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from engines.host import Host, HostConfig, HostRuntime
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoopTime, Threads
from engines.spec import ModelSpec
from engines.testing.fakes import WORKSPACE_BYTES, FakeFiles, FakeLoader, FakeMemory
from engines.types import Budget, EmbedCall
from router.backends.base import Backend
from router.backends.local import LocalBackend
from router.backends.worker_config import CrashNote, WorkerConfig
from router.config.settings import Settings

SPEC = ModelSpec(model_id="a", source="fake/a", max_tokens=100_000)
HOSTS = 2


def open_fake_host(config: WorkerConfig, note: CrashNote) -> Host:
    """Opens a host whose engine answers at once (`WorkerConfig.open`); worker processes import it by name."""
    runtime = HostRuntime(
        time=LoopTime(), workers=Threads(config.host_id), memory=FakeMemory(10**9), measurements=Measurements()
    )
    settings = HostConfig(
        host_id=config.host_id, device=config.device, budget=config.budget, workspace_bytes=WORKSPACE_BYTES
    )
    return Host(settings, config.specs, FakeFiles(), FakeLoader(), runtime)


def worker_configs() -> list[WorkerConfig]:
    from benchmarks.peers.call_cost import open_fake_host  # not of __main__, which workers cannot import

    return [
        WorkerConfig(
            host_id=f"cpu:{index}", device="cpu", cores=1, specs={"a": SPEC}, budget=Budget(size_bytes=10**6),
            settings=Settings(log_level="error"), open=open_fake_host,
        )
        for index in range(HOSTS)
    ]  # fmt: skip


def make(name: str) -> Backend:
    """Make a backend with two hosts of fake engines."""
    if name == "local":
        return LocalBackend([config.open(config, lambda _: None) for config in worker_configs()], {"a": SPEC})
    from router.backends.remote import RemoteBackend

    if name == "process":
        from router.backends.process.fleet import ProcessFleet

        return RemoteBackend(ProcessFleet(worker_configs(), 1, grace_s=1.0), {"a": SPEC})
    from router.backends.ray.connection import connect
    from router.backends.ray.deploy import DeploymentPlan, deploy, serve
    from router.backends.ray.environment import APP, DEPLOYMENT
    from router.backends.ray.fleet import RayFleet
    from router.backends.ray.replica_directory import REPLICAS

    connect(None)
    deploy(worker_configs()[0], DeploymentPlan(hosts=HOSTS, cpus=0.5))
    fleet = RayFleet(serve.get_deployment_handle(DEPLOYMENT, APP), REPLICAS)
    return RemoteBackend(fleet, {"a": SPEC})


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[Backend]:
    backend = make(name)
    await backend.start()
    yield backend
    await backend.aclose(grace_s=0)


async def measure(name: str, num_calls: int) -> dict[str, float]:
    """Return median seconds of sequential calls: of one short text, and of 256."""
    async with opened(name) as backend:
        found = {}
        for label, texts in (("one_text_s", ("x",)), ("many_texts_s", ("x",) * 256)):
            call = EmbedCall(model_id="a", texts=texts)
            samples = []
            for _ in range(num_calls):
                began_s = time.perf_counter()
                await backend.run(call)
                samples.append(time.perf_counter() - began_s)
            found[label] = median(samples[len(samples) // 10 :])
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(measure(sys.argv[1], int(sys.argv[2])))) + "\n")
