"""One registry, a scripted backend, and the edge served with it over a real socket."""

from collections.abc import Iterator

import httpx
import pytest
from litestar import Litestar
from msgspec import Struct

from engines.spec import Calibration, Matryoshka, ModelSpec
from router.app import create_app
from router.registry import Registry
from router.settings import Settings
from tests.router.scripted import WIDTH, ScriptedBackend
from tests.server import serving_in_thread

REGISTRY = Registry(
    models={
        "mini": ModelSpec(model_id="mini", source="org/mini", matryoshka=Matryoshka(widths=(4,))),
        "BAAI/bge-m3": ModelSpec(
            model_id="BAAI/bge-m3",
            source="/secret/place/bge-m3",
            calibration=Calibration(lowest=(-0.5,) * WIDTH, highest=(0.5,)),
        ),
        "cold": ModelSpec(
            model_id="cold",
            source="org/cold",
            prompts={"query": "q: "},
            max_tokens=77,
            revision="v1",
            trust_remote_code=True,
        ),
    },
    aliases={"text-embedding-3-small": "mini", "org/deep/alias": "BAAI/bge-m3"},
    default_model="mini",
)
MAX_BODY_BYTES = 2**20


class Served(Struct):
    """A server in a thread, its blocking client, and the backend behind it."""

    url: str
    client: httpx.Client
    backend: ScriptedBackend


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend("mini", "BAAI/bge-m3")


@pytest.fixture
def app(backend: ScriptedBackend) -> Litestar:
    return create_app(Settings(), REGISTRY, backend)


def serve(settings: Settings) -> Iterator[Served]:
    backend = ScriptedBackend("mini", "BAAI/bge-m3")
    app = create_app(settings, REGISTRY, backend, wall_clock=lambda: 1_700_000_000.9)
    with serving_in_thread(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield Served(url, client, backend)


@pytest.fixture(scope="module")
def module_server() -> Iterator[Served]:
    yield from serve(Settings(max_body_bytes=MAX_BODY_BYTES))


@pytest.fixture
def served(module_server: Served) -> Served:
    """A server without keys, shared by the tests of a module; its backend starts each test fresh."""
    backend = module_server.backend
    backend.failures.clear()
    backend.calls.clear()
    backend.commands.clear()
    backend.truncated = ()
    backend.is_draining = False
    return module_server
