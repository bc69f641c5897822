"""Runs the conformance suite for `BACKEND=process`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from engines.errors import HostNotFound
from router.backends.base import Backend
from router.backends.process.fleet import ProcessFleet
from router.backends.process.worker import prepare_forkserver
from router.backends.remote import RemoteBackend
from tests.testkit.backends import HOSTS, scripted, until, worker_configs
from tests.unit.router.backends.conformance import Conformance, Opened, call, homes, serving

prepare_forkserver(("router.backends.process.child", "tests.testkit.backends"))
pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def processes() -> AsyncIterator[RemoteBackend]:
    backend = RemoteBackend(ProcessFleet(worker_configs(), 1, grace_s=5.0), {})
    await backend.start()
    yield backend
    await backend.aclose(grace_s=0)


@pytest.fixture
def opened() -> Opened:
    return processes


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def backend() -> AsyncIterator[Backend]:
    async with processes() as backend:
        yield backend


class TestProcess(Conformance):
    async def test_a_recycled_host_comes_back_with_what_was_ready_there(self, backend: Backend) -> None:
        name = backend.snapshots()[0].host_id
        async with serving(backend, scripted("a"), scripted("b")):
            await backend.preload("a", host_id=name, pin=True)
            await backend.preload("b", host_id=name)
            await backend.recycle(name)
            hosts = await until(backend, lambda hosts: len(homes(hosts)) == 2)
            answer = await backend.run(call("a"))

        assert homes(hosts) == {"a": [name], "b": [name]}
        assert [status.pinned for host in hosts if host.host_id == name for status in host.models] == [True, False]
        assert len(hosts) == HOSTS
        assert len(answer.token_counts) == 1

    async def test_calls_go_on_while_a_host_is_recycled(self, backend: Backend) -> None:
        async with serving(backend, scripted("a", embed_s=0.05)):
            home = (await backend.preload("a")).host_id
            running = [asyncio.create_task(backend.run(call("a", str(index)))) for index in range(20)]
            await asyncio.sleep(0.01)
            await backend.recycle(home)
            answers = await asyncio.gather(*running, *(backend.run(call("a")) for _ in range(20)))

        assert [len(answer.token_counts) for answer in answers] == [1] * 40

    async def test_a_host_that_is_not_there_cannot_be_recycled(self, backend: Backend) -> None:
        with pytest.raises(HostNotFound):
            await backend.recycle("nobody")
