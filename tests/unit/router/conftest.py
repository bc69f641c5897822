"""One registry, a scripted backend, and the edge served with it over a real socket; a Ray cluster for Ray's suites."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from litestar import Litestar

from router.app import create_app
from router.config.settings import Settings
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import MAX_BODY_BYTES, REGISTRY, Served, serve

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend("mini", "BAAI/bge-m3")


@pytest.fixture
def app(backend: ScriptedBackend) -> Litestar:
    return create_app(Settings(), REGISTRY, backend)


@pytest.fixture(scope="module")
def module_server() -> Iterator[Served]:
    yield from serve(Settings(max_body_bytes=MAX_BODY_BYTES))


@pytest.fixture
def served(module_server: Served) -> Served:
    """A server without keys, shared by the tests of a module; its backend starts each test fresh."""
    backend = module_server.backend
    backend.failures.clear()
    backend.calls.clear()
    backend.contextual_calls.clear()
    backend.tokenize_calls.clear()
    backend.outputs_calls.clear()
    backend.commands.clear()
    backend.truncated = ()
    backend.is_draining = False
    return module_server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator["Cluster"]:
    """Start a cluster of two nodes with three CPUs, once for both of Ray's suites: it takes 10 s."""
    from tests.testkit.ray_clusters import two_nodes  # late: Ray is optional, and changes the process that imports it

    with two_nodes(head_cpus=2) as made:
        yield made
