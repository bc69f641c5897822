"""Tests faults: what clients see, and that the server recovers. docs/operations.md, *Broken and recovered*, names them.

Faults of the hub are in `test_hub_faults.py`, of Redis in `test_store.py` and `test_limiter.py` of
`tests/unit/router/limits`, the end of a server in `test_shutdown.py`.
"""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sentence_transformers.sentence_transformer.modules import Pooling
from structlog.testing import capture_logs

from benchmarks.lib import vocabularies
from benchmarks.lib.hub import LoopbackHub
from benchmarks.lib.models import WIDTH, bert_config, save, transformer
from benchmarks.lib.small_memory import (
    EMBED,
    RealServer,
    Truth,
    build_truths,
    hub_config,
    real_server,
    specs_of,
    truth_of,
)
from benchmarks.lib.workloads import mixed
from engines.batching.runner import Runner
from engines.hub.partial_file import PartialFile
from engines.loading.loader import TorchLoader
from engines.pool.slot import PoolPolicy
from engines.spec import ModelSpec
from engines.types import ModelFiles
from router.app import create_app
from router.backends.local import open_local_backend
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.servers import serve_live, serving

pytestmark = pytest.mark.slow

NAMES = ("bert-cls", "mpnet-mean")
READY_WITHIN_S = 15.0
CLIENTS = 16
PAUSE_S = 0.02
"""Between two requests of a client: without it they took most of the cores, on which the server is to start."""
CUT = {"ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}
"""What a client sees of a server that is no longer there."""


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    return build_truths(tmp_path_factory.mktemp("chaos"), NAMES)


# ---- the process ----


class Crowd:
    """Clients that send requests until they are stopped.

    `seen`: every outcome, a status or the name of an error. `served`: models that returned a right answer.
    """

    def __init__(self, url: str, truths: dict[str, Truth]) -> None:
        self.seen: list[str] = []
        self.served: set[str] = set()
        self._url, self._truths = url, truths
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(CLIENTS)
        self._running = [self._threads.submit(self._ask, random.Random(seed)) for seed in range(CLIENTS)]

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._threads.shutdown()

    def stop(self) -> None:
        """Stop after the requests in flight; raise the first error of a client."""
        self._over.set()
        for one in self._running:
            one.result()

    def _ask(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=100) as client:
            while not self._over.is_set():
                name = rng.choice(list(self._truths))
                at = rng.randrange(len(self._truths[name].texts))
                try:
                    answer = client.post(EMBED, json={"model": name, "input": self._truths[name].texts[at]})
                except httpx.TransportError as error:
                    self.seen.append(type(error).__name__)
                    self._over.wait(0.5)  # as SDKs do
                    continue
                self.seen.append(str(answer.status_code))
                if answer.status_code == 200:
                    self._truths[name].check([at], answer.json()["data"])
                    self.served.add(name)
                self._over.wait(PAUSE_S)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    """Build three models of 6.6 MB each: two fit in the smallest budget that a server accepts."""
    folder, texts = tmp_path_factory.mktemp("large"), mixed(12, seed=3, longest_words=40)
    for seed, name in enumerate(("a", "b", "c")):
        tokenizer = vocabularies.bert()
        model = transformer(bert_config(tokenizer, intermediate_size=8192), seed=seed)
        save(folder / name, model, tokenizer, [Pooling(WIDTH, "mean")])
    return {name: truth_of(folder / name, texts) for name in ("a", "b", "c")}


def test_killed_under_load_it_is_ready_again_by_itself_and_its_cache_is_whole(
    large: dict[str, Truth], tmp_path: Path
) -> None:
    """SIGKILL while three models alternate in memory for two, during loads, evictions and measurements."""
    registry, state = tmp_path / "registry.yaml", tmp_path / "state"
    models = [{"name": name, "source": f"org/{name}", "max_batch_tokens": 32} for name in large]
    registry.write_text(yaml.safe_dump({"version": 1, "models": models}))
    with LoopbackHub() as hub:
        for name, truth in large.items():
            hub.add(f"org/{name}", truth.folder)
        kept = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        kept |= {"STATE_DIR": str(state), "MEMORY_BUDGET": "18MiB"}
        with serve_live(registry, **kept) as first, Crowd(first.url, large) as crowd:
            until(lambda: len(crowd.served) > 1 and all(slot["state"] in HERE for slot in slots_of(first.url)))
            num_seen = len(crowd.seen)
            first.process.kill()
            first.process.wait()
            killed_s, num_before = time.monotonic(), num_fetched(hub, large)
            crowd.served.clear()
            with serve_live(registry, PORT=first.url.rpartition(":")[2], **kept) as second:
                until(lambda: httpx.get(f"{second.url}/ready").status_code == 200)
                took_s = time.monotonic() - killed_s - waited_for_a_core_s(second.process.pid)
                until(lambda: len(crowd.served) > 1)
                slots, num_after = slots_of(second.url), num_fetched(hub, large)
                crowd.stop()

    assert took_s < READY_WITHIN_S
    assert set(crowd.seen) <= {"200", *CUT}, "right answers, or a connection that was cut or refused; nothing else"
    assert CUT & set(crowd.seen[num_seen:])
    assert num_after == num_before, "what had been fetched was whole, and is not fetched again"
    assert [(slot["state"] in HERE, slot["last_error"]) for slot in slots] == [(True, None)] * 3
    assert json.loads((state / "measurements.json").read_text())


HERE = {"cold", "waiting_space", "loading", "warming", "ready", "draining", "unloading"}
"""States of a model whose files are on disk."""


def slots_of(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/admin/models").json()["data"]
    return found


def waited_for_a_core_s(pid: int) -> float:
    """Return how long a process's main thread was ready but waited for a core, which is not the server's fault."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def num_fetched(hub: LoopbackHub, truths: Iterable[str]) -> int:
    """Count the hub's answers with file content."""
    return sum(hub.downloads(f"org/{name}") for name in truths)


def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition; the suite's timeout is the limit."""
    while not is_so():
        time.sleep(0.02)


# ---- the disk ----


async def test_a_disk_that_fills_up_during_a_download_is_said_so_and_the_next_try_succeeds(
    truths: dict[str, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bert-cls"
    written = 0

    def write_until_full(part: PartialFile, chunk: bytes, append: Callable[[PartialFile, bytes], None]) -> None:
        nonlocal written
        written += len(chunk)
        if written > 150_000:
            raise OSError(28, "No space left on device", str(tmp_path))
        append(part, chunk)

    append = PartialFile.append
    with LoopbackHub() as hub:
        hub.add("org/model", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source="org/model")[name]}
        rules = PoolPolicy(retry_s=(0.2, 0.3))
        async with real_server(specs, rules=rules, hub=hub_config(hub, tmp_path)) as server:
            monkeypatch.setattr(PartialFile, "append", lambda part, chunk: write_until_full(part, chunk, append))
            answers = await asyncio.gather(*(server.embed(name) for _ in range(3)))
            left = parts(tmp_path)
            health = await server.client.get("/health")
            monkeypatch.undo()
            healed = await ask_until_served(server, name)

    assert written > 150_000
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "model_load_failed")
        assert "filled up" in error["message"]
        assert str(tmp_path) not in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
    assert left == [], "what could not be finished does not keep the disk full"
    assert health.status_code == 200
    assert healed.status_code == 200


def parts(folder: Path) -> list[Path]:
    """Return the partial files of downloads."""
    return [*folder.rglob("*.part")]


async def ask_until_served(server: RealServer, name: str) -> httpx.Response:
    """Send requests until one succeeds, as a client that obeys Retry-After."""
    while (answer := await server.embed(name)).status_code != 200:  # noqa: ASYNC110 - as clients do
        await asyncio.sleep(min(0.3, int(answer.headers["retry-after-ms"]) / 1000))
    return answer


# ---- the clock ----


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0], ids=["a day ahead", "a day back"])
async def test_a_clock_that_jumps_changes_no_answer(
    truths: dict[str, Truth], jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle models stay, limits neither open nor lock callers out, and a quarantine keeps its length."""
    specs = specs_of({NAMES[0]: truths[NAMES[0]]}, keep_alive_s=600.0)
    specs |= {"broken": specs_of({NAMES[0]: truths[NAMES[0]]}, source="/nowhere/at/all", model_id="broken")[NAMES[0]]}
    settings = Settings(grace_seconds=2.0, rate_limit_requests=3, rate_limit_window_s=600)
    wall = time.time
    async with real_server(specs, settings=settings) as server:
        first = [await server.embed(NAMES[0]) for _ in range(2)]
        broken = await server.embed("broken")
        monkeypatch.setattr(time, "time", lambda: wall() + jump_s)
        after = [await server.embed(NAMES[0]) for _ in range(2)]
        await asyncio.sleep(0.2)  # for whatever would happen now
        slot, failed = await server.slot(NAMES[0]), await server.slot("broken")
        probes = [(await server.client.get(path)).status_code for path in ("/health", "/ready", "/metrics")]

    assert [answer.status_code for answer in first] == [200, 200]
    assert broken.json()["error"]["code"] == "model_load_failed"
    assert [answer.status_code for answer in after] == [429, 429], "three in ten minutes, whatever the clock says"
    assert 0 < int(after[0].headers["retry-after"]) <= 600
    assert (slot["state"], slot["loads"], slot["evictions"]) == ("ready", 1, 0)
    assert failed["state"] == "failed"
    assert probes == [200, 200, 200]


# ---- the forward pass ----


async def test_a_forward_pass_that_raises_fails_its_own_callers_and_no_one_else(
    truths: dict[str, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Runner._forward

    def raise_for_poison(runner: Runner, entries: list[object]) -> object:
        if any(len(entry.ids) == 3 for entry in entries):  # type: ignore[attr-defined]  # an Entry, which is not to be imported for this alone
            raise RuntimeError("a kernel failed at /secret/place")
        return forward(runner, entries)  # type: ignore[arg-type]  # as above

    async with real_server(specs_of(truths)) as server:
        await asyncio.gather(*(server.embed(name) for name in NAMES))
        monkeypatch.setattr(Runner, "_forward", raise_for_poison)
        with capture_logs() as lines:
            bad = await server.embed(NAMES[0], ["the"])
            good = await server.embed(NAMES[0], truths[NAMES[0]].texts[:2])
            other = await server.embed(NAMES[1], truths[NAMES[1]].texts[:2])
            slot, health = await server.slot(NAMES[0]), await server.client.get("/health")
    error = bad.json()["error"]

    assert (bad.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "forward pass failed (RuntimeError)" in error["message"]
    assert "/secret" not in bad.text
    assert [line["event"] for line in lines].count("engine.forward_failed") == 1
    truths[NAMES[0]].check([0, 1], good.json()["data"])
    truths[NAMES[1]].check([0, 1], other.json()["data"])
    assert (slot["state"], slot["leases"], slot["queue_items"]) == ("ready", 0, 0)
    assert health.status_code == 200


async def test_a_forward_pass_that_hangs_fails_all_requests_and_health_until_it_ends(
    truths: dict[str, Truth], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real scheduler that hangs. The watchdog's limit is a second here, by default two minutes."""
    forward, hangs, release = Runner._forward, threading.Event(), threading.Event()

    def hang(runner: Runner, entries: object) -> object:
        hangs.set()
        release.wait(30)
        return forward(runner, entries)  # type: ignore[arg-type]  # as it came

    specs = specs_of(truths)
    registry = Registry(models=specs)
    settings = Settings(watchdog_seconds=1.0, grace_seconds=2.0, device=("cpu",), state_dir=tmp_path)
    backend = open_local_backend(settings, registry)
    async with (
        serving(create_app(settings, registry, backend)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):

        async def ask(name: str) -> httpx.Response:
            return await client.post(EMBED, json={"model": name, "input": truths[name].texts[0]})

        warm = [await ask(name) for name in NAMES]
        monkeypatch.setattr(Runner, "_forward", hang)
        stuck = asyncio.create_task(ask(NAMES[0]))
        await asyncio.to_thread(hangs.wait, 10)
        begun_s = time.monotonic()
        other = asyncio.create_task(ask(NAMES[1]))
        told = [await stuck, await other]
        took_s = time.monotonic() - begun_s
        late = await ask(NAMES[0])
        health, ready = await client.get("/health"), await client.get("/ready")
        monkeypatch.undo()
        release.set()
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110 - as a supervisor does
            await asyncio.sleep(0.02)
        again = [await ask(name) for name in NAMES]

    assert [answer.status_code for answer in warm] == [200, 200]
    for answer in (*told, late, health):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_down")
        assert "a forward pass has been running for" in answer.json()["error"]["message"]
    assert took_s < 4.0
    assert ready.status_code == 503
    for name, answer in zip(NAMES, again, strict=True):
        truths[name].check([0], answer.json()["data"])


async def test_a_load_that_hangs_fails_its_waiters_and_health_while_the_rest_is_served(
    truths: dict[str, Truth], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real loader that hangs. The limit is a second here, by default ten minutes and more."""
    load, hangs, release = TorchLoader._load, threading.Event(), threading.Event()

    def hang(loader: TorchLoader, spec: ModelSpec, files: ModelFiles) -> object:
        hangs.set()
        release.wait(30)
        return load(loader, spec, files)

    registry = Registry(models=specs_of(truths))
    settings = Settings(watchdog_seconds=0.2, grace_seconds=2.0, device=("cpu",), state_dir=tmp_path)
    backend = open_local_backend(settings, registry)
    warm, cold = NAMES[:2]
    async with (
        serving(create_app(settings, registry, backend)) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):

        async def ask(name: str) -> httpx.Response:
            return await client.post(EMBED, json={"model": name, "input": truths[name].texts[0]})

        before = await ask(warm)
        monkeypatch.setattr(TorchLoader, "_load", hang)
        waiting = asyncio.create_task(ask(cold))
        assert await asyncio.to_thread(hangs.wait, 10)
        told = [await waiting, await ask(cold)]
        served, health, ready = await ask(warm), await client.get("/health"), await client.get("/ready")
        evict = await client.post(f"/admin/models/{warm}/evict")
        slot = (await client.get(f"/admin/models/{cold}")).json()
        release.set()
        while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110 - as a supervisor does
            await asyncio.sleep(0.02)
        after = await ask(cold)

    for answer in told:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_load_failed")
        assert f"the load of model '{cold}' on cpu has been running for more than" in answer.json()["error"]["message"]
    for answer in (health, ready):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_down")
        assert "nothing can be loaded on host cpu" in answer.json()["error"]["message"]
    assert (evict.status_code, evict.json()["error"]["code"]) == (409, "model_in_use")
    assert "cannot be freed" in evict.json()["error"]["message"]
    assert (slot["state"], slot["last_error"].partition(":")[0]) == ("loading", "load_hangs")
    truths[warm].check([0], before.json()["data"])
    truths[warm].check([0], served.json()["data"])
    truths[cold].check([0], after.json()["data"])


# ---- the hub ----


async def test_a_hub_that_is_away_affects_only_models_that_are_not_on_disk(
    truths: dict[str, Truth], tmp_path: Path
) -> None:
    """The hub's port is closed; a model in memory, and one whose files are on disk, are not affected."""
    with LoopbackHub() as hub:
        for name in NAMES:
            hub.add(f"org/{name}", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source=f"org/{name}")[name] for name in NAMES}
        specs |= {"absent": specs_of({NAMES[0]: truths[NAMES[0]]}, source="org/absent", model_id="absent")[NAMES[0]]}
        config = hub_config(hub, tmp_path, timeout_s=0.4, attempts=2)
        async with real_server(specs, hub=config) as first:
            assert [(await first.embed(name)).status_code for name in NAMES] == [200, 200]
    async with real_server(specs, hub=config) as server:
        absent = await server.embed("absent")
        here = [await server.embed(name, truths[name].texts[:2]) for name in NAMES]
        ready = await server.client.get("/ready")

    assert (absent.status_code, absent.json()["error"]["code"]) == (503, "model_load_failed")
    assert "cannot be reached" in absent.json()["error"]["message"]
    assert ready.status_code == 200
    for name, answer in zip(NAMES, here, strict=True):
        truths[name].check([0, 1], answer.json()["data"])
