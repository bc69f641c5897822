"""Outside work for the pool: each effect that takes time, done on a thread or the loop, and reported as an event.

It decides nothing. Whatever is raised becomes a `ErrorRecord`, so that no waiter is ever left without an answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import structlog

from engines.device.memory import DeviceMemory
from engines.errors import (
    BadModel,
    BrokenFiles,
    EngineError,
    FilesChanged,
    OutOfMemory,
    SelfCheckFailed,
    ShuttingDown,
    is_out_of_memory,
)
from engines.hub.local_folder import is_local
from engines.pool.estimates import Estimates, Measurement
from engines.pool.messages import (
    BudgetChanged,
    Discard,
    DownloadCompleted,
    DownloadErrored,
    DownloadProgressed,
    Effect,
    FilesDiscarded,
    FilesFound,
    FilesLocated,
    LoadCompleted,
    LoadErrored,
    PoolEvent,
    SizeEstimated,
    StartFetch,
    StartLoad,
    StartLocate,
    StartUnload,
    StartWarm,
    UnloadCompleted,
    WarmUpCompleted,
    WarmUpErrored,
)
from engines.pool.runtime import Task, Workers
from engines.pool.slot import LoadFailure, MemoryNeed, Slot
from engines.protocols import Engine, Files, Loader
from engines.spec import ModelSpec
from engines.types import Budget, ModelFiles

LOOK_S = 5.0
"""How long a look around is waited for; what has not been seen by then is seen later, or when it is asked for."""


log = structlog.get_logger(__name__)


PROGRESS_S = 0.2
"""Download progress is reported at most this often for each model."""


_SLOWEST_BYTES_PER_S = 20e6


_SLOWER = 10.0
"""A load may read so slowly, and take so many times as long as the last one did."""


class EffectRunner:
    """Everything the pool's machine cannot do itself, on one device. `report` is for progress, from any thread."""

    def __init__(
        self,
        files: Files,
        loader: Loader,
        estimates: Estimates,
        workers: Workers,
        report: Callable[[PoolEvent], None],
        hang_s: float = 600.0,
    ) -> None:
        self.engines: dict[int, Engine] = {}
        self._loads: dict[int, StartLoad] = {}
        self._files = files
        self._loader = loader
        self._estimates = estimates
        self._workers = workers
        self._report = report
        self._hang_s = hang_s
        self._is_closed = False
        self._doers: dict[type, Callable[[Any], Awaitable[PoolEvent]]] = {
            StartLocate: self._locate,
            StartFetch: self._fetch,
            Discard: self._discard,
            StartLoad: self._load,
            StartWarm: self._warm,
            StartUnload: self._unload,
        }

    async def do(self, effect: Effect) -> PoolEvent:
        """How it ended; never raises."""
        return await self._doers[type(effect)](effect)

    async def read(self, memory: DeviceMemory, budget: Budget, last_bytes: int) -> BudgetChanged:
        """A device that cannot be read keeps its last budget."""
        try:
            reading = await self._workers.load(memory.read, Task("reading the memory", self._hang_s))
        except Exception:  # a driver's hiccup must not stop the queue for memory
            log.exception("memory.unreadable")
            return BudgetChanged(last_bytes)
        return BudgetChanged(budget.of(reading.total_bytes), reading.ceiling_bytes)

    async def look_around(self, slot_id: int, spec: ModelSpec) -> FilesFound | None:
        """Is it on disk already? Without the network, and without consequences when it is not."""

        def look() -> FilesFound | None:
            files = self._files.locate(spec)
            need = self._estimates.estimate(spec, files) if files else None
            return FilesFound(slot_id, files, need) if files and need else None

        try:
            return await self._workers.look(look)
        except Exception as error:  # noqa: BLE001  # only a look; a request would tell what is wrong
            log.warning("model.not_located", model=spec.model_id, error=str(error))
            return None

    async def size(self, slot_id: int, spec: ModelSpec) -> SizeEstimated | None:
        """How much will it take? Asks the hub where the files are not here; None when nobody knows."""
        need = await self._ask_size(spec)
        return SizeEstimated(slot_id, need) if need else None

    def close(self) -> None:
        """Running downloads end at their next progress report."""
        self._is_closed = True

    # ---- files ----

    async def _locate(self, effect: StartLocate) -> PoolEvent:
        def locate() -> tuple[ModelFiles | None, MemoryNeed | None]:
            files = self._files.locate(effect.spec)
            return files, self._estimates.estimate(effect.spec, files) if files else None

        try:
            files, need = await self._workers.look(locate)
            if files is None:
                need = await self._ask_size(effect.spec)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return DownloadErrored(effect.slot_id, load_failure_of(error, effect.spec))
        return FilesLocated(effect.slot_id, files, need)

    async def _ask_size(self, spec: ModelSpec) -> MemoryNeed | None:
        """The size of a model whose files are not here."""
        on_thread = self._workers.look if is_local(spec.source) else self._workers.ask
        return await on_thread(partial(self._estimates.estimate, spec, None))

    async def _fetch(self, effect: StartFetch) -> PoolEvent:
        def fetch() -> DownloadCompleted:
            files = self._files.fetch(effect.spec, self._progress(effect.slot_id))
            need = self._estimates.estimate(effect.spec, files)
            assert need is not None, "files that are here have a size"
            return DownloadCompleted(effect.slot_id, files, need)

        on_thread = self._workers.look if is_local(effect.spec.source) else self._workers.fetch
        try:
            return await on_thread(fetch)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return DownloadErrored(effect.slot_id, load_failure_of(error, effect.spec))

    def _progress(self, slot_id: int) -> Callable[[int, int], None]:
        """Throttled here, on the fetching thread, so that a fast download does not flood the loop.

        Called again and again: what was held back is told before a hub's silence, not after it.
        """
        last_s, told = -PROGRESS_S, (0, 0)

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal last_s, told
            if self._is_closed:
                raise ShuttingDown("the host closed during the download")
            now_s = time.monotonic()
            is_news = (done_bytes, total_bytes) != told
            if is_news and (now_s - last_s >= PROGRESS_S or done_bytes >= total_bytes):
                last_s, told = now_s, (done_bytes, total_bytes)
                self._report(DownloadProgressed(slot_id, done_bytes, total_bytes))

        return on_progress

    async def _discard(self, effect: Discard) -> PoolEvent:
        try:
            is_removed = await self._workers.look(partial(self._files.discard, effect.spec, effect.file))
        except Exception:  # what cannot be removed cannot be fetched anew
            log.exception("model.not_discarded", model=effect.spec.model_id)
            is_removed = False
        return FilesDiscarded(effect.slot_id, is_removed)

    async def verify(self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool]) -> LoadFailure | None:
        """What is wrong with the files; None when nothing is, or when `go_on` has said no."""
        return await self._workers.look(partial(self._verified, spec, files, go_on))

    def _verified(
        self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool], *, is_anew: bool = False
    ) -> LoadFailure | None:
        try:
            self._files.verify(spec, files, go_on, is_anew=is_anew)
        except BadModel as error:
            return load_failure_of(error, spec)
        except Exception:  # a disk that cannot be read now
            log.exception("model.not_verified", model=spec.model_id)
        return None

    async def _failure(self, error: Exception, load: StartLoad) -> LoadFailure:
        """Why a load or its check failed. Where the model is no good its files are hashed: damage on the disk is what
        fetching them again can cure, and what a person would look for last."""
        if not isinstance(error, BadModel) or isinstance(error, FilesChanged):
            return load_failure_of(error, load.spec)
        is_anew = isinstance(error, SelfCheckFailed | BrokenFiles)
        verified = partial(self._verified, load.spec, load.files, lambda: not self._is_closed, is_anew=is_anew)
        return await self._workers.look(verified) or load_failure_of(error, load.spec)

    # ---- engines ----

    async def _load(self, effect: StartLoad) -> PoolEvent:
        try:
            task = Task(f"the load of model {effect.spec.model_id!r}", load_limit_s(effect.need, self._hang_s))
            engine = await self._workers.load(partial(self._load_current, effect.spec, effect.files), task)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return LoadErrored(effect.slot_id, await self._failure(error, effect))
        self.engines[effect.slot_id], self._loads[effect.slot_id] = engine, effect
        return LoadCompleted(effect.slot_id)

    def _load_current(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """The engine of files that are the expected ones before and after they are read: an operator may replace a
        local folder at any time, and an engine of half of each would give wrong vectors.

        Raises:
            FilesChanged: they are not.
            BadModel, OutOfMemory: see `Loader.load`.
        """
        self._check_current(spec, files)
        try:
            engine = self._loader.load(spec, files)
        except BadModel:
            self._check_current(spec, files)
            raise
        try:
            self._check_current(spec, files)
        except FilesChanged:
            engine.close()
            raise
        return engine

    def _check_current(self, spec: ModelSpec, files: ModelFiles) -> None:
        if not self._files.is_current(spec, files):
            raise FilesChanged(
                "its files changed while it was loaded; ask again once they are written, or give each version a folder "
                "of its own and name that in 'source'"
            )

    async def _warm(self, effect: StartWarm) -> PoolEvent:
        engine = self.engines[effect.slot_id]
        try:
            await engine.warm_up()
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return WarmUpErrored(effect.slot_id, await self._failure(error, self._loads[effect.slot_id]))
        return WarmUpCompleted(effect.slot_id, engine.weight_bytes, engine.workspace_bytes)

    async def _unload(self, effect: StartUnload) -> PoolEvent:
        """An engine that cannot be closed is given up: its memory is lost, and the next reading will show it."""
        try:
            del self._loads[effect.slot_id]
            close = self.engines.pop(effect.slot_id).close
            await self._workers.load(close, Task("freeing a model", self._hang_s))
        except Exception:  # the slot must not stay unloading for ever
            log.exception("model.not_closed", slot=effect.slot_id)
        return UnloadCompleted(effect.slot_id)

    async def remember(self, spec: ModelSpec, files: ModelFiles, measurement: Measurement) -> None:
        """For the next start."""
        await self._workers.look(partial(self._estimates.remember, spec, files, measurement))


class DiskScanner:
    """Looks on threads, and tells the pool's machine by `step`. `spawn` keeps the tasks until they end."""

    def __init__(
        self,
        work: EffectRunner,
        step: Callable[[PoolEvent], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        self._work = work
        self._step = step
        self._spawn = spawn

    async def look_around(self, slots: Iterable[Slot]) -> None:
        """On disk, without the network, all at once."""
        looks = [self._spawn(self._look(slot)) for slot in slots]
        if looks:
            await asyncio.wait(looks, timeout=LOOK_S)

    async def size(self, slot: Slot) -> None:
        """Where it is not known yet: on disk, else a few kilobytes of the hub's."""
        if slot.need is None:
            await self._look(slot)
        if slot.need is None:
            self._tell(await self._work.size(slot.slot_id, slot.spec))

    async def _look(self, slot: Slot) -> None:
        self._tell(await self._work.look_around(slot.slot_id, slot.spec))

    def _tell(self, event: PoolEvent | None) -> None:
        if event is not None:
            self._step(event)


def load_limit_s(need: MemoryNeed, hang_s: float) -> float:
    """How long a load may take before it counts as hanging: generous, for a slow disk is no reason to give up."""
    return hang_s + need.weight_bytes / _SLOWEST_BYTES_PER_S + _SLOWER * (need.load_s or 0.0)


def load_failure_of(error: Exception, spec: ModelSpec | None) -> LoadFailure:
    """What clients may hear of it; the rest goes to the log."""
    if isinstance(error, BrokenFiles):
        return LoadFailure(kind=error.kind, message=str(error), file=error.file)
    if isinstance(error, BadModel):
        return LoadFailure(kind=error.kind, message=str(error))
    if isinstance(error, OutOfMemory | MemoryError):
        return LoadFailure(kind="out_of_memory", message=str(error) or "the device ran out of memory")
    if is_out_of_memory(error):  # by its words, which may hold what no client should see
        return LoadFailure(kind="out_of_memory", message="the device ran out of memory")
    if isinstance(error, EngineError):
        return LoadFailure(kind="load", message=str(error))
    log.error("model.load_raised", model=spec and spec.model_id, exc_info=error)
    return LoadFailure(kind="load", message=f"{type(error).__name__}; the server's log has the details")
