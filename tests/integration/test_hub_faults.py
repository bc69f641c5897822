"""Tests every fault of a hub through the whole server: waiters' errors, operators' views, and the recovery."""

import asyncio
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from msgspec import Struct

from benchmarks.lib.hub import (
    LISTING,
    Corrupt,
    Cut,
    Fault,
    Hold,
    LoopbackHub,
    NotAHub,
    Shorter,
    Slow,
    gated,
    not_found,
    server_error,
    too_many_requests,
    unauthorized,
)
from benchmarks.lib.small_memory import RealServer, Truth, build_truths, following, hub_config, real_server, specs_of
from engines.pool import effect_runner
from engines.pool.slot import PoolPolicy
from router.config.settings import Settings
from tests.testkit.servers import serve_live

pytestmark = pytest.mark.slow

REPO = "org/model"
NAME = "bert-cls"
WEIGHTS = "model.safetensors"
WITHIN_S = 10.0
RULES = PoolPolicy(retry_s=(0.3, 0.5), retry_denied_s=(0.4, 0.5))
"""Quarantines in a hurry: ten seconds and a minute in earnest."""


class Case(Struct, frozen=True):
    """A fault, the file it affects, and its error. `is_hopeless`: only a person can resolve it."""

    fault: Callable[[], Fault]
    kind: str
    words: str
    file: str | None = None
    is_hopeless: bool = False


CASES = {
    "a gated repository": Case(gated, "access_denied", "accept its licence", WEIGHTS, True),
    "an unknown repository": Case(not_found, "source_not_found", "correct 'source'", LISTING, True),
    "a refused request": Case(unauthorized, "access_denied", "HF_TOKEN", LISTING, True),
    "a hub that is too busy": Case(too_many_requests, "hub_unreachable", "429"),
    "a hub that asks for a long wait": Case(lambda: too_many_requests(3600), "hub_unreachable", "wait 3600 s"),
    "a hub that fails": Case(lambda: server_error(503), "hub_unreachable", "answered 503"),
    "a hub that crashes on weights": Case(lambda: server_error(500), "hub_unreachable", "answered 500", WEIGHTS),
    "a cut connection": Case(lambda: Cut(after_bytes=5000), "hub_unreachable", "broke while reading", WEIGHTS),
    "a corrupt file": Case(lambda: Corrupt(at_byte=200_000), "broken_files", "arrived corrupt twice", WEIGHTS),
    "a short file": Case(lambda: Shorter(by_bytes=10), "broken_files", "arrived corrupt twice", WEIGHTS),
    "a corrupt config": Case(lambda: Corrupt(at_byte=3), "broken_files", "arrived corrupt twice", "config.json"),
    "a hub that falls silent": Case(lambda: Hold(after_bytes=5000), "hub_unreachable", "sent nothing", WEIGHTS),
    "a hub that never answers": Case(Hold, "hub_unreachable", "sent nothing", LISTING),
    "a captive portal": Case(NotAHub, "hub_unreachable", "does not answer like a model hub", LISTING),
}  # fmt: skip


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return build_truths(tmp_path_factory.mktemp("hub"), [NAME])[NAME]


class HubServer(Struct):
    """A server whose only model is on a hub."""

    hub: LoopbackHub
    real: RealServer
    truth: Truth
    cache: Path

    async def ask(self) -> httpx.Response:
        return await self.real.embed(NAME, self.truth.texts[:3])

    async def slot(self) -> dict[str, Any]:
        return await self.real.slot(NAME)

    async def ask_until_served(self) -> httpx.Response:
        """Send requests until one succeeds, as a client that obeys Retry-After; no restart, no operator."""
        while (answer := await self.ask()).status_code != 200:  # noqa: ASYNC110 - as clients do
            await asyncio.sleep(min(1.0, int(answer.headers["retry-after-ms"]) / 1000))
        return answer


@asynccontextmanager
async def hub_server(
    truth: Truth, folder: Path, settings: Settings | None = None, state: Path | None = None, **config: Any
) -> AsyncIterator[HubServer]:
    specs = {NAME: specs_of({NAME: truth}, source=REPO)[NAME]}
    with LoopbackHub() as hub:
        hub.add(REPO, truth.folder)
        short_waits = {"timeout_s": 0.4, "attempts": 2} | config
        client = hub_config(hub, folder, **short_waits)
        async with real_server(specs, rules=RULES, hub=client, settings=settings, state=state) as real:
            yield HubServer(hub, real, truth, folder)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_a_fault_fails_all_waiters_is_shown_to_operators_and_passes(
    truth: Truth, tmp_path: Path, case: Case
) -> None:
    async with hub_server(truth, tmp_path) as here:
        here.hub.fail(REPO, case.fault(), file=case.file)
        asked_at, begun_s = time.time(), time.monotonic()
        answers = await asyncio.gather(*(here.ask() for _ in range(4)))
        took_s = time.monotonic() - begun_s
        slot = await here.slot()
        num_requests = len(here.hub.requests)
        during = await here.ask()
        num_more = len(here.hub.requests) - num_requests if time.time() < slot["retry_at"] else 0
        here.hub.heal()
        healed = await here.ask_until_served()
        after = await here.slot()

    assert took_s < WITHIN_S
    for answer in (*answers, during):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "model_load_failed")
        assert case.words in error["message"]
        assert str(tmp_path) not in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert (answer.headers.get("x-should-retry") == "false") == case.is_hopeless
    assert slot["state"] == "failed"
    assert slot["last_error"].startswith(f"{case.kind}: ")
    assert asked_at < slot["retry_at"] < asked_at + WITHIN_S
    assert num_more == 0, "requests during the quarantine are answered without a request to the hub"
    here.truth.check(range(3), healed.json()["data"])
    assert (after["state"], after["last_error"], after["leases"]) == ("ready", None, 0)


async def test_a_corrupt_file_is_fetched_again_and_no_request_fails(truth: Truth, tmp_path: Path) -> None:
    async with hub_server(truth, tmp_path) as here:
        here.hub.fail(REPO, Corrupt(at_byte=200_000), file=WEIGHTS, times=3)
        answer = await here.ask()

    assert answer.status_code == 200
    here.truth.check(range(3), answer.json()["data"])


async def test_a_slow_hub_is_waited_for_and_its_progress_is_reported(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress of every chunk is reported, and no read times out, so that the result is independent of the load."""
    monkeypatch.setattr(effect_runner, "PROGRESS_S", 0.0)
    size_bytes = (truth.folder / WEIGHTS).stat().st_size
    async with hub_server(truth, tmp_path, timeout_s=30.0) as here, following(here.real) as events:
        await here.real.client.get(f"/admin/plan?model={NAME}")
        here.hub.fail(REPO, Slow(bytes_per_s=2 * size_bytes), file=WEIGHTS)
        answer = await here.ask()
    progress = [event for event in events if event.kind == "progress"]
    done = [event.done_bytes for event in progress]

    assert answer.status_code == 200
    assert len(progress) >= 3
    assert done == sorted(done)
    assert done[-1] == progress[-1].total_bytes > size_bytes


async def test_a_request_that_cannot_wait_gets_the_downloads_progress_and_the_download_goes_on(
    truth: Truth, tmp_path: Path
) -> None:
    settings = Settings(load_timeout_s=0.5)
    async with hub_server(truth, tmp_path, settings, timeout_s=30.0) as here:
        await here.real.client.get(f"/admin/plan?model={NAME}")
        here.hub.fail(REPO, Hold(after_bytes=150_000), file=WEIGHTS)
        impatient = await here.ask()
        slot = await here.slot()
        here.hub.heal()
        await here.ask_until_served()
        after = await here.slot()
    error = impatient.json()["error"]

    assert (impatient.status_code, error["code"]) == (503, "model_loading")
    assert re.search(r"still downloading \(1\d\d KiB of \d+ KiB\)", error["message"])
    assert 150_000 <= slot["fetched_bytes"] < slot["fetch_total_bytes"]
    assert after["loads"] == 1
    assert here.hub.downloads(REPO, WEIGHTS) == 2, "the header for its size, and one download"


async def test_a_full_disk_is_said_so_before_the_download_and_passes(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hub_server(truth, tmp_path) as here:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        answer = await here.ask()
        downloads = here.hub.downloads(REPO, WEIGHTS)
        monkeypatch.undo()
        healed = await here.ask_until_served()
    error = answer.json()["error"]

    assert (answer.status_code, error["code"]) == (503, "model_load_failed")
    assert "9.8 KiB are free" in error["message"]
    assert downloads <= 1, "only its header"
    assert healed.status_code == 200


async def test_offline_without_the_files_is_said_so(truth: Truth, tmp_path: Path) -> None:
    async with hub_server(truth, tmp_path, offline=True) as here:
        answer = await here.ask()
        num_requests = len(here.hub.requests)

    assert answer.json()["error"]["code"] == "model_load_failed"
    assert "HF_HUB_OFFLINE" in answer.json()["error"]["message"]
    assert num_requests == 0


async def test_a_faulty_model_does_not_affect_the_others(truth: Truth, tmp_path: Path) -> None:
    """A hub that hangs delays its own model only: ready ones answer at once, and states can be read."""
    hold = Hold()
    with LoopbackHub() as hub:
        hub.add(REPO, truth.folder)
        hub.fail(REPO, hold)
        specs = specs_of({NAME: truth}) | {"stuck": specs_of({NAME: truth}, source=REPO, model_id="stuck")[NAME]}
        async with real_server(specs, hub=hub_config(hub, tmp_path, timeout_s=30.0)) as real:
            await real.embed(NAME)
            waiting = asyncio.create_task(real.embed("stuck"))
            await real.until("stuck", state="fetching", waiters=1)
            begun_s = time.monotonic()
            for _ in range(20):
                assert (await real.embed(NAME, truth.texts[:1])).status_code == 200
            took_s = time.monotonic() - begun_s
            hub.heal()
            assert (await waiting).status_code == 200

    assert took_s < 5.0


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(truth: Truth, tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    registry.write_text(f"version: 1\nmodels:\n  - {{name: {NAME}, source: {REPO}}}\n")
    slot = f"{{}}/admin/models/{NAME}"
    body = {"input": list(truth.texts[:3])} | {"model": NAME}
    with LoopbackHub() as hub:
        hub.add(REPO, truth.folder)
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        with serve_live(registry, **environ) as server:
            httpx.get(f"{server.url}/admin/plan?model={NAME}")
            hub.fail(REPO, Hold(after_bytes=200_000), file=WEIGHTS)
            httpx.post(f"{server.url}/admin/models/{NAME}/preload", json={"wait": False})
            with httpx.Client() as client:
                while client.get(slot.format(server.url)).json()["fetched_bytes"] < 200_000:
                    pass
            server.process.kill()
            server.process.wait(20)
        left = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
        hub.heal()
        with serve_live(registry, **environ) as server:
            state = httpx.get(slot.format(server.url)).json()["state"]
            answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    resumed = [request.range for request in hub.requests if request.is_content and request.file == WEIGHTS][-1]

    assert any(path.name.endswith(".part") for path in left), "the download was cut half-way"
    assert state == "absent"
    truth.check(range(3), answer.json()["data"])
    assert resumed is not None
    assert int(resumed.removeprefix("bytes=").partition("-")[0]) > 0, "it went on where it was killed"


# ---- files that are damaged after their download ----


def _damage(cache: Path) -> None:
    """Change a few bytes of the weights, as a failing disk does: size, header and mtime stay."""
    (shown,) = cache.glob(f"models--*/snapshots/*/{WEIGHTS}")
    blob = shown.resolve()
    stat = blob.stat()
    with blob.open("r+b") as file:
        file.seek(stat.st_size * 9 // 10)  # in a layer, which every text goes through
        file.write(b"\x3f" * 4096)
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))


async def test_a_file_that_was_damaged_while_its_model_was_away_is_fetched_again(truth: Truth, tmp_path: Path) -> None:
    async with hub_server(truth, tmp_path, state=tmp_path / "state") as here:
        await here.ask()
        await here.real.client.post(f"/admin/models/{NAME}/evict", json={})
        num_downloads = here.hub.downloads(REPO, WEIGHTS)
        _damage(tmp_path)
        answer = await here.ask()
        slot = await here.slot()
        num_more = here.hub.downloads(REPO, WEIGHTS) - num_downloads

    assert answer.status_code == 200, answer.text
    here.truth.check(range(3), answer.json()["data"])
    assert (slot["state"], slot["last_error"], num_more) == ("ready", None, 1)


async def test_a_file_that_was_damaged_before_its_first_load_is_found_in_idle_time(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its hash shows it: there is no canary yet, and all paths of the model agree."""
    monkeypatch.setattr("engines.pool.idle_verification.IDLE_S", 0.2)
    async with hub_server(truth, tmp_path, state=tmp_path / "state") as here:
        await here.ask()
    shutil.rmtree(tmp_path / "state")
    _damage(tmp_path)

    async with hub_server(truth, tmp_path, state=tmp_path / "state") as here, following(here.real) as events:
        first = await here.ask()
        while here.hub.downloads(REPO, WEIGHTS) == 0:  # noqa: ASYNC110 - nobody asks meanwhile
            await asyncio.sleep(0.1)
        later = await here.ask_until_served()

    assert first.status_code == 200
    with pytest.raises(AssertionError, match="off by"):
        here.truth.check(range(3), first.json()["data"])
    here.truth.check(range(3), later.json()["data"])
    assert "damaged" in [event.reason for event in events]


async def test_a_damaged_file_and_no_hub_are_refused_with_what_is_wrong(truth: Truth, tmp_path: Path) -> None:
    async with hub_server(truth, tmp_path, state=tmp_path / "state") as here:
        await here.ask()
        await here.real.client.post(f"/admin/models/{NAME}/evict", json={})
        _damage(tmp_path)
        here.hub.fail(REPO, server_error(503))
        answer = await here.ask()
        here.hub.heal()
        healed = await here.ask_until_served()

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_load_failed"
    here.truth.check(range(3), healed.json()["data"])
