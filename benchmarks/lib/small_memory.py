"""Runs a whole server in this process: small real models, real sockets, and the vectors that are right."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.lib.app_server import serving
from benchmarks.lib.hub import LoopbackHub
from benchmarks.lib.models import RECIPES, quiet, reference
from benchmarks.lib.workloads import mixed
from engines.host import Host
from engines.hub.client import HubConfig
from engines.machine import Machine, MachineConfig
from engines.pool.messages import PoolEvent
from engines.pool.slot import PoolPolicy
from engines.spec import ModelSpec
from engines.types import Budget, Event
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry

EMBED = "/v1/embeddings"
EIGHT = (
    "bert-cls", "roberta-mean", "mpnet-mean", "distilbert-mean", "modernbert-cls", "qwen3-last", "t5-mean-dense",
    "nomic-mean",
)  # fmt: skip
"""Eight different families."""

QUICK = PoolPolicy(min_residency_s=0.3, residency_loads=0.5, overdue_after_s=0.3)
"""The pool's policy with shorter times: seconds instead of a minute."""


class Truth(Struct, frozen=True):
    """A model's folder, some texts, and sentence-transformers' vectors of them: `[n, D]`, of length one."""

    folder: Path
    texts: tuple[str, ...]
    vectors: NDArray[np.float32]

    def check(self, indexes: Sequence[int], got: object) -> None:
        """Raise AssertionError unless `got`, the data of an answer, are the vectors of these texts."""
        rows = np.array([entry["embedding"] for entry in got], np.float32)  # type: ignore[attr-defined]  # parsed JSON
        off = float(np.abs(rows - self.vectors[list(indexes)]).max())
        assert off < 2e-5, f"{self.folder.name}: off by {off}"


def truth_of(folder: Path, texts: Sequence[str]) -> Truth:
    """Compute the vectors with sentence-transformers."""
    with quiet():
        vectors = reference(folder).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return Truth(folder, tuple(texts), np.asarray(vectors, np.float32))


def build_truths(root: Path, names: Sequence[str] = EIGHT, num_texts: int = 12) -> dict[str, Truth]:
    """Build the folders of recipes under `root`, and return their truths."""
    texts = mixed(num_texts, seed=3, longest_words=40)
    truths = {}
    for name in names:
        with quiet():
            RECIPES[name].build(root / name)
        truths[name] = truth_of(root / name, texts)
    return truths


def specs_of(truths: Mapping[str, Truth], **more: Any) -> dict[str, ModelSpec]:
    """Return a spec for each folder; `more` goes into every one."""
    return {
        name: ModelSpec(**{"model_id": name, "source": str(truth.folder), **RECIPES[name].spec, **more})
        for name, truth in truths.items()
    }


class RealServer(Struct):
    """A running server and its client; `host` shows what HTTP does not."""

    client: httpx.AsyncClient
    url: str
    host: Host
    specs: Mapping[str, ModelSpec]

    async def embed(self, model: str, texts: Sequence[str] = ("x",), **fields: object) -> httpx.Response:
        return await self.client.post(EMBED, json={"input": list(texts), "model": model, **fields})

    async def slot(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"/admin/models/{model}")).json()
        return found

    async def slots(self) -> dict[str, dict[str, Any]]:
        return {slot["id"]: slot for slot in (await self.client.get("/admin/models")).json()["data"]}

    async def until(self, model: str, **wanted: object) -> dict[str, Any]:
        """Return the slot as soon as it has the wanted fields; the suite's timeout is the limit."""
        while True:
            slot = await self.slot(model)
            if slot | wanted == slot:
                return slot
            await asyncio.sleep(0.005)


@asynccontextmanager
async def real_server(
    specs: Mapping[str, ModelSpec],
    *,
    budget_bytes: int = 10**9,
    rules: PoolPolicy = QUICK,
    hub: HubConfig | None = None,
    state: Path | None = None,
    settings: Settings | None = None,
) -> AsyncIterator[RealServer]:
    """Serve on this event loop; when the block ends, everything is freed and all threads have ended."""
    config = MachineConfig(
        devices=("cpu",), budget=Budget(size_bytes=budget_bytes), cores=2, tokenizer_threads=2, rules=rules, hub=hub,
        state_folder=state,
    )  # fmt: skip
    machine = Machine(config, specs)
    backend = LocalBackend(machine.hosts, specs, machine.close)
    app = create_app(settings or Settings(grace_seconds=5.0), Registry(models=dict(specs)), backend)
    limits = httpx.Limits(max_connections=None)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        yield RealServer(client, url, machine.hosts[0], specs)


def hub_config(hub: LoopbackHub, cache: Path, **more: Any) -> HubConfig:
    """Return the configuration of a client of a loopback hub, with short waits."""
    return HubConfig(**{"endpoint": hub.url, "cache_dir": str(cache), "token": False, "backoff_s": 0.05, **more})


async def measure(specs: Mapping[str, ModelSpec], state: Path) -> dict[str, tuple[int, int]]:
    """Return (weights, workspace) of each model in bytes, as measured; `state` stores them for later hosts."""
    found = {}
    async with real_server(specs, state=state) as server:
        for model_id in specs:
            assert (await server.embed(model_id)).status_code == 200
            slot = await server.slot(model_id)
            found[model_id] = (slot["weight_bytes"], slot["workspace_bytes"])
    return found


@asynccontextmanager
async def following(server: RealServer) -> AsyncIterator[list[Event]]:
    """Read the event stream until the block ends; yield the list of events so far."""
    events: list[Event] = []
    opened = asyncio.Event()

    async def follow() -> None:
        async with server.client.stream("GET", "/admin/events", timeout=None) as answer:
            async for line in answer.aiter_lines():
                opened.set()
                if line.startswith("data: "):
                    events.append(msgspec.json.decode(line.removeprefix("data: "), type=Event))

    task = asyncio.create_task(follow())
    await opened.wait()
    try:
        yield events
        await asyncio.sleep(0.1)  # for events in flight
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Sampler:
    """Samples a host's accounting up to a thousand times a second, and after each of the pool's steps.

    Only a step changes what is charged, so no overdraft is missed.
    """

    def __init__(self, host: Host, every_s: float = 0.001) -> None:
        self._host = host
        self._every_s = every_s
        self.num_samples = 0
        self.most_bytes = 0
        self.overdrafts: list[tuple[int, int]] = []
        pool, step = host._pool, host._pool.step

        def step_and_sample(event: PoolEvent) -> None:
            step(event)
            self.sample()

        pool.step = step_and_sample  # type: ignore[method-assign]  # the host ends with the test

    def sample(self) -> None:
        """Take one sample."""
        seen = self._host.snapshot()
        taken = seen.used_bytes + seen.workspace_bytes
        self.num_samples += 1
        self.most_bytes = max(self.most_bytes, taken)
        if taken > seen.budget_bytes:
            self.overdrafts.append((taken, seen.budget_bytes))

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(self._every_s)


def zipf(names: Sequence[str], seed: int, exponent: float = 1.1) -> Callable[[], str]:
    """Return a function that draws names, the first ones most often."""
    rng = random.Random(seed)
    weights = [1 / rank**exponent for rank in range(1, len(names) + 1)]
    return lambda: rng.choices(names, weights)[0]


NUM_RESIDENT = 3
CLIENTS = 64


class Crowd(Struct, kw_only=True):
    """The results of a crowd. `asked`: requests by model, all with right answers.

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
        """Count the state changes from `source` to `target`."""
        return sum((event.source, event.target) == (source, target) for event in self.steps)


async def ask(server: RealServer, truth: Truth, name: str, rng: random.Random) -> None:
    """Send one request for some of the model's texts, and assert that its answer is right."""
    indexes = rng.sample(range(len(truth.texts)), rng.randint(1, 3))
    answer = await server.embed(name, [truth.texts[index] for index in indexes])
    assert answer.status_code == 200, answer.text
    truth.check(indexes, answer.json()["data"])


async def client(server: RealServer, truths: Mapping[str, Truth], seed: int, until_s: float) -> Counter[str]:
    """Send requests without a pause until `until_s`; return their number by model."""
    rng, draw, asked = random.Random(seed), zipf(list(truths), seed), Counter[str]()
    while time.monotonic() < until_s:
        name = draw()
        await ask(server, truths[name], name, rng)
        asked[name] += 1
    return asked


def unexplained(events: Sequence[Event]) -> list[Event]:
    """Return evictions without a claimant, or whose claimant did not load before the evicted model did again.

    A third model may load in between: one that fits beside the claimant passes it while busy models drain.
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
    """Run `CLIENTS` clients with a Zipf mix of all models for `seconds`, in memory for the `NUM_RESIDENT` largest.

    Raises:
        AssertionError: an answer was no 200, or not the vectors of sentence-transformers.
    """
    specs = specs_of(truths, max_batch_tokens=512)  # trials could find smaller batches, which need less
    sizes = await measure(specs, state)
    weights = sorted((size[0] for size in sizes.values()), reverse=True)
    budget = sum(weights[:NUM_RESIDENT]) + max(size[1] for size in sizes.values())
    async with real_server(specs, budget_bytes=budget, state=state) as server, following(server) as events:
        sampler = Sampler(server.host)
        watch = asyncio.create_task(sampler.run())
        rss_before, until_s = psutil.Process().memory_info().rss, time.monotonic() + seconds
        asked = await asyncio.gather(*(client(server, truths, seed, until_s) for seed in range(CLIENTS)))
        rss_growth = psutil.Process().memory_info().rss - rss_before
        watch.cancel()
        slots = await server.slots()
    return Crowd(
        asked=sum(asked, Counter()),
        seconds=seconds,
        budget_bytes=budget,
        sampler=sampler,
        steps=[event for event in events if event.kind == "state"],
        slots=slots,
        rss_growth_bytes=rss_growth,
    )
