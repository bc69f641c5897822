"""Tests that all variables of the service that this one replaces have an effect, set as its users set them."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from benchmarks.lib.models import RECIPES, quiet
from benchmarks.lib.small_memory import EMBED
from router.app import create_app
from router.backends.local import open_local_backend
from router.cli.main import cli
from router.config.settings import Settings, read_settings
from router.registry.opening import open_registry
from tests.testkit.exposition import Exposition
from tests.testkit.servers import serving

ORIGINAL = {
    "API_KEY", "PORT", "MODEL_PATH", "DEVICE", "TARGET_DIM", "MAX_CONCURRENT_REQUESTS", "MAX_BATCH_SIZE",
    "BATCH_TIMEOUT", "MAX_QUEUE_SIZE", "THREAD_POOL_SIZE", "RATE_LIMIT_REQUESTS", "RATE_LIMIT_WINDOW",
}  # fmt: skip
HALF = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "my-model"
    with quiet():
        RECIPES["bert-cls"].build(folder)
    return folder


@asynccontextmanager
async def served(environ: Mapping[str, str], folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run a server with only these variables, read and built as `embedyard serve` does."""
    registry = folder.parent / "registry.yaml"
    registry.write_text(f"version: 1\nmodels:\n  - {{name: cut, source: {folder}, matryoshka: {{min: 2}}}}\n")
    always = {"REGISTRY": str(registry), "STATE_DIR": str(folder.parent / "state"), "GRACE_SECONDS": "2"}
    settings = read_settings({**always, "MODEL_PATH": str(folder), "DEVICE": "cpu", **environ})
    known = open_registry(settings)
    app = create_app(settings, known, open_local_backend(settings, known))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client


async def embed(client: httpx.AsyncClient, *texts: str, **more: Any) -> httpx.Response:
    return await client.post(EMBED, json={"input": list(texts) or ["x"], **more})


def test_they_are_all_settings_and_this_file_sets_each() -> None:
    text = Path(__file__).read_text()

    assert {name for name in ORIGINAL if f'"{name}":' in text or f'env={{"{name}"' in text} == ORIGINAL
    assert {name.lower() for name in ORIGINAL} <= {field.removesuffix("_s") for field in Settings.__struct_fields__}


async def test_api_key_model_path_device_and_target_dim(folder: Path) -> None:
    environ = {"API_KEY": "first-key", "MODEL_PATH": str(folder), "DEVICE": "cpu", "TARGET_DIM": str(HALF)}
    async with served(environ, folder) as client:
        anonymous = await embed(client)
        client.headers["authorization"] = "Bearer first-key"
        answer, cut = await embed(client), await embed(client, model="cut")
        (device,) = (await client.get("/admin/memory")).json()["devices"]
    widths = [len(one.json()["data"][0]["embedding"]) for one in (answer, cut)]

    assert anonymous.status_code == 401
    assert answer.json()["model"] == "my-model", "a request that names none gets MODEL_PATH's"
    assert widths[0] > HALF, "a model that cannot be cut keeps its width"
    assert widths[1] == HALF
    assert device["device"] == "cpu"


async def test_max_batch_size_and_max_queue_size(folder: Path) -> None:
    async with served({"MAX_BATCH_SIZE": "2", "MAX_QUEUE_SIZE": "1"}, folder) as client:
        answer = await embed(client, *"abcde")
        crowds = [[f"{number} {letter} " + "word " * 200 for letter in "abcde"] for number in range(40)]
        crowd = await asyncio.gather(*(embed(client, *texts) for texts in crowds))
        count = Exposition((await client.get("/metrics")).text)
    largest = count("embedyard_batch_texts_bucket", le="2.0", model="my-model")
    batches = count("embedyard_batch_texts_count", model="my-model")

    assert answer.status_code == 200
    assert largest == batches >= 3, "five texts in batches of two"
    refused = [one.json()["error"] for one in crowd if one.status_code != 200]
    assert {error["code"] for error in refused} == {"queue_full"}
    assert all("1 of 1 requests wait" in error["message"] for error in refused)


async def test_batch_timeout_does_not_delay_a_lone_request(folder: Path) -> None:
    async with served({"BATCH_TIMEOUT": "0.4"}, folder) as client:
        answers = [await embed(client) for _ in range(4)]
    queued_ms = [float(part.partition("dur=")[2]) for answer in answers
                 for part in answer.headers["server-timing"].split(", ") if part.startswith("queue")]  # fmt: skip

    assert len(queued_ms) == 4
    assert min(queued_ms) < 250, "it waits only for clients that were answered together"


async def test_max_concurrent_requests_queues_the_others(folder: Path) -> None:
    async with served({"MAX_CONCURRENT_REQUESTS": "2"}, folder) as client:
        answers = await asyncio.gather(*(embed(client) for _ in range(12)))

    assert {answer.status_code for answer in answers} == {200}


async def test_the_settings_of_the_original_service_as_it_ships_them_serve_a_crowd(folder: Path) -> None:
    """Thirty requests at once and two of 400 texts; the original answers them all."""
    environ = {
        "MAX_CONCURRENT_REQUESTS": "10", "MAX_BATCH_SIZE": "32", "BATCH_TIMEOUT": "0.1", "MAX_QUEUE_SIZE": "100",
    }  # fmt: skip
    async with served(environ, folder) as client:
        crowd = [embed(client, f"text {number}") for number in range(30)]
        bulk = [embed(client, *(f"{name} {number}" for number in range(400))) for name in ("one", "two")]
        answers = await asyncio.gather(*crowd, *bulk)

    assert [answer.status_code for answer in answers] == [200] * 32
    assert [len(answer.json()["data"]) for answer in answers] == [1] * 30 + [400] * 2


async def test_rate_limit_requests_and_rate_limit_window(folder: Path) -> None:
    async with served({"RATE_LIMIT_REQUESTS": "2", "RATE_LIMIT_WINDOW": "1"}, folder) as client:
        await client.post("/admin/models/my-model/preload")
        answers = [await embed(client) for _ in range(3)]
        await asyncio.sleep(1.05)
        later = await embed(client)

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert later.status_code == 200


@pytest.mark.parametrize("size", [1, 3])
async def test_thread_pool_size(folder: Path, size: int) -> None:
    before = tokenizers()
    async with served({"THREAD_POOL_SIZE": str(size)}, folder) as client:
        await asyncio.gather(*(embed(client, *[f"{number} " + "word " * 5000] * 4) for number in range(12)))
        started = tokenizers() - before

    assert len(started) == size


def tokenizers() -> set[threading.Thread]:
    """Return the tokenizer threads."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("tokenize")}


def test_port(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MODEL_PATH", str(folder))
        result = CliRunner().invoke(cli, ["serve"], env={"PORT": port})

    assert result.exit_code == 2
    assert f"PORT={port}" in result.stderr
