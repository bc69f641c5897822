"""Tests two servers behind the load balancers of `deploy/`: each model is on one of them, and a server may stop."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from litestar import Litestar
from msgspec import Struct

from engines.testing.fakes import FakeLoader, fake_host, fake_specs
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from router.server.state import ServerState
from tests.deploy.proxies import NAME, Proxy, caddy, is_here, nginx
from tests.testkit.servers import serving

Run = Callable[..., AbstractContextManager[Proxy]]
MODELS = [f"org/model-{number}" for number in range(12)]
BODY = {"input": "x"}


def balancer(name: str, run: Run, *needed: str) -> object:
    missing = [program for program in needed if not is_here(program)]
    skip = pytest.mark.skipif(bool(missing), reason=f"there is no {' and no '.join(missing)}: apt-get install it")
    return pytest.param(run, marks=skip, id=name)


BALANCERS = [balancer("nginx", nginx, "nginx", "openssl"), balancer("caddy", caddy, "caddy")]


class Node(Struct):
    """One of the servers, which can be stopped separately."""

    app: Litestar
    loader: FakeLoader
    stack: AsyncExitStack
    address: str = ""


class Pair(Struct):
    """Two servers with the same registry, and their balancer."""

    proxy: Proxy
    client: httpx.AsyncClient
    nodes: list[Node]

    async def ask(self, model: str, *, by_header: bool = False) -> int:
        path, headers = ("/v1/embeddings", {"x-model": model}) if by_header else (f"/m/{model}/v1/embeddings", {})
        return (await self.client.post(path, json=BODY | {"model": model}, headers=headers)).status_code

    async def ask_all(self) -> list[int]:
        """Request every model once."""
        return await asyncio.gather(*(self.ask(model) for model in MODELS))


async def start(stack: AsyncExitStack) -> Node:
    loader, specs = FakeLoader(), fake_specs(*MODELS)
    backend = LocalBackend([fake_host(*MODELS, loader=loader)], specs)
    app = create_app(Settings(grace_seconds=1.0), Registry(models=specs), backend)
    own = await stack.enter_async_context(AsyncExitStack())
    url = await own.enter_async_context(serving(app))
    return Node(app, loader, own, url.removeprefix("http://"))


@asynccontextmanager
async def pair(run: Run, folder: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        nodes = [await start(stack) for _ in range(2)]
        context = run(folder, [node.address for node in nodes])
        proxy = await asyncio.to_thread(context.__enter__)
        stack.callback(context.__exit__, None, None, None)
        async with httpx.AsyncClient(base_url=proxy.url, verify=proxy.trust, timeout=10) as client:
            while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 - Caddy asks them first
                await asyncio.sleep(0.05)
            yield Pair(proxy, client, nodes)


@pytest.mark.parametrize("run", BALANCERS)
async def test_each_model_lives_on_one_server_only(run: Run, tmp_path: Path) -> None:
    async with pair(run, tmp_path) as here:
        answers = await asyncio.gather(*(here.ask(model) for model in MODELS * 4))
        homes = [set(node.loader.loads) for node in here.nodes]
        async with httpx.AsyncClient() as client:
            plain = await client.get(f"{here.proxy.plain_url}/v1/models?x=1", headers={"host": NAME})

    assert set(answers) == {200}
    assert sorted([*homes[0], *homes[1]]) == sorted(MODELS), "no model is on both servers, and none is missing"
    assert min(map(len, homes)) > 0, "both servers have work"
    if here.proxy.url != here.proxy.plain_url:
        assert (plain.status_code, plain.headers["location"]) == (301, f"https://{NAME}/v1/models?x=1")


@pytest.mark.parametrize("run", BALANCERS)
async def test_with_the_model_in_a_header_too(run: Run, tmp_path: Path) -> None:
    async with pair(run, tmp_path) as here:
        answers = await asyncio.gather(*(here.ask(model, by_header=True) for model in MODELS * 4))
        loads = Counter(model for node in here.nodes for model in node.loader.loads)

    assert set(answers) == {200}
    assert loads == Counter(MODELS)


@pytest.mark.parametrize("run", BALANCERS)
async def test_a_server_may_drain_and_go(run: Run, tmp_path: Path) -> None:
    """nginx retries a refused request on the other server; behind Caddy, a client may get one 503."""
    async with pair(run, tmp_path) as here:
        await here.ask_all()
        leaving, staying = here.nodes
        server_state: ServerState = leaving.app.state.server_state
        server_state.begin_drain()
        draining = await here.ask_all()
        while run is caddy and set(await here.ask_all()) != {200}:  # noqa: ASYNC110 - as clients do
            await asyncio.sleep(0.1)
        await leaving.stack.aclose()
        without = await here.ask_all()

    assert set(draining) <= ({200} if run is nginx else {200, 503})
    assert set(without) == {200}
    assert staying.loader.loads == Counter(MODELS), "what was there stayed; what was elsewhere was loaded once"


@pytest.mark.parametrize("run", BALANCERS)
async def test_events_pass_as_they_come_and_metrics_not_at_all(run: Run, tmp_path: Path) -> None:
    async with pair(run, tmp_path) as here:
        async with here.client.stream("GET", "/admin/events") as events:
            lines = events.aiter_lines()
            first = await anext(lines)
            await here.ask_all()
            async for line in lines:
                if line.startswith("data: "):
                    break
        metrics = await here.client.get("/metrics")
        health = await here.client.get("/health")

    assert events.headers["content-type"].startswith("text/event-stream")
    assert not first.startswith("data: ")
    assert metrics.status_code == 404
    assert health.headers["strict-transport-security"] == "max-age=31536000"
