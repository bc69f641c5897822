"""Starts servers for tests: the app over a scripted backend or over fakes, and `embedyard serve` as a process.

- `serve`, `limited`: the app over a scripted backend, in a thread, for blocking clients; `limited` with keys and
  limits, whose clock a test advances.
- `fake_server`: the app over the real backend and a real host, whose engines are fakes, on the test's own loop.
- `serve_fake`: the same in a process (`tests/testkit/serve_fake.py`), for signals.
- `serve_live`, `serve_here`: `embedyard serve` as a user runs it, on a free port, without this machine's settings.
- `serving`, `serving_in_thread`: any app.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import yaml
from litestar import Litestar
from msgspec import Struct, structs

from benchmarks.lib.app_server import QuietServer as QuietServer
from benchmarks.lib.app_server import serving as serving
from benchmarks.lib.app_server import serving_in_thread as serving_in_thread
from engines.host import Host, HostConfig
from engines.pool.slot import PoolPolicy
from engines.spec import Calibration, Matryoshka, ModelSpec
from engines.testing.fakes import WORKSPACE_BYTES, FakeFiles, FakeLoader, InlineWorkers, fake_runtime
from engines.types import Budget
from router.app import create_app
from router.auth.keys import digest_of
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.backends import WIDTH, ScriptedBackend
from tests.testkit.clocks import FakeClock

ROOT = Path(__file__).parents[2]

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


def serve(settings: Settings) -> Iterator[Served]:
    backend = ScriptedBackend("mini", "BAAI/bge-m3")
    app = create_app(settings, REGISTRY, backend, wall_clock=lambda: 1_700_000_000.9)
    with serving_in_thread(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield Served(url, client, backend)


EMBED = "/v1/embeddings"


def secret_of(key_id: str) -> str:
    """Return the key of an id of `write_keys`."""
    return f"ey-hunter-{key_id}"


def bearer(key_id: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret_of(key_id)}"}


def write_keys(path: Path, keys: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a keys file: ids, and the additional fields of each key."""
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

FAKE_REGISTRY = Registry(models=SPECS, aliases={"text-embedding-3-small": "mini"}, default_model="mini")


class FakeServer(Struct):
    """A server over fakes: its client, loader and workers."""

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
        """Return the slot of `mini` as soon as it has the wanted fields; the suite's timeout is the limit."""
        while True:
            slot = await self.slot()
            if slot | wanted == slot:
                return slot


@asynccontextmanager
async def fake_server(
    *,
    registry: Registry = FAKE_REGISTRY,
    budget_bytes: int = 10**6,
    loader: FakeLoader | None = None,
    files: FakeFiles | None = None,
    **settings: float,
) -> AsyncIterator[FakeServer]:
    workers, loader = InlineWorkers(), loader or FakeLoader()
    config = HostConfig(
        host_id="cpu", budget=Budget(size_bytes=budget_bytes), workspace_bytes=WORKSPACE_BYTES,
        rules=PoolPolicy(min_residency_s=0.0, residency_loads=0.0),
    )  # fmt: skip
    specs = registry.models
    host = Host(config, specs, files or FakeFiles(), loader, structs.replace(fake_runtime(), workers=workers))
    app = create_app(structs.replace(Settings(), **settings), registry, LocalBackend([host], specs))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield FakeServer(client, url, loader, workers)
    assert loader.violations == []


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the suite's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - the server has no event for it
        await asyncio.sleep(0.002)


MODULE = (sys.executable, "-m", "router")
"""The program `embedyard`, from this tree."""

_ADDRESS = re.compile(r"Embedyard serves (http://\S+)")


class LiveServer(Struct, frozen=True):
    """A running server; `banner` is its output when it was ready, `log` the file of its standard error."""

    url: str
    process: subprocess.Popen[str]
    banner: str
    log: Path


@contextmanager
def serve_live(registry: Path, **environ: str) -> Iterator[LiveServer]:
    """Serve a registry until the block ends, then stop with SIGTERM.

    Args:
        environ: settings of this server; those of the test run are not inherited. Without PORT, a free port.
    """
    with serve_here(Path.cwd(), "--registry", str(registry), **environ) as server:
        yield server


@contextmanager
def serve_here(cwd: Path, *arguments: str, command: Sequence[str] = MODULE, **environ: str) -> Iterator[LiveServer]:
    """Serve from a working folder until the block ends, then stop with SIGTERM.

    Args:
        arguments: of `embedyard serve`.
        command: the program `embedyard`.
        environ: as for `serve_live`.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", environ.get("PORT", "0")],
            cwd=cwd,
            env=environment(folder) | environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield _wait(process, Path(folder) / "log")
        finally:
            process.terminate()
            process.communicate(timeout=60)


def environment(folder: str) -> dict[str, str]:
    """Return the environment of a process that inherits no setting, with its own caches in a folder."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = {"STATE_DIR": folder, "HF_HOME": folder, "LOG_FORMAT": "auto", "HF_HUB_OFFLINE": "1"}
    return kept | own | {"PYTHONPATH": str(Path(__file__).parents[2])}


def _wait(process: subprocess.Popen[str], log: Path) -> LiveServer:
    assert process.stdout is not None
    lines: list[str] = []
    url: str | None = None
    for line in process.stdout:
        lines.append(line)
        match = _ADDRESS.search(line)
        url = match[1] if match else url
        if url is not None and "curl " in line:
            return LiveServer(url, process, "".join(lines), log)
    raise AssertionError(f"the server did not start:\n{''.join(lines)}\n{log.read_text()}")


class FakeProcess(Struct):
    """A server process, its URL, and its log: a file, because a full pipe would block it."""

    popen: subprocess.Popen[str]
    url: str
    log: IO[str]

    def send_signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10)

    def logged(self) -> list[str]:
        """Return the events of its log, once it has ended."""
        self.log.seek(0)
        return [json.loads(line)["event"] for line in self.log]

    def running(self, client: httpx.Client) -> float:
        """Return the number of requests that are being embedded."""
        return float(sum(slot["leases"] for slot in client.get("/admin/models").json()["data"]))

    def wait_for_leases(self, number: int) -> None:
        with self.client() as client:
            while self.running(client) < number:
                time.sleep(0.005)


@contextmanager
def serve_fake(*arguments: str) -> Iterator[FakeProcess]:
    command = [sys.executable, "-m", "tests.testkit.serve_fake", *arguments]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            yield FakeProcess(child, child.stdout.readline().strip(), log)
        finally:
            child.kill()
