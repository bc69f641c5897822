"""Runs the conformance suite for `BACKEND=local`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engines.errors import HostNotFound, InvalidValue
from router.backends.base import Backend
from router.backends.local import LocalBackend
from tests.testkit.backends import worker_configs
from tests.unit.router.backends.conformance import Conformance, Opened


@asynccontextmanager
async def local() -> AsyncIterator[Backend]:
    backend = LocalBackend([config.open(config, lambda _: None) for config in worker_configs()], {})
    await backend.start()
    yield backend
    await backend.aclose(grace_s=0)


@pytest.fixture
def opened() -> Opened:
    return local


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with local() as backend:
        yield backend


class TestLocal(Conformance):
    async def test_a_host_of_the_server_itself_is_not_recycled(self, backend: Backend) -> None:
        with pytest.raises(InvalidValue, match="restart the server, or serve with BACKEND=process"):
            await backend.recycle("cpu:0")
        with pytest.raises(HostNotFound):
            await backend.recycle("nobody")
