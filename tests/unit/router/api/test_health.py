"""Tests the probes: no key needed, and 503 from /ready while the server drains."""

from collections.abc import Iterator

import httpx
import pytest
from litestar import Litestar

from router.config.settings import Settings
from router.server.state import ServerState
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import Served, serve, serving


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(host="0.0.0.0", api_key="k"))


@pytest.mark.parametrize(("path", "status"), [("/health", "ok"), ("/ready", "ready")])
def test_probes_need_no_key(keyed: Served, path: str, status: str) -> None:
    answer = keyed.client.get(path)

    assert answer.status_code == 200
    assert answer.json() == {"status": status}


def test_a_draining_host_takes_no_work(served: Served) -> None:
    served.backend.is_draining = True
    ready, health = served.client.get("/ready"), served.client.get("/health")

    assert ready.status_code == 503
    assert ready.json()["error"]["code"] == "shutting_down"
    assert ready.headers["retry-after"] == "1"
    assert health.status_code == 200


async def test_a_draining_server_takes_no_work(app: Litestar) -> None:
    server_state: ServerState = app.state.server_state
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        before = await client.get("/ready")
        server_state.begin_drain()
        after, health = await client.get("/ready"), await client.get("/health")

    assert (before.status_code, after.status_code, health.status_code) == (200, 503, 200)


async def test_the_lifespan_starts_and_closes_the_backend(app: Litestar, backend: ScriptedBackend) -> None:
    async with serving(app):
        was_started, was_closed = backend.is_started, backend.is_closed

    assert (was_started, was_closed) == (True, False)
    assert backend.is_closed
