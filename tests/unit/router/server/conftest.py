"""Connections to apps, on a fake transport and clock."""

from collections.abc import AsyncIterator, Callable

import pytest
from uvicorn.server import ServerState

from tests.testkit.http_connections import FakeApp, FakeConnection, settled


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., FakeConnection]]:
    made: list[FakeConnection] = []

    def connect(app: FakeApp, room: int = 10**9, state: ServerState | None = None) -> FakeConnection:
        made.append(FakeConnection(app, room, state or ServerState()))
        return made[-1]

    yield connect
    for connected in made:
        connected.transport.lose()
    await settled()
