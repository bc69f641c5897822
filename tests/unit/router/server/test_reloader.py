"""The registry is reloaded on demand, by signal, and when the file changes; a broken file changes nothing."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from msgspec import Struct, structs
from structlog.testing import capture_logs

from engines.errors import ShuttingDown
from engines.host import Host, HostConfig
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, InlineWorkers, fake_runtime
from engines.types import Budget, HostBudget
from router.app import create_app
from router.auth.guards import keyring_of
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.opening import open_registry
from router.registry.registry import Registry, RegistryError, read_registry
from router.server.reloader import FileFingerprint, Reloader
from router.server.state import ServerState
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import serving

ROOT = Path(__file__).parents[4]
RELOAD = "/admin/registry/reload"
OLD = """\
version: 1
default_model: a
models:
  - {name: a, source: fake/a}
  - {name: b, source: fake/b, description: first}
  - {name: c, source: fake/c}
"""
NEW = """\
version: 1
default_model: d
memory: {budget: 64MiB}
models:
  - {name: a, source: fake/a, revision: v2}
  - {name: b, source: fake/b, description: second, aliases: [bee]}
  - {name: d, source: fake/d, preload: true}
"""
BROKEN = """\
version: 1
models:
  - {name: a, source: fake/a, colour: red}
  - {name: a, source: fake/b, dtype: float7}
"""
CHANGES = {
    "added": ["d"], "removed": ["c"], "updated": ["b"], "replaced": ["a"],
    "is_default_changed": True, "is_budget_changed": True,
}  # fmt: skip


class Served(Struct):
    """A server over a real pool with fake engines, and the file its registry came from."""

    client: httpx.AsyncClient
    file: Path
    loader: FakeLoader
    server_state: ServerState
    reloader: Reloader

    async def embed(self, model: str) -> int:
        return (await self.client.post("/v1/embeddings", json={"input": "x", "model": model})).status_code

    async def slot(self, model: str) -> dict[str, object]:
        found: dict[str, object] = (await self.client.get(f"/admin/models/{model}")).json()
        return found


@asynccontextmanager
async def served(folder: Path, *, workers: InlineWorkers | None = None) -> AsyncIterator[Served]:
    file = folder / "registry.yaml"
    file.write_text(OLD)
    settings, registry, loader = Settings(registry=file), read_registry(file), FakeLoader()
    world = structs.replace(fake_runtime(10**9), workers=workers or InlineWorkers())
    host = Host(HostConfig(host_id="cpu", workspace_bytes=100), registry.models, FakeFiles(), loader, world)
    app = create_app(settings, registry, LocalBackend([host], registry.models))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield Served(client, file, loader, app.state.server_state, app.state.reloader)
    assert loader.violations == []


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the suite's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - what is waited for happens in another task and has no event
        await asyncio.sleep(0.002)


async def test_a_reload_names_what_changed_and_touches_nothing_else(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        for model in "abc":
            await server.embed(model)
        server.file.write_text(NEW)
        answer = await server.client.post(RELOAD)
        statuses = [await server.embed(model) for model in ("a", "b", "bee", "c", "d")]
        (device,) = (await server.client.get("/admin/memory")).json()["devices"]
        again = await server.client.post(RELOAD)

    assert (answer.status_code, answer.json()) == (200, CHANGES)
    assert statuses == [200, 200, 200, 404, 200]
    assert server.loader.loads == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert [(engine.spec.model_id, engine.spec.revision) for engine in server.loader.engines].count(("a", "v2")) == 1
    assert device["budget_bytes"] == 64 * 2**20
    assert again.json() == {name: [] if isinstance(value, list) else False for name, value in CHANGES.items()}


async def test_all_faults_of_a_broken_file_are_reported_and_nothing_changes(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        before = server.server_state.registry
        server.file.write_text(BROKEN)
        answer = await server.client.post(RELOAD)
        statuses = [await server.embed(model) for model in "abc"]
    error = answer.json()["error"]

    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_value")
    assert error["message"].startswith("3 mistakes")
    for mistake in ("models[0].colour", "models[1].name", "models[1].dtype"):
        assert mistake in error["message"]
    assert server.server_state.registry is before
    assert statuses == [200, 200, 200]


async def test_no_mistake_is_cut_off_a_long_list(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        entries = "".join(f"  - {{name: m{i}, source: fake/m, colour{i}: red}}\n" for i in range(60))
        server.file.write_text(f"version: 1\nmodels:\n{entries}")
        message = (await server.client.post(RELOAD)).json()["error"]["message"]

    assert message.count("\n") == 60
    assert "colour59" in message


async def test_a_model_that_left_is_not_loaded_again_because_another_changed(tmp_path: Path) -> None:
    wanted = OLD.replace("fake/a", "fake/a, preload: true")
    async with served(tmp_path) as server:
        server.file.write_text(wanted)
        await server.client.post(RELOAD)
        await server.client.post("/admin/models/a/preload")
        await server.client.post("/admin/models/a/evict")
        server.file.write_text(wanted.replace("first", "second"))
        answer = await server.client.post(RELOAD)
        state = (await server.slot("a"))["state"]

    assert answer.json()["updated"] == ["b"]
    assert state == "cold"
    assert server.loader.loads == {"a": 1}


async def test_requests_that_wait_for_a_replaced_model_get_the_new_one(tmp_path: Path) -> None:
    workers = InlineWorkers()
    async with served(tmp_path, workers=workers) as server:
        workers.hold("load")
        waiting = [asyncio.create_task(server.embed("a")) for _ in range(5)]
        while (await server.slot("a"))["waiters"] != 5:
            pass
        server.file.write_text(NEW)
        await server.client.post(RELOAD)
        workers.release("load")
        statuses = await asyncio.gather(*waiting)
        slot = await server.slot("a")
        open_now = [engine.spec.revision for engine in server.loader.engines if not engine.is_closed]

    assert statuses == [200] * 5
    assert slot["leases"] == 0
    assert open_now == ["v2", None]


async def test_models_path_stays_the_default_after_a_reload(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    file = tmp_path / "registry.yaml"
    server_state = ServerState(
        Settings(registry=file, model_path=str(folder)), Registry(), ScriptedBackend(), keyring_of(Settings()), 0
    )
    reloader = Reloader(server_state)
    await reloader.reload()
    alone = server_state.registry
    file.write_text(OLD)
    await reloader.reload()

    assert (list(alone.models), alone.default_model) == (["mine"], "mine")
    assert (list(server_state.registry.models), server_state.registry.default_model) == (
        ["a", "b", "c", "mine"],
        "mine",
    )


async def test_the_budget_of_the_environment_stands(tmp_path: Path) -> None:
    backend = ScriptedBackend()
    file = tmp_path / "registry.yaml"
    file.write_text(NEW)
    settings = Settings(registry=file, memory_budget=Budget(size_bytes=2**30))
    await Reloader(ServerState(settings, Registry(), backend, keyring_of(Settings()), 0)).reload()
    await Reloader(
        ServerState(structs.replace(settings, memory_budget=None), Registry(), backend, keyring_of(Settings()), 0)
    ).reload()

    assert backend.commands == [("reload", "a", "b", "d"), ("reload", "a", "b", "d", Budget(size_bytes=64 * 2**20))]


async def test_another_host_budget_is_applied_and_none_is_the_default_of_the_machine(tmp_path: Path) -> None:
    backend, file = ScriptedBackend(), tmp_path / "registry.yaml"
    server_state = ServerState(Settings(registry=file), Registry(), backend, keyring_of(Settings()), 0)
    for memory in ("host_budget: 1GiB", "host_budget: 1GiB", "host_budget: 0", "eviction: lru"):
        file.write_text(f"version: 1\nmodels: []\nmemory: {{budget: 80%, {memory}}}\n")
        await Reloader(server_state).reload()

    assert backend.commands == [
        ("reload", Budget(size_bytes=2**30)),
        ("reload",),
        ("reload", Budget(size_bytes=0)),
        ("reload", "auto"),
    ]


async def test_the_host_budget_of_the_environment_stands(tmp_path: Path) -> None:
    backend, file = ScriptedBackend(), tmp_path / "registry.yaml"
    file.write_text("version: 1\nmodels: []\nmemory: {budget: 80%, host_budget: 1GiB}\n")
    settings = Settings(registry=file, host_memory_budget=Budget(size_bytes=0))

    await Reloader(ServerState(settings, Registry(), backend, keyring_of(Settings()), 0)).reload()

    assert backend.commands == [("reload",)]


async def test_a_file_that_appears_is_read_and_then_its_absence_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend, settings = ScriptedBackend(), Settings()
    server_state = ServerState(settings, open_registry(settings), backend, keyring_of(settings), 0)
    before = list(server_state.registry.models)
    (tmp_path / "registry.yaml").write_text(OLD)
    await Reloader(server_state).reload()
    (tmp_path / "registry.yaml").unlink()
    with pytest.raises(RegistryError, match=r"no file registry\.yaml"):
        await Reloader(server_state).reload()

    assert before == ["all-MiniLM-L6-v2"]
    assert list(server_state.registry.models) == ["a", "b", "c"]
    assert backend.commands == [("reload", "a", "b", "c")]


async def test_a_reload_keeps_to_the_models_that_the_command_line_named(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    settings, backend = Settings(registry=file, models=("b",)), ScriptedBackend()
    server_state = ServerState(settings, open_registry(settings), backend, keyring_of(settings), 0)
    file.write_text(NEW)
    await Reloader(server_state).reload()

    assert list(server_state.registry.models) == ["b"]


async def test_a_reload_of_an_unchanged_file_reaches_the_hosts_all_the_same(tmp_path: Path) -> None:
    """It repairs a host that serves another registry for whatever reason."""
    backend = ScriptedBackend()
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    settings = Settings(registry=file)
    reloader = Reloader(ServerState(settings, read_registry(file), backend, keyring_of(settings), 0))
    changes = await reloader.reload()

    assert changes.is_empty
    assert backend.commands == [("reload", "a", "b", "c")]


async def test_reloads_never_overlap_and_go_on_after_their_client_has_left(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    backend = SlowBackend()
    server_state = ServerState(Settings(registry=file), Registry(), backend, keyring_of(Settings()), 0)
    reloader = Reloader(server_state)
    first = asyncio.create_task(reloader.reload())
    await eventually(lambda: backend.running_reloads == 1)
    file.write_text(NEW)
    second = asyncio.create_task(reloader.reload())
    first.cancel()
    backend.gate.set()
    changes = await second

    assert first.cancelled()
    assert backend.most == 1
    assert changes.added == ("d",)
    assert list(server_state.registry.models) == ["a", "b", "d"]


async def test_a_backend_that_refuses_leaves_the_registry_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    backend = SlowBackend()
    backend.gate.set()
    backend.failure = ShuttingDown("too late")
    server_state = ServerState(Settings(registry=file), Registry(), backend, keyring_of(Settings()), 0)

    with pytest.raises(ShuttingDown):
        await Reloader(server_state).reload()
    assert server_state.registry == Registry()


async def test_the_watch_sees_changes_reports_mistakes_once_and_recovers(tmp_path: Path) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    server_state = ServerState(Settings(registry=file), Registry(), ScriptedBackend(), keyring_of(Settings()), 0)
    reloader = Reloader(server_state)
    with capture_logs() as logged:
        watch = asyncio.create_task(reloader.watch(0.005))
        await eventually(lambda: len(server_state.registry.models) == 3)
        file.write_text(BROKEN)
        await eventually(lambda: any(line["event"] == "registry.invalid" for line in logged))
        unchanged = server_state.registry
        file.unlink()
        await eventually(lambda: sum(line["event"] == "registry.invalid" for line in logged) == 2)
        replacement = tmp_path / "new.yaml"
        replacement.write_text(NEW)
        replacement.replace(file)
        await eventually(lambda: "d" in server_state.registry.models)
        watch.cancel()
    invalid = [line for line in logged if line["event"] == "registry.invalid"]

    assert list(unchanged.models) == ["a", "b", "c"]
    assert len(invalid[0]["mistakes"]) == 3
    assert "there is no file registry.yaml" in str(invalid[1]["mistakes"])
    assert [line["event"] for line in logged].count("registry.reloaded") == 2


async def test_a_file_that_is_still_being_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "registry.yaml"
    file.write_text(OLD)
    sizes = [*range(20), 20]
    looks: list[int] = []

    def grows(path: Path) -> FileFingerprint:
        looks.append(sizes[min(len(looks), 20)])
        return FileFingerprint(0, looks[-1], 0)

    monkeypatch.setattr("router.server.reloader.fingerprint_file", grows)
    server_state = ServerState(Settings(registry=file), Registry(), ScriptedBackend(), keyring_of(Settings()), 0)
    watch = asyncio.create_task(Reloader(server_state).watch(0.001))
    await eventually(lambda: bool(server_state.registry.models))
    watch.cancel()

    assert looks[:22] == [*sizes, 20]


class SlowBackend(ScriptedBackend):
    """Reloads when the test releases it; counts concurrent reloads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.failure: Exception | None = None
        self.running_reloads = 0
        self.most = 0

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        self.running_reloads += 1
        self.most = max(self.most, self.running_reloads)
        await self.gate.wait()
        self.running_reloads -= 1
        if self.failure:
            raise self.failure


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "registry.yaml").write_text(OLD)
    return {**os.environ, "REGISTRY": str(tmp_path / "registry.yaml"), "PYTHONPATH": str(ROOT)}


def test_a_hangup_reloads_and_does_not_end_the_server(environment: dict[str, str]) -> None:
    arguments = [sys.executable, "-m", "tests.testkit.serve_scripted"]
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        url = child.stdout.readline().strip()
        child.send_signal(signal.SIGHUP)
        line = next(line for line in map(json.loads, child.stderr) if not line["event"].startswith("server."))
        models = httpx.get(f"{url}/v1/models").json()["data"]
        child.send_signal(signal.SIGTERM)
        exit_code = child.wait(60)

    assert line["event"] == "registry.reloaded"
    assert [model["id"] for model in models] == ["a", "b", "c"]
    assert exit_code == 0


@pytest.mark.parametrize("prefix", [[], ["nohup"]])
def test_a_server_whose_terminal_is_closed_ends_unless_told_to_stay(
    environment: dict[str, str], prefix: list[str]
) -> None:
    """The server leads a session on a terminal of its own, and prints its address to a pipe."""
    parent, child = pty.openpty()
    read, write = os.pipe()
    program = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # whatever the tests run under
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *prefix, sys.executable, "-m", "tests.testkit.serve_scripted"],
        cwd=ROOT, env=environment, stdin=child, stdout=write, stderr=write, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    os.close(write)
    with os.fdopen(read) as lines:
        url = next(line for line in lines if line.startswith("http")).strip()
        os.close(parent)
        if prefix:
            assert next(line for line in lines if "registry.reloaded" in line)
            assert httpx.get(f"{url}/health").status_code == 200
            process.terminate()
        assert process.wait(60) == 0
