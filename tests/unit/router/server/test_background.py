"""Background tasks with the real backend: events become metrics, and a device that is down is detected."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from msgspec import structs
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from engines.device.health import DeviceHealth
from engines.errors import AccessDenied
from engines.testing.fakes import FakeLoader, fake_host, fake_runtime, fake_specs
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.observability.recorder import MetricsRecorder
from router.registry.registry import Registry
from router.server.background import background_tasks, measure_loop_lag
from tests.testkit.backends import ScriptedBackend
from tests.testkit.exposition import Exposition
from tests.testkit.servers import serving

EMBED = "/v1/embeddings"


class ServedHost:
    """A served host whose device health the test sets."""

    def __init__(self, loader: FakeLoader) -> None:
        self.health = DeviceHealth()
        runtime = structs.replace(fake_runtime(), health=lambda: self.health)
        self.specs = fake_specs("a", "b")
        self.backend = LocalBackend([fake_host("a", "b", loader=loader, runtime=runtime, host_id="cpu")], self.specs)
        self.client: httpx.AsyncClient

    async def embed(self, model: str = "a") -> httpx.Response:
        return await self.client.post(EMBED, json={"input": "x", "model": model})

    async def scrape(self) -> Exposition:
        return Exposition((await self.client.get("/metrics")).text)


@asynccontextmanager
async def served(loader: FakeLoader | None = None) -> AsyncIterator[ServedHost]:
    server_state = ServedHost(loader or FakeLoader())
    app = create_app(Settings(), Registry(models=server_state.specs), server_state.backend)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        server_state.client = client
        yield server_state


async def test_loads_evictions_and_failures_reach_the_metrics() -> None:
    async with served(FakeLoader(failures={"b": [AccessDenied("no")]})) as server_state:
        await server_state.embed("a")
        await server_state.client.post("/admin/models/a/evict")
        await server_state.embed("b")
        exposition = await server_state.scrape()

    assert exposition("embedyard_loads_total", model="a", host="cpu") == 1
    assert exposition("embedyard_load_seconds_count", model="a") == 1
    assert exposition("embedyard_evictions_total", model="a", cause="operator") == 1
    assert exposition("embedyard_load_failures_total", model="b", kind="access_denied") == 1
    assert exposition("embedyard_rejected_total", model="b", reason="model_load_failed") == 1
    assert exposition("embedyard_model_state", model="b", host="cpu", state="failed") == 1


async def test_a_hanging_forward_pass_fails_health_and_its_callers_within_a_second() -> None:
    async with served(FakeLoader(embed_s=3600.0)) as server_state:
        waiting = asyncio.create_task(server_state.embed())
        while not (await server_state.scrape())("embedyard_leases", model="a", host="cpu"):
            pass
        healthy = await server_state.client.get("/health")
        began_s = time.perf_counter()
        server_state.health = DeviceHealth(task_s=125.0)
        told = await waiting
        took_s = time.perf_counter() - began_s
        refused, health, exposition = (
            await server_state.embed(),
            await server_state.client.get("/health"),
            await server_state.scrape(),
        )

    assert healthy.status_code == 200
    assert took_s < 2.0
    for answer in (told, refused, health):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_down")
        assert "a forward pass has been running for 125 s, and 120 s is the limit" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
    assert exposition("embedyard_device_up", host="cpu") == 0


async def test_a_dead_device_fails_health_with_its_name() -> None:
    async with served() as server_state:
        server_state.health = DeviceHealth(is_alive=False)
        health, ready = await server_state.client.get("/health"), await server_state.client.get("/ready")

    assert (health.status_code, health.json()["error"]["type"]) == (503, "server_error")
    assert "device cpu has died" in health.json()["error"]["message"]
    assert ready.status_code == 503


async def test_a_loop_that_is_held_up_is_seen() -> None:
    recorder = MetricsRecorder()
    timing = asyncio.create_task(measure_loop_lag(recorder, every_s=0.001))
    await asyncio.sleep(0.005)
    time.sleep(0.06)  # noqa: ASYNC251  # it is what holds the loop up
    await asyncio.sleep(0.005)
    timing.cancel()
    exposition = Exposition(generate_latest(recorder.registry).decode())

    held_up = exposition("embedyard_event_loop_lag_seconds_count") - exposition(
        "embedyard_event_loop_lag_seconds_bucket", le="0.05"
    )
    assert held_up == 1


async def test_a_task_that_fails_is_logged() -> None:
    backend = ScriptedBackend("mini")

    def fail() -> dict[str, str]:
        raise RuntimeError("a bug")

    backend.check = fail  # type: ignore[method-assign]  # a bug below
    with capture_logs() as lines:
        async with background_tasks(backend, MetricsRecorder()):
            await asyncio.sleep(0.01)

    assert [line["event"] for line in lines] == ["watch.ended"]


@pytest.mark.parametrize("number", [1, 2])
async def test_the_tasks_end_with_the_server(number: int) -> None:
    before = len(asyncio.all_tasks())
    async with served() as server_state:
        for _ in range(number):
            await server_state.embed()

    assert len(asyncio.all_tasks()) == before
