"""A host that does what the registry tells it to, in whatever process it lives: the script stands in `description`.

    ModelSpec(model_id="a", source="a", description="load_s=0.2 embed_s=0.1 bytes=3000 max_items=4")

`load_error`, `embed_error`: the name of an error that loads or calls raise; `hang_s`: for how long loads hang; with
`once=FILE`, only the first of all loads does, and makes the file. A text `die` kills the process, `wait` waits for half
a minute. Importable by worker processes and by Ray's workers.
"""

import asyncio
import os
import signal
import time
from pathlib import Path

from msgspec import structs

from engines import errors
from engines.errors import EngineFailed, NonFiniteEmbedding, QueueFull
from engines.host import Host, HostConfig, HostRuntime
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoopTime, Threads
from engines.pool.slot import PoolPolicy
from engines.spec import ModelSpec
from engines.testing.engine import FakeEngine
from engines.testing.fakes import WEIGHT_BYTES, WORKSPACE_BYTES, FakeFiles, FakeMemory
from engines.types import Budget, EmbedCall, Embeddings, ModelFiles
from router.backends.worker_config import CrashNote, WorkerConfig
from router.config.settings import Settings


def births() -> list[WorkerConfig]:
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


RULES = PoolPolicy(min_residency_s=0.1, residency_loads=0.0, patience_s=0.1, retry_s=(1.0, 2.0))


def script_of(spec: ModelSpec) -> dict[str, str]:
    """The script's words."""
    return dict(word.split("=", 1) for word in spec.description.split() if "=" in word)


def scripted(model_id: str, **script: object) -> ModelSpec:
    """A spec with its script; fields of `ModelSpec` go there. Sizes are remembered, so each script is a source."""
    fields = {name: value for name, value in script.items() if name in ModelSpec.__struct_fields__}
    words = " ".join(f"{name}={value}" for name, value in script.items() if name not in fields)
    return ModelSpec(**{"model_id": model_id, "source": f"fake/{model_id} {words}", "description": words, **fields})  # type: ignore[arg-type]  # a test's own fields


class ScriptedFiles(FakeFiles):
    """There at once, as large as the script says."""

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        return int(script_of(spec).get("bytes", WEIGHT_BYTES))


class ScriptedEngine(FakeEngine):
    """A fake engine that waits, refuses, fails and dies."""

    def __init__(self, spec: ModelSpec, note: CrashNote) -> None:
        self._script = script_of(spec)
        super().__init__(spec, embed_s=float(self._script.get("embed_s", 0.0)))
        self.weight_bytes = int(self._script.get("bytes", WEIGHT_BYTES))
        self.workspace_bytes = WORKSPACE_BYTES
        self._max_items = int(self._script.get("max_items", 1_000_000))
        self._note = note

    async def embed(self, call: EmbedCall) -> Embeddings:
        if self.running >= self._max_items:
            raise QueueFull(f"{self.running} texts wait for this model", retry_after_s=0.5)
        if "die" in call.texts:
            self._note(self.spec.model_id if "noted" in self._script else "")
            os.kill(os.getpid(), signal.SIGKILL)
        raise_scripted(self._script.get("embed_error"))
        if "wait" in call.texts:
            self.running += 1
            try:
                await asyncio.sleep(30)
            finally:
                self.running -= 1
        return await super().embed(call)


class ScriptedLoader:
    """Engines as their specs say."""

    def __init__(self, note: CrashNote) -> None:
        self._note = note

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
        return ScriptedEngine(spec, self._note)


def raise_scripted(name: str | None) -> None:
    """The named error, with all that it can carry."""
    if name is None:
        return
    if name == "NonFiniteEmbedding":
        raise NonFiniteEmbedding("vector 3 is not finite", index=3)
    if name == "ValueError":
        raise ValueError("nobody foresaw this")
    cls = getattr(errors, name, EngineFailed)
    raise cls(f"scripted {name}")


def open_scripted_host(birth: WorkerConfig, note: CrashNote) -> Host:
    """See `WorkerConfig.open`."""
    config = HostConfig(
        host_id=birth.host_id,
        device=birth.device,
        budget=birth.budget,
        workspace_bytes=WORKSPACE_BYTES,
        rules=RULES,
        watchdog_s=birth.settings.watchdog_seconds,
    )
    world = HostRuntime(
        time=LoopTime(),
        workers=Threads(birth.host_id),
        memory=FakeMemory(10**9),
        measurements=Measurements(),
        jitter=lambda: 0.5,
    )
    return Host(config, birth.specs, ScriptedFiles(), ScriptedLoader(note), world)


def open_slow_host(birth: WorkerConfig, note: CrashNote) -> Host:
    """A host that takes a while to be made."""
    time.sleep(0.5)
    return open_scripted_host(birth, note)


def open_broken_host(birth: WorkerConfig, note: CrashNote) -> Host:
    """A host that cannot be made."""
    raise errors.InvalidValue(f"{birth.host_id} is not here")


def with_open(birth: WorkerConfig) -> WorkerConfig:
    """The same birth of a scripted host."""
    return structs.replace(birth, open=open_scripted_host)
