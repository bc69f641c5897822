"""The yard under load, over real sockets and real engines: budgets, herds, turns, and who gets what."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest
from structlog.testing import capture_logs

from engines.records import Event
from engines.slots import Rules
from engines.workers import LOAD_LOCK
from tests.hub import Hold, LoopbackHub
from tests.yard import (
    EIGHT,
    RealYard,
    Sampler,
    Truth,
    build_truths,
    following,
    hub_config,
    measure,
    real_yard,
    specs_of,
    zipf,
)

CLIENTS = 64
SECONDS = 12.0
TURNS_S = 5.0
RESIDENCY_S = 0.5


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    return build_truths(tmp_path_factory.mktemp("yard"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


async def ask(yard: RealYard, truth: Truth, name: str, rng: random.Random) -> None:
    """One request for some of the model's texts; its answer is right."""
    indexes = rng.sample(range(len(truth.texts)), rng.randint(1, 3))
    answer = await yard.embed(name, [truth.texts[index] for index in indexes])
    assert answer.status_code == 200, answer.text
    truth.check(indexes, answer.json()["data"])


async def client(yard: RealYard, truths: dict[str, Truth], seed: int, until_s: float) -> Counter[str]:
    """Asks, without a pause, until it is time; returns how often it asked whom."""
    rng, draw, asked = random.Random(seed), zipf(list(truths), seed), Counter[str]()
    while time.monotonic() < until_s:
        name = draw()
        await ask(yard, truths[name], name, rng)
        asked[name] += 1
    return asked


def unexplained(events: Sequence[Event]) -> list[Event]:
    """Evictions that do not say for whom, or whose claimant did not load next."""
    found = []
    for at, event in enumerate(events):
        if (event.source, event.target) != ("ready", "draining"):
            continue
        next_load = next((later.model_id for later in events[at:] if later.target == "loading"), event.claimant)
        is_explained = event.claimant is not None and event.claimant in event.cause and "are missing" in event.cause
        if not is_explained or next_load != event.claimant:
            found.append(event)
    return found


async def test_eight_models_share_room_for_three(truths: dict[str, Truth], state: Path) -> None:
    specs = specs_of(truths)
    sizes = await measure(specs, state)
    weights = sorted((size[0] for size in sizes.values()), reverse=True)
    budget = sum(weights[:3]) + max(size[1] for size in sizes.values())
    async with real_yard(specs, budget_bytes=budget, state=state) as yard, following(yard) as events:
        sampler = Sampler(yard.host)
        watch = asyncio.create_task(sampler.run())
        rss_before, until_s = psutil.Process().memory_info().rss, time.monotonic() + SECONDS
        asked = sum(await asyncio.gather(*(client(yard, truths, seed, until_s) for seed in range(CLIENTS))), Counter())
        rss_after = psutil.Process().memory_info().rss
        watch.cancel()
        slots = await yard.slots()
        steps = [event for event in events if event.kind == "state"]
    taken = [(event.source, event.target) for event in steps]

    assert asked.keys() == set(EIGHT)
    assert sampler.overdrafts == []
    assert sampler.num_samples > 100
    assert sampler.most_bytes > budget * 0.6
    assert unexplained(steps) == []
    assert taken.count(("draining", "unloading")) == sum(slot["evictions"] for slot in slots.values()) >= 5
    assert taken.count(("warming", "ready")) == sum(slot["loads"] for slot in slots.values())
    assert {(slot["leases"], slot["waiters"]) for slot in slots.values()} == {(0, 0)}
    assert rss_after - rss_before < 300e6


async def test_a_cold_model_is_fetched_and_loaded_once_for_twenty(truths: dict[str, Truth], tmp_path: Path) -> None:
    name = "bert-cls"
    rng = random.Random(1)
    with LoopbackHub() as hub:
        hub.add("org/bert", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source="org/bert")[name]}
        async with real_yard(specs, hub=hub_config(hub, tmp_path)) as yard:
            await asyncio.gather(*(ask(yard, truths[name], name, rng) for _ in range(20)))
            slot = await yard.slot(name)

    assert (slot["loads"], slot["leases"], slot["waiters"]) == (1, 0, 0)
    assert hub.downloads("org/bert", "model.safetensors") == 2, "its header, to know the size first; then all of it"


async def test_the_first_requester_leaves_and_the_second_is_answered(truths: dict[str, Truth], tmp_path: Path) -> None:
    name = "bert-cls"
    hold = Hold(after_bytes=100_000)
    with LoopbackHub() as hub:
        hub.add("org/bert", truths[name].folder)
        specs = {name: specs_of({name: truths[name]}, source="org/bert")[name]}
        async with real_yard(specs, hub=hub_config(hub, tmp_path)) as yard:
            await yard.client.get(f"/admin/plan?model={name}")  # the size is asked for before the hub is slow
            hub.fail("org/bert", hold, file="model.safetensors")
            with pytest.raises(httpx.ReadTimeout):
                await yard.client.post("/v1/embeddings", json={"input": "x", "model": name}, timeout=0.6)
            await yard.until(name, waiters=0, state="fetching")
            second = asyncio.create_task(ask(yard, truths[name], name, random.Random(2)))
            await yard.until(name, waiters=1)
            hub.heal()
            await second
            slot = await yard.slot(name)

    assert (slot["loads"], slot["leases"], slot["waiters"]) == (1, 0, 0)
    assert hub.downloads("org/bert", "model.safetensors") == 2


async def test_of_a_hundred_waiters_sixty_leave_and_no_lease_is_lost(truths: dict[str, Truth]) -> None:
    """They leave while the load waits for its lock, while it runs, and while the answers are on their way."""
    name = "bert-cls"
    rng = random.Random(3)
    async with real_yard(specs_of({name: truths[name]})) as yard:
        with LOAD_LOCK:
            tasks = [asyncio.create_task(ask(yard, truths[name], name, random.Random(seed))) for seed in range(100)]
            await asyncio.sleep(0)
            leavers = rng.sample(tasks, 60)
            for task in leavers[:20]:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.5), task.cancel)
            await asyncio.sleep(0.6)
        for task in leavers[20:]:
            asyncio.get_running_loop().call_later(rng.uniform(0, 1.0), task.cancel)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        slot = await yard.until(name, leases=0, waiters=0)
    stayed = [outcome for task, outcome in zip(tasks, outcomes, strict=True) if task not in leavers]

    assert stayed == [None] * 40
    assert [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError | None)] == []
    assert slot["loads"] == 1


async def test_two_models_that_cannot_both_fit_take_turns(truths: dict[str, Truth], state: Path) -> None:
    pair = {name: truths[name] for name in ("bert-cls", "roberta-mean")}
    specs = specs_of(pair)
    sizes = await measure(specs, state)
    budget = max(sum(size) for size in sizes.values()) + 1000
    rules = Rules(min_residency_s=RESIDENCY_S, residency_loads=0.0, patience_s=0.2)
    until_s = time.monotonic() + TURNS_S
    with capture_logs() as logged:
        async with real_yard(specs, budget_bytes=budget, state=state, rules=rules) as yard, following(yard) as events:
            asked = await asyncio.gather(
                *(client(yard, {name: pair[name]}, seed, until_s) for seed in range(6) for name in pair)
            )
    turns = [event for event in events if event.target == "draining" and event.claimant]
    gaps = [later.time_s - earlier.time_s for earlier, later in itertools.pairwise(turns)]
    thrash = [line for line in logged if line["event"] == "model.thrash"]
    progress = sum(asked, Counter())

    assert min(progress[name] for name in pair) >= 10
    assert len(turns) >= 2
    assert min(gaps) >= RESIDENCY_S
    assert thrash
    assert all(line["missing"] > 0 for line in thrash)
    assert all("so the two take turns" in event.cause for event in turns[2:])
