"""Tests the server under load with little memory, over real sockets and engines: budgets, many waiters, alternation."""

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from benchmarks.lib.hub import Hold, LoopbackHub
from benchmarks.lib.small_memory import (
    EIGHT,
    Truth,
    ask,
    build_truths,
    crowd,
    following,
    hub_config,
    measure,
    real_server,
    specs_of,
    unexplained,
)
from engines.pool.runtime import LOAD_LOCK, LoaderTask
from engines.pool.slot import PoolPolicy
from engines.types import Event

pytestmark = pytest.mark.slow

SECONDS = 8.0
"""A minute in earnest: `python -m benchmarks.lifecycle.endurance crowd`."""
NUM_TURNS = 4
RESIDENCY_S = 0.5


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    return build_truths(tmp_path_factory.mktemp("server"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


async def test_eight_models_share_memory_for_three(truths: dict[str, Truth], state: Path) -> None:
    found = await crowd(truths, state, SECONDS)

    assert found.asked.keys() == set(EIGHT)
    assert found.sampler.overdrafts == []
    assert found.sampler.num_samples > 100
    assert found.sampler.most_bytes > found.budget_bytes * 0.6
    assert unexplained(found.steps) == []
    assert found.count("draining", "unloading") == sum(slot["evictions"] for slot in found.slots.values()) >= 5
    assert found.count("warming", "ready") == sum(slot["loads"] for slot in found.slots.values())
    assert {(slot["leases"], slot["waiters"]) for slot in found.slots.values()} == {(0, 0)}
    assert found.rss_growth_bytes < 300e6


async def test_a_cold_model_is_fetched_and_loaded_once_for_twenty(truths: dict[str, Truth], tmp_path: Path) -> None:
    name = "bert-cls"
    rng = random.Random(1)
    with LoopbackHub() as hub:
        hub.add("org/bert", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source="org/bert")[name]}
        async with real_server(specs, hub=hub_config(hub, tmp_path)) as server:
            await asyncio.gather(*(ask(server, truths[name], name, rng) for _ in range(20)))
            slot = await server.slot(name)

    assert (slot["loads"], slot["leases"], slot["waiters"]) == (1, 0, 0)
    assert hub.downloads("org/bert", "model.safetensors") == 2, "its header, to know the size first; then all of it"


async def test_the_first_requester_leaves_and_the_second_is_answered(truths: dict[str, Truth], tmp_path: Path) -> None:
    name = "bert-cls"
    hold = Hold(after_bytes=100_000)
    with LoopbackHub() as hub:
        hub.add("org/bert", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source="org/bert")[name]}
        async with real_server(specs, hub=hub_config(hub, tmp_path)) as server:
            await server.client.get(f"/admin/plan?model={name}")  # the size is asked for before the hub is slow
            hub.fail("org/bert", hold, file="model.safetensors")
            with pytest.raises(httpx.ReadTimeout):
                await server.client.post("/v1/embeddings", json={"input": "x", "model": name}, timeout=0.6)
            await server.until(name, waiters=0, state="fetching")
            second = asyncio.create_task(ask(server, truths[name], name, random.Random(2)))
            await server.until(name, waiters=1)
            hub.heal()
            await second
            slot = await server.slot(name)

    assert (slot["loads"], slot["leases"], slot["waiters"]) == (1, 0, 0)
    assert hub.downloads("org/bert", "model.safetensors") == 2


async def test_of_a_hundred_waiters_sixty_leave_and_no_lease_is_lost(truths: dict[str, Truth]) -> None:
    """They disconnect while the load waits for its lock, while it runs, and while the answers are in flight."""
    name = "bert-cls"
    rng = random.Random(3)
    async with real_server(specs_of({name: truths[name]})) as server:
        with LOAD_LOCK.held(LoaderTask("a test", 60.0)):
            tasks = [asyncio.create_task(ask(server, truths[name], name, random.Random(seed))) for seed in range(100)]
            await asyncio.sleep(0)
            leavers = rng.sample(tasks, 60)
            for task in leavers[:20]:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.5), task.cancel)
            await asyncio.sleep(0.6)
        for task in leavers[20:]:
            asyncio.get_running_loop().call_later(rng.uniform(0, 1.0), task.cancel)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        slot = await server.until(name, leases=0, waiters=0)
    stayed = [outcome for task, outcome in zip(tasks, outcomes, strict=True) if task not in leavers]

    assert stayed == [None] * 40
    assert [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError | None)] == []
    assert slot["loads"] == 1


async def test_two_models_that_cannot_both_fit_take_turns(truths: dict[str, Truth], state: Path) -> None:
    pair = {name: truths[name] for name in ("bert-cls", "roberta-mean")}
    specs = specs_of(pair, max_batch_tokens=512)  # or both would need less once trials have found smaller batches
    sizes = await measure(specs, state)
    budget = max(sum(size) for size in sizes.values()) + 1000
    rules = PoolPolicy(min_residency_s=RESIDENCY_S, residency_loads=0.0, overdue_after_s=0.2)
    asked = Counter[str]()
    is_seen = asyncio.Event()

    async def keep_asking(name: str, seed: int) -> None:
        rng = random.Random(seed)
        while not is_seen.is_set():
            await ask(server, pair[name], name, rng)
            asked[name] += 1
            if len(turns_of(events)) >= NUM_TURNS and min(asked[name] for name in pair) >= 10:
                is_seen.set()

    with capture_logs() as logged:
        async with (
            real_server(specs, budget_bytes=budget, state=state, rules=rules) as server,
            following(server) as events,
        ):
            await asyncio.gather(*(keep_asking(name, seed) for seed in range(6) for name in pair))
    turns = turns_of(events)
    gaps = [later.time_s - earlier.time_s for earlier, later in itertools.pairwise(turns)]
    thrash = [line for line in logged if line["event"] == "model.thrash"]

    assert min(gaps) >= RESIDENCY_S
    assert thrash
    assert all(line["missing_bytes"] > 0 for line in thrash)
    assert all("so the two take turns" in event.cause for event in turns[2:])


def turns_of(events: list[Event]) -> list[Event]:
    """Count evictions for the other model."""
    return [event for event in events if event.target == "draining" and event.claimant]
