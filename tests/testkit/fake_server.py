"""The edge over the real backend and a real host, whose engines are fakes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
from msgspec import Struct, structs

from engines.host import Host, HostConfig
from engines.pool.slot import PoolPolicy
from engines.spec import Matryoshka, ModelSpec
from engines.testing.fakes import (  # fmt: skip
    WORKSPACE_BYTES,
    FakeFiles,
    FakeLoader,
    InlineWorkers,
    fake_runtime,
)
from engines.types import Budget
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.threaded_server import serving

EMBED = "/v1/embeddings"


SPECS = {
    "mini": ModelSpec(
        model_id="mini",
        source="fake/mini",
        max_tokens=5,
        prompts={"query": "find: "},
        matryoshka=Matryoshka(widths=(4,)),
    ),
    "org/other": ModelSpec(model_id="org/other", source="fake/other", truncate="error", max_tokens=5),
    "gpu": ModelSpec(model_id="gpu", source="fake/gpu", device="cuda:3"),
}  # fmt: skip


REGISTRY = Registry(models=SPECS, aliases={"text-embedding-3-small": "mini"}, default_model="mini")


class World(Struct):
    """A served yard: its client, and what its engines and threads do."""

    client: httpx.AsyncClient
    url: str
    loader: FakeLoader
    workers: InlineWorkers

    async def embed(self, model: str = "mini", **fields: object) -> httpx.Response:
        return await self.client.post(EMBED, json={"input": "a b", "model": model, **fields})

    async def slot(self, model: str = "mini") -> dict[str, object]:
        found: dict[str, object] = (await self.client.get(f"/admin/models/{model}")).json()
        return found

    async def until(self, **wanted: object) -> dict[str, object]:
        """The slot of `mini` as soon as it looks as wanted; the suite's timeout is the limit."""
        while True:
            slot = await self.slot()
            if slot | wanted == slot:
                return slot


@asynccontextmanager
async def world(
    *, budget_bytes: int = 10**6, loader: FakeLoader | None = None, files: FakeFiles | None = None, **settings: float
) -> AsyncIterator[World]:
    workers, loader = InlineWorkers(), loader or FakeLoader()
    config = HostConfig(
        host_id="cpu", budget=Budget(size_bytes=budget_bytes), workspace_bytes=WORKSPACE_BYTES,
        rules=PoolPolicy(min_residency_s=0.0, residency_loads=0.0),
    )  # fmt: skip
    host = Host(config, SPECS, files or FakeFiles(), loader, structs.replace(fake_runtime(), workers=workers))
    app = create_app(structs.replace(Settings(), **settings), REGISTRY, LocalBackend([host], SPECS))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield World(client, url, loader, workers)
    assert loader.violations == []


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another task is about to do; the suite's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - what is waited for happens inside the server and has no event
        await asyncio.sleep(0.002)
