"""A registry whose models have every combination of outputs, and servers of it over fake engines."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from engines.spec import ModelSpec, Output
from engines.testing.fakes import FakeLoader, fake_host
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.servers import FakeServer, fake_server, serving_in_thread

OUTPUTS: dict[str, tuple[Output, ...]] = {
    "bge-m3": ("dense", "sparse", "multi_vector"),
    "splade": ("sparse",),
    "colbert": ("multi_vector",),
    "dense": ("dense",),
}
MANY_OUTPUTS = Registry(
    models={
        **{name: ModelSpec(model_id=name, source=f"org/{name}", max_tokens=40) for name in OUTPUTS},
        "ranker": ModelSpec(model_id="ranker", source="org/ranker", task="rerank"),
    },
    default_model="bge-m3",
)


@asynccontextmanager
async def output_server() -> AsyncIterator[FakeServer]:
    """Serve them; no task of an embedding model is known before it is loaded."""
    async with fake_server(registry=MANY_OUTPUTS, loader=FakeLoader(outputs=OUTPUTS)) as server:
        yield server


@contextmanager
def serve_outputs() -> Iterator[str]:
    """Serve them on a thread, for blocking clients; yields the address."""
    specs = MANY_OUTPUTS.models
    host = fake_host(*specs.values(), loader=FakeLoader(outputs=OUTPUTS))
    with serving_in_thread(create_app(Settings(), MANY_OUTPUTS, LocalBackend([host], specs))) as url:
        yield url
