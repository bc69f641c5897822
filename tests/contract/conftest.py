"""Starts one server for the clients of this folder: real HTTP, sockets and host, with fake engines."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from litestar import Litestar

from engines.testing.fakes import fake_host
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import read_registry
from tests.testkit.servers import serving_in_thread

KEY = "sk-contract"
REGISTRY = Path(__file__).with_name("registry.yaml")


def contract_app(data_dir: Path) -> Litestar:
    """Return the server's app, which is not started yet. `data_dir`: for files and batches."""
    registry = read_registry(REGISTRY)
    backend = LocalBackend([fake_host(*registry.models.values())], registry.models)
    return create_app(Settings(api_key=KEY, registry=REGISTRY, data_dir=data_dir), registry, backend)


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_in_thread(contract_app(tmp_path_factory.mktemp("data"))) as url:
        yield url
