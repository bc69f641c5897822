"""A backend that does what a test tells it to: vectors from the text's characters, failures and waits by model id."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping

import numpy as np

from engines.errors import ShuttingDown
from engines.spec import Matryoshka, ModelSpec
from engines.types import Budget, EmbedCall, Embeddings, Event, HostSnapshot, ModelInfo, ModelStatus, Plan, Timings

WIDTH = 8


def vector(item: str | tuple[int, ...], width: int = WIDTH) -> list[float]:
    """What the scripted backend answers for a text or for token ids."""
    seed = sum(map(ord, item)) if isinstance(item, str) else sum(item)
    raw = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return [float(component) for component in raw / np.linalg.norm(raw)]


class ScriptedBackend:
    """`failures`: raised by any command on that model. `gates` and `delays_s`: waited for before it answers."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.failures: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.delays_s: dict[str, float] = {}
        self.running: Counter[str] = Counter()
        self.truncated: tuple[int, ...] = ()
        self.calls: list[EmbedCall] = []
        self.commands: list[tuple[object, ...]] = []
        self.cancelled: list[str] = []
        self.remembered: list[Event] = []
        self.asked_after: Mapping[str, int] | None = None
        self.faults: dict[str, str] = {}
        self.is_draining = False
        self.is_started = False
        self.is_closed = False
        self._subscribers: list[asyncio.Queue[Event]] = []

    async def start(self) -> None:
        self.is_started = True

    async def embed(self, call: EmbedCall) -> Embeddings:
        self.calls.append(call)
        await self._obey(call.model_id)
        items = call.texts or call.token_ids
        width = call.dimensions or WIDTH
        matrix = np.array([vector(item, width) for item in items], dtype="<f4")
        return Embeddings(
            vectors=matrix.tobytes(),
            dimensions=width,
            token_counts=tuple(len(item) for item in items),
            truncated=self.truncated,
            timings=Timings(load_s=0.5, tokenize_s=0.0012, queue_s=0.0, forward_s=0.0305),
        )

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        self.commands.append(("preload", model_id, pin, wait, *([host_id] if host_id else [])))
        await self._obey(model_id)
        return self._status(model_id) if wait else ModelStatus(
            model_id=model_id, state="loading", host_id="cpu", device="cpu", source="s"
        )  # fmt: skip

    async def evict(self, model_id: str, *, force: bool = False, timeout_s: float = 30.0) -> tuple[ModelStatus, ...]:
        self.commands.append(("evict", model_id, force, timeout_s))
        await self._obey(model_id)
        return ()

    async def recycle(self, host_id: str) -> None:
        self.commands.append(("recycle", host_id))
        await self._obey(host_id)

    async def plan(self, model_id: str) -> Plan:
        return Plan(model_id=model_id, host_id="cpu", state="cold", fits=True, need_bytes=10, free_bytes=20)

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None = None) -> None:
        self.commands.append(("reload", *specs, *([budget] if budget else [])))

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        models = tuple(self._status(model_id) for model_id in self.models)
        return (
            HostSnapshot(
                host_id="cpu", device="cpu", total_bytes=1000, budget_bytes=800, used_bytes=300, workspace_bytes=100,
                free_bytes=400, residents=self.models, models=models, is_draining=self.is_draining,
            ),
        )  # fmt: skip

    def check(self) -> Mapping[str, str]:
        return self.faults

    async def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        self.asked_after = after
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._subscribers.append(queue)
        try:
            for event in self.remembered:
                yield event
            while True:
                yield await queue.get()
        finally:
            self._subscribers.remove(queue)

    @property
    def num_subscribers(self) -> int:
        return len(self._subscribers)

    def publish(self, event: Event) -> None:
        for queue in self._subscribers:
            queue.put_nowait(event)

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """As a host does: what still waits is told why."""
        for model_id, gate in self.gates.items():
            self.failures[model_id] = ShuttingDown("the server is shutting down")
            gate.set()
        self.is_closed = True

    async def _obey(self, model_id: str) -> None:
        self.running[model_id] += 1
        try:
            await asyncio.sleep(self.delays_s.get(model_id, 0.0))
            if gate := self.gates.get(model_id):
                await gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(model_id)
            raise
        finally:
            self.running[model_id] -= 1
        if failure := self.failures.get(model_id):
            raise failure

    def _status(self, model_id: str) -> ModelStatus:
        info = ModelInfo(
            dimensions=WIDTH, max_tokens=512, dtype="float32", attention="packed", prompts={"query": "q: "},
            matryoshka=Matryoshka(widths=(4,)),
        )  # fmt: skip
        return ModelStatus(
            model_id=model_id, state="ready", host_id="cpu", device="cpu", source="/secret/place/" + model_id,
            revision="f" * 40, info=info, weight_bytes=200, workspace_bytes=100, loads=1, load_s=2.5,
            leases=self.running[model_id],
        )  # fmt: skip
