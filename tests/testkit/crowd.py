"""Many clients on a yard that is too small for its models: what they ask, that each answer is right, and what was seen.

`tests/integration/test_small_memory.py` does it for seconds, `python -m benchmarks.crowd` for a minute.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from engines.types import Event
from tests.testkit.small_memory import RealYard, Sampler, Truth, following, measure, real_yard, specs_of, zipf

ROOM_FOR = 3
CLIENTS = 64


class Crowd(Struct, kw_only=True):
    """What became of it. `asked`: requests by model, every one of them answered, and right.

    `steps`: the state changes of the event stream; `slots`: as /admin/models has them at the end.
    """

    asked: Counter[str]
    seconds: float
    budget_bytes: int
    sampler: Sampler
    steps: list[Event]
    slots: Mapping[str, dict[str, Any]]
    rss_growth_bytes: int

    def count(self, source: str, target: str) -> int:
        """How often a model took that step."""
        return sum((event.source, event.target) == (source, target) for event in self.steps)


async def ask(yard: RealYard, truth: Truth, name: str, rng: random.Random) -> None:
    """One request for some of the model's texts; its answer is right."""
    indexes = rng.sample(range(len(truth.texts)), rng.randint(1, 3))
    answer = await yard.embed(name, [truth.texts[index] for index in indexes])
    assert answer.status_code == 200, answer.text
    truth.check(indexes, answer.json()["data"])


async def client(yard: RealYard, truths: Mapping[str, Truth], seed: int, until_s: float) -> Counter[str]:
    """Asks, without a pause, until it is time; returns how often it asked whom."""
    rng, draw, asked = random.Random(seed), zipf(list(truths), seed), Counter[str]()
    while time.monotonic() < until_s:
        name = draw()
        await ask(yard, truths[name], name, rng)
        asked[name] += 1
    return asked


def unexplained(events: Sequence[Event]) -> list[Event]:
    """Evictions that do not say for whom, or whose claimant did not load before they came back themselves.

    Another may load in between: one that fits beside the claimant passes it while busy models drain.
    """
    found = []
    for at, event in enumerate(events):
        if (event.source, event.target) != ("ready", "draining"):
            continue
        both = {event.claimant, event.model_id}
        first = next((e.model_id for e in events[at:] if e.target == "loading" and e.model_id in both), event.claimant)
        is_explained = event.claimant is not None and event.claimant in event.cause and "are missing" in event.cause
        if not is_explained or first != event.claimant:
            found.append(event)
    return found


async def crowd(truths: Mapping[str, Truth], state: Path, seconds: float) -> Crowd:
    """`CLIENTS` clients with a Zipf mix of all models, for so long, in room for the `ROOM_FOR` largest.

    Raises:
        AssertionError: an answer was no 200, or not the vectors of sentence-transformers.
    """
    specs = specs_of(truths, max_batch_tokens=512)  # or they would need less once trials have found smaller batches
    sizes = await measure(specs, state)
    weights = sorted((size[0] for size in sizes.values()), reverse=True)
    budget = sum(weights[:ROOM_FOR]) + max(size[1] for size in sizes.values())
    async with real_yard(specs, budget_bytes=budget, state=state) as yard, following(yard) as events:
        sampler = Sampler(yard.host)
        watch = asyncio.create_task(sampler.run())
        rss_before, until_s = psutil.Process().memory_info().rss, time.monotonic() + seconds
        asked = await asyncio.gather(*(client(yard, truths, seed, until_s) for seed in range(CLIENTS)))
        rss_growth = psutil.Process().memory_info().rss - rss_before
        watch.cancel()
        slots = await yard.slots()
    return Crowd(
        asked=sum(asked, Counter()),
        seconds=seconds,
        budget_bytes=budget,
        sampler=sampler,
        steps=[event for event in events if event.kind == "state"],
        slots=slots,
        rss_growth_bytes=rss_growth,
    )
