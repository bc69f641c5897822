"""Servers with keys and limits, over real sockets; the clock of their limits stands still until a test moves it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from litestar import Litestar

from router.app import create_app
from router.auth.keys import digest_of
from router.config.settings import Settings
from tests.testkit.clocks import FakeClock
from tests.testkit.scripted_backend import ScriptedBackend
from tests.testkit.served import REGISTRY, Served
from tests.testkit.threaded_server import serving_in_thread

EMBED = "/v1/embeddings"


def secret_of(key_id: str) -> str:
    """The key behind an id of `write_keys`."""
    return f"ey-hunter-{key_id}"


def bearer(key_id: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret_of(key_id)}"}


def write_keys(path: Path, keys: Mapping[str, Mapping[str, Any]]) -> Path:
    """A keys file: ids, and what is special about each key."""
    entries = [{"id": name, "sha256": digest_of(secret_of(name)).hex(), **more} for name, more in keys.items()]
    path.write_text(yaml.safe_dump(entries))
    return path


class Limited:
    """A server, its backend, and the clock of its limits."""

    def __init__(self, served: Served, app: Litestar, clock: FakeClock) -> None:
        self.client, self.url, self.backend = served.client, served.url, served.backend
        self.app, self.clock = app, clock

    def embed(self, key_id: str | None = None, **body: Any) -> httpx.Response:
        headers = bearer(key_id) if key_id else {}
        return self.client.post(EMBED, json={"input": "a", **body}, headers=headers)


@contextmanager
def limited(settings: Settings) -> Iterator[Limited]:
    backend, clock = ScriptedBackend("mini", "BAAI/bge-m3"), FakeClock()
    app = create_app(settings, REGISTRY, backend, limit_clock=clock)
    with serving_in_thread(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield Limited(Served(url, client, backend), app, clock)
