"""Makes backends for tests: a scripted backend, scripted hosts, and clients that check every answer.

`ScriptedBackend` replaces a whole backend. `open_scripted_host` opens a real host, in any process, with engines that
follow a script; worker processes and Ray's workers import it by name. The script is the `description` of the model:

    ModelSpec(model_id="a", source="a", description="load_s=0.2 embed_s=0.1 bytes=3000 max_items=4")

`load_error`, `embed_error`: the name of an error that loads or calls raise; `hang_s`: for how long loads hang; with
`once=FILE`, only the first of all loads does, and makes the file. A text `die` kills the process, `lose` makes the
device fail for the rest of the process, `wait` waits for half a minute.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from engines import errors
from engines.device.health import DeviceHealth
from engines.errors import DeviceDown, EngineFailed, NonFiniteEmbedding, QueueFull, ShuttingDown
from engines.host import Host, HostConfig, HostRuntime
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoopTime, Threads
from engines.pool.slot import PoolPolicy
from engines.spec import Matryoshka, ModelSpec
from engines.testing.engine import FakeEngine, fake_vector
from engines.testing.fakes import WEIGHT_BYTES, WORKSPACE_BYTES, FakeFiles, FakeMemory
from engines.types import (
    Budget,
    Call,
    ContextualCall,
    EmbedCall,
    Embeddings,
    Event,
    HostBudget,
    HostSnapshot,
    ModelFiles,
    ModelInfo,
    ModelStatus,
    Outputs,
    OutputsCall,
    Plan,
    Result,
    ScoreCall,
    Scores,
    Tier,
    Timings,
    TokenizeCall,
    Tokens,
)
from router.backends.base import Backend
from router.backends.worker_config import CrashNote, WorkerConfig
from router.config.settings import Settings

WIDTH = 8


def vector(item: str | tuple[int, ...], width: int = WIDTH) -> list[float]:
    """Return the scripted backend's vector of a text or of token ids."""
    seed = sum(map(ord, item)) if isinstance(item, str) else sum(item)
    raw = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return [float(component) for component in raw / np.linalg.norm(raw)]


class ScriptedBackend:
    """A scripted backend. `failures`: raised by commands on a model. `gates`, `delays_s`: waited for before answers."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.failures: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.delays_s: dict[str, float] = {}
        self.running: Counter[str] = Counter()
        self.truncated: tuple[int, ...] = ()
        self.num_labels = 1
        self.calls: list[EmbedCall] = []
        self.contextual_calls: list[ContextualCall] = []
        self.score_calls: list[ScoreCall] = []
        self.tokenize_calls: list[TokenizeCall] = []
        self.outputs_calls: list[OutputsCall] = []
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

    async def run(self, call: Call) -> Result:
        if isinstance(call, ScoreCall):
            return await self._score(call)
        if isinstance(call, TokenizeCall):
            self.tokenize_calls.append(call)
            await self._run_script(call.model_id)
            places = [(7, 0, len(text)) for text in call.texts]
            return Tokens(places=np.array(places, "<i4").tobytes(), token_counts=(1,) * call.num_items)
        if isinstance(call, OutputsCall):
            return await self._outputs(call)
        if isinstance(call, ContextualCall):
            self.contextual_calls.append(call)
        else:
            self.calls.append(call)
        await self._run_script(call.model_id)
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

    async def _outputs(self, call: OutputsCall) -> Outputs:
        """Vectors as of the other calls; `index + 1` entries `0, 1, …` of weight 0.5; and as many vectors `[1, 0]`."""
        self.outputs_calls.append(call)
        await self._run_script(call.model_id)
        items = call.texts or call.token_ids
        width = (call.dimensions or WIDTH) if "dense" in call.outputs else 0
        dense = [vector(item, width) for item in items] if width else []
        counts = tuple(range(1, len(items) + 1))
        has_terms, has_vectors = "sparse" in call.outputs, bool({"multi_vector", "tokens"} & {*call.outputs})
        entries = [entry for count in counts for entry in range(count)] if has_terms else []
        parts = (
            np.array(dense, "<f4"),
            np.array(entries, "<i4"),
            np.full(len(entries), 0.5, "<f4"),
            np.tile(np.array([1, 0], "<f4"), sum(counts) if has_vectors else 0),
        )
        return Outputs(
            body=b"".join(part.tobytes() for part in parts),
            dimensions=width,
            num_terms=counts if has_terms else (),
            num_vectors=counts if has_vectors else (),
            vector_width=2 if has_vectors else 0,
            term_names={entry: f"term {entry}" for entry in sorted({*entries})} if call.names_terms else {},
            token_counts=tuple(len(item) for item in items),
            truncated=self.truncated,
        )

    async def _score(self, call: ScoreCall) -> Scores:
        """Scores are `1 / (1 + index)`; with several labels the others have 0.25."""
        self.score_calls.append(call)
        await self._run_script(call.model_id)
        values = np.full((call.num_items, self.num_labels), 0.25, "<f4")
        values[:, 0] = 1 / np.arange(1, call.num_items + 1)
        return Scores(
            values=values.tobytes(),
            num_labels=self.num_labels,
            token_counts=tuple(len(text) for text in call.texts),
            truncated=self.truncated,
            timings=Timings(load_s=0.5, tokenize_s=0.0012, queue_s=0.0, forward_s=0.0305),
        )

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        self.commands.append(("preload", model_id, pin, wait, *([host_id] if host_id else [])))
        await self._run_script(model_id)
        return self._status(model_id) if wait else ModelStatus(
            model_id=model_id, state="loading", host_id="cpu", device="cpu", source="s"
        )  # fmt: skip

    async def evict(
        self, model_id: str, *, force: bool = False, timeout_s: float = 30.0, to: Tier = "disk"
    ) -> tuple[ModelStatus, ...]:
        self.commands.append(("evict", model_id, force, timeout_s, *([to] if to != "disk" else [])))
        await self._run_script(model_id)
        return ()

    async def recycle(self, host_id: str) -> None:
        self.commands.append(("recycle", host_id))
        await self._run_script(host_id)

    async def plan(self, model_id: str) -> Plan:
        return Plan(model_id=model_id, host_id="cpu", state="cold", fits=True, need_bytes=10, free_bytes=20)

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        self.commands.append(("reload", *specs, *(each for each in (budget, host_budget) if each is not None)))

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
        """Close as a host does: waiting calls fail with the reason."""
        for model_id, gate in self.gates.items():
            self.failures[model_id] = ShuttingDown("the server is shutting down")
            gate.set()
        self.is_closed = True

    async def _run_script(self, model_id: str) -> None:
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


def worker_configs() -> list[WorkerConfig]:
    return [
        WorkerConfig(
            host_id=f"cpu:{index}",
            device="cpu",
            cores=1,
            specs={},
            budget=BUDGET,
            settings=Settings(),
            open=open_scripted_host,
        )
        for index in range(HOSTS)
    ]


BUDGET_BYTES = 4500
"""Four models of a thousand bytes, and the workspace of one."""

BUDGET = Budget(size_bytes=BUDGET_BYTES)
HOSTS = 3
RULES = PoolPolicy(min_residency_s=0.1, residency_loads=0.0, overdue_after_s=0.1, retry_s=(1.0, 2.0))


def script_of(spec: ModelSpec) -> dict[str, str]:
    """Return the script's settings by name."""
    return dict(word.split("=", 1) for word in spec.description.split() if "=" in word)


def scripted(model_id: str, **script: object) -> ModelSpec:
    """Make a spec of script settings and `ModelSpec` fields. Each script is a source, as sizes are stored by source."""
    fields = {name: value for name, value in script.items() if name in ModelSpec.__struct_fields__}
    words = " ".join(f"{name}={value}" for name, value in script.items() if name not in fields)
    return ModelSpec(**{"model_id": model_id, "source": f"fake/{model_id} {words}", "description": words, **fields})  # type: ignore[arg-type]  # a test's own fields


class ScriptedFiles(FakeFiles):
    """Files that are there at once, with the script's size."""

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        return int(script_of(spec).get("bytes", WEIGHT_BYTES))


class ScriptedDevice:
    """The device of a scripted host; `loss` as in `DeviceHealth`."""

    def __init__(self, note: CrashNote) -> None:
        self.note = note
        self.loss = ""

    def health(self) -> DeviceHealth:
        return DeviceHealth(loss=self.loss)

    def lose(self, model_id: str) -> None:
        self.loss = "device-side assert"
        self.note(model_id)


class ScriptedEngine(FakeEngine):
    """A fake engine that waits, refuses, fails, or kills its process, as scripted."""

    def __init__(self, spec: ModelSpec, device: ScriptedDevice) -> None:
        self._script = script_of(spec)
        super().__init__(spec, embed_s=float(self._script.get("embed_s", 0.0)))
        self.weight_bytes = int(self._script.get("bytes", WEIGHT_BYTES))
        self.workspace_bytes = WORKSPACE_BYTES
        self._max_items = int(self._script.get("max_items", 1_000_000))
        self._device = device

    async def run(self, call: Call) -> Result:
        if "lose" in call.texts:
            self._device.lose(self.spec.model_id)
        if self._device.loss:
            raise DeviceDown("the device failed during the forward pass (device-side assert); send the request again")
        if self.running >= self._max_items:
            raise QueueFull(f"{self.running} texts wait for this model", retry_after_s=0.5)
        if "die" in call.texts:
            self._device.note(self.spec.model_id if "noted" in self._script else "")
            os.kill(os.getpid(), signal.SIGKILL)
        raise_scripted(self._script.get("embed_error"))
        if "wait" in call.texts:
            self.running += 1
            try:
                await asyncio.sleep(30)
            finally:
                self.running -= 1
        return await super().run(call)


class ScriptedLoader:
    """Loads scripted engines."""

    def __init__(self, device: ScriptedDevice) -> None:
        self._device = device

    def load(self, spec: ModelSpec, files: ModelFiles) -> ScriptedEngine:
        script = script_of(spec)
        if "dies_loading" in script:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(script.get("load_s", 0.0)))
        once = Path(script["once"]) if "once" in script else None
        if once is None or not once.exists():
            if once is not None:
                once.touch()
            time.sleep(float(script.get("hang_s", 0.0)))
            raise_scripted(script.get("load_error"))
        return ScriptedEngine(spec, self._device)


def raise_scripted(name: str | None) -> None:
    """Raise the named error, with all its attributes."""
    if name is None:
        return
    if name == "NonFiniteEmbedding":
        raise NonFiniteEmbedding("vector 3 is not finite", index=3)
    if name == "ValueError":
        raise ValueError("an unexpected error")
    cls = getattr(errors, name, EngineFailed)
    raise cls(f"scripted {name}")


def open_scripted_host(worker: WorkerConfig, note: CrashNote) -> Host:
    """Open a scripted host (`WorkerConfig.open`)."""
    config = HostConfig(
        host_id=worker.host_id,
        device=worker.device,
        budget=worker.budget,
        workspace_bytes=WORKSPACE_BYTES,
        rules=RULES,
        watchdog_s=worker.settings.watchdog_seconds,
    )
    device = ScriptedDevice(note)
    runtime = HostRuntime(
        time=LoopTime(),
        workers=Threads(worker.host_id),
        memory=FakeMemory(10**9),
        measurements=Measurements(),
        jitter=lambda: 0.5,
        health=device.health,
    )
    return Host(config, worker.specs, ScriptedFiles(), ScriptedLoader(device), runtime)


def open_slow_host(worker: WorkerConfig, note: CrashNote) -> Host:
    """Open a scripted host after half a second."""
    time.sleep(0.5)
    return open_scripted_host(worker, note)


def open_broken_host(worker: WorkerConfig, note: CrashNote) -> Host:
    """Fail to open a host."""
    raise errors.InvalidValue(f"{worker.host_id} does not exist")


CLIENTS = 64


class Crowd:
    """Clients that send requests and check every answer; `wrong` has what was not right."""

    def __init__(self, backend: Backend, models: Sequence[str]) -> None:
        self._backend = backend
        self._models = models
        self._is_over = False
        self.answered: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def ask(self, number: int) -> None:
        """Run one client; an error instead of vectors counts as wrong, too."""
        turn = 0
        while not self._is_over:
            model, text, turn = self._models[(number + turn) % len(self._models)], f"{number} {turn}", turn + 1
            try:
                answer = await self._backend.run(EmbedCall(model_id=model, texts=(text,), load_timeout_s=60.0))
            except Exception as error:  # noqa: BLE001  # any error is a wrong answer
                self.wrong.append(f"{model}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.01)
                continue
            if not (answer.array()[0] == fake_vector(model, text)).all():
                self.wrong.append(f"{model}: not the vector of {text!r}")
            self.answered[model] += 1

    async def until(self, more: int) -> None:
        """Wait for `more` answers of each model."""
        wanted = {model: self.answered[model] + more for model in self._models}
        async with asyncio.timeout(90):
            while any(self.answered[model] < count for model, count in wanted.items()):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Stop after the requests in flight."""
        self._is_over = True


@asynccontextmanager
async def crowd(backend: Backend, *models: str) -> AsyncIterator[Crowd]:
    """Run the clients until the block ends."""
    made = Crowd(backend, models)
    tasks = [asyncio.create_task(made.ask(number)) for number in range(CLIENTS)]
    try:
        yield made
    finally:
        made.stop()
        await asyncio.gather(*tasks)


async def until(
    backend: Backend, is_so: Callable[[tuple[HostSnapshot, ...]], bool], within_s: float = 30.0
) -> tuple[HostSnapshot, ...]:
    """Return the snapshots as soon as the condition is true; hosts in other processes report within a second."""
    async with asyncio.timeout(within_s):
        while not is_so(hosts := backend.snapshots()):  # noqa: ASYNC110 - snapshots come from elsewhere, without an event
            await asyncio.sleep(0.02)
    return hosts
