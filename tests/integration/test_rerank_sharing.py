"""Tests an embedding model and a reranker under one budget with room for one: real weights, over sockets."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from benchmarks.lib.small_memory import Sampler, Truth, following, real_server, truth_of
from engines.pool.slot import PoolPolicy
from engines.spec import ModelSpec
from engines.types import Event
from tests.testkit.rerank_models import DOCUMENTS, KEY, QUERY, RerankModels

pytestmark = pytest.mark.slow

RESIDENCY_S = 0.5
TURNS = 3
"""Of each model."""
PATIENCE_S = 5.0
"""How long a model may go on beyond its residency while the other waits: far less than for ever, on a busy machine."""
WIDTH = 512
"""Weights of 12 MB each: more than the smallest MEMORY_BUDGET with a workspace, and than what a trial may free."""
PAIR = ("ranker", "embedder")
ASKED = {"model": "ranker", "query": QUERY, "documents": list(DOCUMENTS)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> RerankModels:
    return RerankModels(tmp_path_factory.mktemp("models"), WIDTH)


@pytest.fixture(scope="module")
def truth(models: RerankModels) -> Truth:
    return truth_of(models.folders["embedder"], DOCUMENTS)


def assert_scores(answer: httpx.Response, models: RerankModels) -> None:
    assert answer.status_code == 200, answer.text
    found = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    assert found == pytest.approx(dict(enumerate(models.expected)), abs=1e-5)


def assert_vectors(answer: httpx.Response, truth: Truth) -> None:
    assert answer.status_code == 200, answer.text
    truth.check(range(len(DOCUMENTS)), answer.json()["data"])


async def test_one_is_evicted_for_the_other_after_its_residency_and_comes_back(
    models: RerankModels, truth: Truth, tmp_path: Path
) -> None:
    specs = {name: ModelSpec(model_id=name, source=str(models.folders[name]), max_batch_tokens=512) for name in PAIR}
    sizes = await measure_both(specs, tmp_path)
    budget = max(map(sum, sizes.values())) + 1000
    rules = PoolPolicy(min_residency_s=RESIDENCY_S, residency_loads=0.0, overdue_after_s=0.2)

    async with (
        real_server(specs, budget_bytes=budget, state=tmp_path, rules=rules) as server,
        following(server) as events,
    ):
        sampler = Sampler(server.host)
        for _ in range(2):
            answers = await asyncio.gather(*(server.client.post("/v1/rerank", json=ASKED) for _ in range(5)))
            for answer in answers:
                assert_scores(answer, models)
            for answer in await asyncio.gather(*(server.embed("embedder", DOCUMENTS) for _ in range(5))):
                assert_vectors(answer, truth)
        slot = await server.slot("ranker")
    ready, evicted = (
        next(event for event in events if (event.model_id, event.target) == ("ranker", target))
        for target in ("ready", "draining")
    )

    assert sampler.overdrafts == []
    assert evicted.claimant == "embedder"
    assert evicted.time_s - ready.time_s >= RESIDENCY_S
    assert (slot["loads"], slot["evictions"]) >= (2, 1)


async def test_they_take_turns_without_end_while_both_have_clients(
    models: RerankModels, truth: Truth, tmp_path: Path
) -> None:
    """Four clients of each ask without a pause: none fails, each is served in each turn, and no turn is cut short."""
    specs = {name: ModelSpec(model_id=name, source=str(models.folders[name]), max_batch_tokens=512) for name in PAIR}
    sizes = await measure_both(specs, tmp_path)
    sizes = await measure_both(specs, tmp_path, max(map(sum, sizes.values())))  # a small budget holds no copies
    budget = max(map(sum, sizes.values())) + 1000
    rules = PoolPolicy(min_residency_s=RESIDENCY_S, residency_loads=0.0, overdue_after_s=0.2)

    async with (
        real_server(specs, budget_bytes=budget, state=tmp_path, rules=rules) as server,
        following(server) as events,
    ):
        sampler = Sampler(server.host)

        async def client(model_id: str) -> int:
            """Returns the number of turns of the model in which this client was answered."""
            turns = set()
            while min(turns_of(events, name) for name in PAIR) < TURNS:
                if model_id == "ranker":
                    assert_scores(await server.client.post("/v1/rerank", json=ASKED), models)
                else:
                    assert_vectors(await server.embed("embedder", DOCUMENTS), truth)
                turns.add(turns_of(events, model_id))
            return len(turns)

        answered = await asyncio.gather(*(client(model_id) for model_id in PAIR * 4))
    turns = [event.model_id for event in events if event.target == "ready"]
    evicted = [event for event in events if event.target == "draining"]

    assert sampler.overdrafts == []
    assert min(answered) >= TURNS - 1, "the last turn ends the test"
    assert all(one != other for one, other in pairwise(turns)), "each turn is the other's"
    for event in evicted:
        ready_s = max(
            e.time_s
            for e in events
            if e.target == "ready" and e.model_id == event.model_id and e.time_s <= event.time_s
        )
        assert event.claimant in set(PAIR) - {event.model_id}
        assert RESIDENCY_S <= event.time_s - ready_s < RESIDENCY_S + PATIENCE_S


def turns_of(events: Sequence[Event], model_id: str) -> int:
    """Return how many times a model has become ready."""
    return sum((event.model_id, event.target) == (model_id, "ready") for event in events)


async def measure_both(
    specs: dict[str, ModelSpec], state: Path, budget_bytes: int = 10**9
) -> dict[str, tuple[int, int]]:
    """Return (weights, workspace) of each in bytes; `state` stores them for later hosts."""
    sizes = {}
    for name in PAIR:
        async with real_server({name: specs[name]}, budget_bytes=budget_bytes, state=state) as server:
            if name == "ranker":
                assert (await server.client.post("/v1/rerank", json=ASKED)).status_code == 200
            else:
                assert (await server.embed(name)).status_code == 200
            slot = await server.slot(name)
        sizes[name] = slot["weight_bytes"], slot["workspace_bytes"]
    return sizes


def test_worker_processes_swap_them_too(models: RerankModels, truth: Truth, tmp_path: Path) -> None:
    """The reranker is evicted for the embedding model, after the five seconds of its residency, and comes back."""

    def swap(budget: str) -> dict[str, dict[str, int]]:
        environ = {"BACKEND": "process", "MEMORY_BUDGET": budget, "STATE_DIR": str(tmp_path)}
        with (
            models.serve(tmp_path / "registry.yaml", **environ) as server,
            httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client,
        ):
            assert_scores(client.post("/v1/rerank", json=ASKED), models)
            assert_vectors(client.post("/v1/embeddings", json={"model": "embedder", "input": DOCUMENTS}), truth)
            assert_scores(client.post("/v1/rerank", json=ASKED), models)
            return {slot["id"]: slot for slot in client.get("/admin/models").json()["data"]}

    roomy = swap("1GiB")
    sizes = [roomy[name]["weight_bytes"] + roomy[name]["workspace_bytes"] for name in PAIR]
    tight = swap(f"{max(sizes) // 1000 + 1}KB")

    assert [(roomy[name]["loads"], roomy[name]["evictions"]) for name in PAIR] == [(1, 0), (1, 0)]
    assert (tight["ranker"]["loads"], tight["ranker"]["evictions"]) == (2, 1)
