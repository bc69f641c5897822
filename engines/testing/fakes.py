"""Fake engines, files and hosts without torch, for tests of the layers above them. One line each:

    FakeFiles(), FakeLoader(), FakeEngine(spec), fake_host("some-model", "another")

Bytes, delays and failures are scripted by model and attempt. `fake_vector` computes the expected vectors.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from engines.errors import BrokenFiles
from engines.host import Host, HostConfig, HostRuntime
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoopTime
from engines.protocols import Files, Loader, ModelParts, Placement, Progress
from engines.spec import ModelSpec, Output
from engines.testing.engine import WEIGHT_BYTES, WIDTH, WORKSPACE_BYTES, Attempts, FakeEngine, Script, fake_vector
from engines.testing.runtime import FakeMemory, FakeTime, InlineWorkers
from engines.types import Budget, ModelFiles, fingerprint

__all__ = [
    "WEIGHT_BYTES",
    "WIDTH",
    "WORKSPACE_BYTES",
    "FakeEngine",
    "FakeFiles",
    "FakeLoader",
    "FakeMemory",
    "FakeTime",
    "InlineWorkers",
    "Script",
    "fake_host",
    "fake_runtime",
    "fake_specs",
    "fake_vector",
]  # fmt: skip


def fake_specs(*model_ids: str) -> dict[str, ModelSpec]:
    """Builds specs with default values."""
    return {model_id: ModelSpec(model_id=model_id, source=f"fake/{model_id}") for model_id in model_ids}


def fake_runtime(total_bytes: int = 10**9, time: FakeTime | None = None) -> HostRuntime:
    """Builds a runtime without threads, with a device of `total_bytes`; `time` replaces the event loop's clock."""
    return HostRuntime(
        time=time or LoopTime(),
        workers=InlineWorkers(),
        memory=FakeMemory(total_bytes),
        measurements=Measurements(),
        jitter=lambda: 0.5,
    )


def fake_host(
    *models: str | ModelSpec,
    budget_bytes: int = 10**6,
    host_budget_bytes: int = 0,
    files: Files | None = None,
    loader: Loader | None = None,
    runtime: HostRuntime | None = None,
    host_id: str = "fake",
) -> Host:
    """Builds a host of fakes; `await host.start()` before use."""
    config = HostConfig(
        host_id=host_id,
        budget=Budget(size_bytes=budget_bytes),
        host_budget_bytes=host_budget_bytes,
        workspace_bytes=WORKSPACE_BYTES,
    )
    specs: dict[str, ModelSpec] = {}
    for model in models:
        specs.update(fake_specs(model) if isinstance(model, str) else {model.model_id: model})
    return Host(config, specs, files or FakeFiles(), loader or FakeLoader(), runtime or fake_runtime())


class FakeFiles:
    """Fakes model files that are on disk, or are once fetched.

    Args:
        on_disk: models whose files are on disk; None: all of them.
        weight_bytes: sizes by model (default `WEIGHT_BYTES`); None if unknown.
        failures: the errors of fetches.
        pause: called with the model id on the thread of each fetch; it may block or sleep.
    """

    def __init__(
        self,
        *,
        on_disk: Sequence[str] | None = None,
        weight_bytes: Mapping[str, int | None] | None = None,
        failures: Script | None = None,
        pause: Callable[[str], None] = lambda model_id: None,
    ) -> None:
        self._missing = on_disk is not None
        self.on_disk = set(on_disk or ())
        self._weight_bytes = weight_bytes or {}
        self._fetches = Attempts(failures)
        self._pause = pause
        self.discarded: list[tuple[str, str | None]] = []
        self.damaged: set[str] = set()
        self.verified: list[str] = []

    @property
    def fetches(self) -> Counter[str]:
        """The number of fetches by model."""
        return self._fetches.counts

    def locate(self, spec: ModelSpec) -> ModelFiles | None:
        return None if self._missing and spec.model_id not in self.on_disk else self._files(spec)

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        size_bytes = self._files(spec).size_bytes
        on_progress(0, size_bytes)
        self._pause(spec.model_id)
        self._fetches.next(spec.model_id)
        on_progress(size_bytes, size_bytes)
        self.on_disk.add(spec.model_id)
        return self._files(spec)

    def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        return files == self._files(spec)

    def verify(self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool], *, is_anew: bool = False) -> None:
        self.verified.append(spec.model_id)
        if spec.model_id in self.damaged:
            raise BrokenFiles("weights are damaged", file="weights")

    def discard(self, spec: ModelSpec, file: str | None) -> bool:
        self.discarded.append((spec.model_id, file))
        self.damaged.discard(spec.model_id)
        self.on_disk.discard(spec.model_id)
        return True

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        return self._weight_bytes.get(spec.model_id, WEIGHT_BYTES)

    def _files(self, spec: ModelSpec) -> ModelFiles:
        revision = fingerprint((spec.source, spec.revision))
        return ModelFiles(path=f"/fake/{spec.model_id}", revision=revision, size_bytes=WEIGHT_BYTES)


class FakeLoader:
    """Builds fake engines.

    Args:
        weight_bytes, workspace_bytes: the measured bytes of engines, by model.
        failures, warm_failures, embed_failures: the errors of loads, warm-ups and calls.
        park_failures, wake_failures: the errors of parking and of waking, by load.
        embed_s, sleep: how long calls take; setting them later affects engines loaded afterwards.
        pause: called with the model id on the loader's thread; it may block or sleep.
        outputs: of engines, by model; `dense` where nothing is stated.
        parts: the bytes of the parts of models that can be split.
    """

    def __init__(  # noqa: PLR0913  # a script: every argument is optional and named
        self,
        *,
        weight_bytes: Mapping[str, int] | None = None,
        workspace_bytes: Mapping[str, int] | None = None,
        failures: Script | None = None,
        warm_failures: Script | None = None,
        park_failures: Script | None = None,
        wake_failures: Script | None = None,
        embed_failures: Script | None = None,
        embed_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        pause: Callable[[str], None] = lambda model_id: None,
        outputs: Mapping[str, tuple[Output, ...]] | None = None,
        parts: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._parts = parts or {}
        self.placements: dict[str, Placement] = {}
        self._outputs = outputs or {}
        self._weight_bytes = weight_bytes or {}
        self._workspace_bytes = workspace_bytes or {}
        self._loads = Attempts(failures)
        self._warm_failures = warm_failures or {}
        self._park_failures, self._wake_failures = park_failures or {}, wake_failures or {}
        self._embed_failures = embed_failures or {}
        self.embed_s = embed_s
        self.sleep = sleep
        self._pause = pause
        self.engines: list[FakeEngine] = []
        self.violations: list[str] = []
        self._lock = threading.Lock()

    @property
    def loads(self) -> Counter[str]:
        """The number of loads by model."""
        return self._loads.counts

    @property
    def resident_bytes(self) -> int:
        """The weights of all engines that are not closed, in whichever memory."""
        return sum(engine.weight_bytes for engine in list(self.engines) if not engine.is_closed)

    def parts(self, spec: ModelSpec, files: ModelFiles) -> ModelParts | None:
        sizes = self._parts.get(spec.model_id)
        return ModelParts(parts=sizes, workspace_bytes=WORKSPACE_BYTES) if sizes else None

    def load_split(self, spec: ModelSpec, files: ModelFiles, placement: Placement) -> FakeEngine:
        self.placements[spec.model_id] = placement
        return self.load(spec, files)

    def load(self, spec: ModelSpec, files: ModelFiles) -> FakeEngine:
        if not self._lock.acquire(blocking=False):
            self.violations.append("two loads at once")
            self._lock.acquire()
        try:
            self._pause(spec.model_id)
            attempt = self.loads[spec.model_id]
            self._loads.next(spec.model_id)
            return self._engine(spec, attempt)
        finally:
            self._lock.release()

    def _engine(self, spec: ModelSpec, attempt: int) -> FakeEngine:
        def of(script: Script) -> Exception | None:
            errors = script.get(spec.model_id, ())
            return errors[attempt] if attempt < len(errors) else None

        engine = FakeEngine(
            spec,
            embed_s=self.embed_s,
            sleep=self.sleep,
            failures=self._embed_failures.get(spec.model_id, ()),
            warm_failure=of(self._warm_failures),
            park_failure=of(self._park_failures),
            wake_failure=of(self._wake_failures),
            violations=self.violations,
            outputs=self._outputs.get(spec.model_id, ("dense",)),
        )
        engine.weight_bytes = self._weight_bytes.get(spec.model_id, WEIGHT_BYTES)
        engine.workspace_bytes = self._workspace_bytes.get(spec.model_id, WORKSPACE_BYTES)
        self.engines.append(engine)
        return engine
