"""Tests a device that does not answer: another one takes over, and no request waits for it."""

import asyncio

import httpx
import pytest
from msgspec import structs

from engines.device.health import DeviceHealth
from engines.errors import DeviceDown
from engines.host import Host, HostConfig
from engines.testing.fakes import FakeFiles, FakeLoader, fake_runtime, fake_specs
from engines.testing.runtime import let_run
from engines.types import Budget, EmbedCall
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.backends import worker_configs
from tests.testkit.lost_device import POISON, open_failing_host
from tests.testkit.servers import serving

CALL = EmbedCall(model_id="a", texts=("x",))


class Pair:
    """One backend with two devices, whose health the test sets."""

    def __init__(self, embed_s: float = 0.0) -> None:
        self.pulses = {"cuda:0": DeviceHealth(), "cuda:1": DeviceHealth()}
        self.loaders = {device: FakeLoader(embed_s=embed_s) for device in self.pulses}
        self.backend = LocalBackend([self._host(device) for device in self.pulses], fake_specs("a"))

    def _host(self, device: str) -> Host:
        config = HostConfig(host_id=device, device=device, budget=Budget(size_bytes=10**6), workspace_bytes=100)
        runtime = structs.replace(fake_runtime(), health=lambda: self.pulses[device])
        return Host(config, fake_specs("a"), FakeFiles(), self.loaders[device], runtime)

    def loads(self) -> list[int]:
        return [loader.loads["a"] for loader in self.loaders.values()]


async def test_a_device_that_is_down_is_passed_over() -> None:
    pair = Pair()
    await pair.backend.start()
    await pair.backend.run(CALL)
    home = "cuda:0" if pair.loads() == [1, 0] else "cuda:1"
    pair.pulses[home] = DeviceHealth(is_alive=False)
    faults = pair.backend.check()
    await pair.backend.run(CALL)

    assert list(faults) == [home]
    assert pair.loads() == [1, 1]


async def test_a_server_whose_devices_are_all_down_says_so_at_once() -> None:
    pair = Pair()
    await pair.backend.start()
    for device in pair.pulses:
        pair.pulses[device] = DeviceHealth(task_s=500.0)
    pair.backend.check()

    with pytest.raises(DeviceDown, match="restart the server"):
        await pair.backend.run(CALL)


async def test_a_gpu_that_has_failed_fails_health_until_the_server_is_restarted() -> None:
    config = structs.replace(worker_configs()[0], specs=fake_specs("a"), open=open_failing_host)
    host = open_failing_host(config, lambda _: None)
    app = create_app(Settings(), Registry(models=fake_specs("a")), LocalBackend([host], fake_specs("a")))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:

        async def ask(text: str) -> httpx.Response:
            return await client.post("/v1/embeddings", json={"model": "a", "input": text})

        before = await ask("x"), await client.get("/health")
        asked = await ask(POISON)
        told = [asked, await ask("x"), await client.get("/health"), await ask("x"), await client.get("/ready")]

    assert [answer.status_code for answer in before] == [200, 200]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in told] == [(503, "device_down")] * 5
    assert asked.json()["error"]["message"] == (
        "the device failed during the forward pass (device-side assert); send the request again"
    )
    assert told[2].json()["error"]["message"] == (
        "device cuda:0 has failed (device-side assert), and this process cannot use it again; restart the server"
    )


async def test_only_the_callers_of_the_device_that_is_down_get_its_error() -> None:
    pair = Pair(embed_s=0.05)
    await pair.backend.start()
    await pair.backend.preload("a")
    home = "cuda:0" if pair.loads() == [1, 0] else "cuda:1"
    hurt = asyncio.create_task(pair.backend.run(CALL))
    await let_run()
    pair.pulses[home] = DeviceHealth(is_alive=False)
    pair.backend.check()
    well = asyncio.create_task(pair.backend.run(CALL))

    with pytest.raises(DeviceDown):
        await hurt
    assert len((await well).token_counts) == 1
