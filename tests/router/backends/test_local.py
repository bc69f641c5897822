"""`BACKEND=local` does what every backend does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engines.errors import HostNotFound, InvalidValue
from router.backend import Backend, LocalBackend
from router.hosting import Birth
from router.settings import Settings
from tests.router.backends.conformance import BUDGET, HOSTS, Conformance, Opened
from tests.router.backends.scripted_host import open_scripted_host


def births() -> list[Birth]:
    return [
        Birth(
            host_id=f"cpu:{index}",
            device="cpu",
            cores=1,
            specs={},
            budget=BUDGET,
            settings=Settings(),
            open=open_scripted_host,
        )
        for index in range(HOSTS)
    ]


@asynccontextmanager
async def local() -> AsyncIterator[Backend]:
    backend = LocalBackend([birth.open(birth, lambda _: None) for birth in births()], {})
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
