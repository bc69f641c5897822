"""Executes the pool's slow effects on threads or the event loop, and returns their results as events.

Makes no decisions. Every exception becomes a `LoadFailure`, so that no waiter is left without an outcome.
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
from engines.hub.local_folder import is_on_disk
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
    ParkCompleted,
    ParkErrored,
    PoolEvent,
    SizeEstimated,
    StartFetch,
    StartLoad,
    StartLocate,
    StartPark,
    StartUnload,
    StartWake,
    StartWarm,
    UnloadCompleted,
    WakeCompleted,
    WakeErrored,
    WarmUpCompleted,
    WarmUpErrored,
)
from engines.pool.runtime import LoaderTask, Workers
from engines.pool.slot import LoadFailure, MemoryNeed, Slot
from engines.pool.split_effects import PartsReader, load_engine, placement_of
from engines.protocols import Engine, Files, Loader, Placement
from engines.spec import ModelSpec
from engines.types import Budget, ModelFiles

SCAN_S = 5.0
"""How long `DiskScanner.scan` waits; slower searches go on in the background."""

log = structlog.get_logger(__name__)

PROGRESS_S = 0.2
"""Minimum interval between two progress reports of one download."""

_SLOWEST_BYTES_PER_S = 20e6

_LOAD_TIME_FACTOR = 10.0
"""A load hangs if it reads more slowly than that, and takes more than so many times as long as the last one."""


class EffectRunner:
    """Executes effects for one device and holds its engines. `report` passes download progress on, from any thread."""

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
        self._parts = PartsReader(loader, workers, hang_s)
        self._report = report
        self._hang_s = hang_s
        self._is_closed = False
        self._runners: dict[type, Callable[[Any], Awaitable[PoolEvent]]] = {
            StartLocate: self._locate,
            StartFetch: self._fetch,
            Discard: self._discard,
            StartLoad: self._load,
            StartWarm: self._warm,
            StartUnload: self._unload,
            StartPark: self._park,
            StartWake: self._wake,
        }

    async def run(self, effect: Effect) -> PoolEvent:
        """Executes the effect and returns its result as an event; never raises."""
        return await self._runners[type(effect)](effect)

    async def read(self, memory: DeviceMemory, budget: Budget, last_bytes: int) -> BudgetChanged:
        """Reads the device and returns its budget, the last one if the reading fails."""
        try:
            reading = await self._workers.load(memory.read, LoaderTask("reading the memory", self._hang_s))
        except Exception:  # a driver error must not stop the queue for memory
            log.exception("memory.unreadable")
            return BudgetChanged(last_bytes)
        return BudgetChanged(budget.of(reading.total_bytes), reading.ceiling_bytes)

    async def find_on_disk(self, slot_id: int, spec: ModelSpec) -> FilesFound | None:
        """Finds the model's files on disk without the network; None if they are not there or cannot be read."""

        def find() -> FilesFound | None:
            files = self._files.locate(spec)
            need = self._estimates.estimate(spec, files) if files else None
            return FilesFound(slot_id, files, need) if files and need else None

        try:
            found = await self._workers.read_disk(find)
            if found is None:
                return None
            return FilesFound(slot_id, found.files, await self._parts.add(spec, found.files, found.need))
        except Exception as error:  # noqa: BLE001  # only a look; a request would tell what is wrong
            log.warning("model.not_located", model=spec.model_id, error=str(error))
            return None

    async def estimate_size(self, slot_id: int, spec: ModelSpec) -> SizeEstimated | None:
        """Estimates the memory that the model needs, from the hub if the files are not on disk; None if unknown."""
        need = await self._estimate_undownloaded(spec)
        return SizeEstimated(slot_id, need) if need else None

    def close(self) -> None:
        """Makes running downloads end at their next progress report."""
        self._is_closed = True

    # ---- files ----

    async def _locate(self, effect: StartLocate) -> PoolEvent:
        def locate() -> tuple[ModelFiles | None, MemoryNeed | None]:
            files = self._files.locate(effect.spec)
            return files, self._estimates.estimate(effect.spec, files) if files else None

        try:
            files, need = await self._workers.read_disk(locate)
            if files is None:
                need = await self._estimate_undownloaded(effect.spec)
            elif need is not None:
                need = await self._parts.add(effect.spec, files, need)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return DownloadErrored(effect.slot_id, load_failure_of(error, effect.spec))
        return FilesLocated(effect.slot_id, files, need)

    async def _estimate_undownloaded(self, spec: ModelSpec) -> MemoryNeed | None:
        """Estimates the size of a model whose files are not on disk."""
        on_thread = self._workers.read_disk if is_on_disk(spec) else self._workers.query_hub
        return await on_thread(partial(self._estimates.estimate, spec, None))

    async def _fetch(self, effect: StartFetch) -> PoolEvent:
        def fetch() -> DownloadCompleted:
            files = self._files.fetch(effect.spec, self._progress(effect.slot_id))
            need = self._estimates.estimate(effect.spec, files)
            assert need is not None, "files on disk have a size"
            return DownloadCompleted(effect.slot_id, files, need)

        on_thread = self._workers.read_disk if is_on_disk(effect.spec) else self._workers.fetch
        try:
            fetched = await on_thread(fetch)
            need = await self._parts.add(effect.spec, fetched.files, fetched.need)
            return DownloadCompleted(effect.slot_id, fetched.files, need)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return DownloadErrored(effect.slot_id, load_failure_of(error, effect.spec))

    def _progress(self, slot_id: int) -> Callable[[int, int], None]:
        """Returns a progress callback that throttles on the downloading thread, so that fast downloads do not flood the
        loop.

        `Files.fetch` calls it repeatedly, so figures held back are reported even when the hub stalls.
        """
        last_s, reported = -PROGRESS_S, (0, 0)

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            nonlocal last_s, reported
            if self._is_closed:
                raise ShuttingDown("the host closed during the download")
            now_s = time.monotonic()
            is_new = (done_bytes, total_bytes) != reported
            if is_new and (now_s - last_s >= PROGRESS_S or done_bytes >= total_bytes):
                last_s, reported = now_s, (done_bytes, total_bytes)
                self._report(DownloadProgressed(slot_id, done_bytes, total_bytes))

        return on_progress

    async def _discard(self, effect: Discard) -> PoolEvent:
        try:
            is_removed = await self._workers.read_disk(partial(self._files.discard, effect.spec, effect.file))
        except Exception:  # a file that cannot be deleted cannot be downloaded again
            log.exception("model.not_discarded", model=effect.spec.model_id)
            is_removed = False
        return FilesDiscarded(effect.slot_id, is_removed)

    async def verify(self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool]) -> LoadFailure | None:
        """Hashes the files; returns the damage found, None if there is none or `go_on` returned False."""
        return await self._workers.read_disk(partial(self._verify_files, spec, files, go_on))

    def _verify_files(
        self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool], *, is_anew: bool = False
    ) -> LoadFailure | None:
        try:
            self._files.verify(spec, files, go_on, is_anew=is_anew)
        except BadModel as error:
            return load_failure_of(error, spec)
        except Exception:  # the disk cannot be read at the moment
            log.exception("model.not_verified", model=spec.model_id)
        return None

    async def _diagnose(self, error: Exception, load: StartLoad) -> LoadFailure:
        """Returns the cause of a failed load or warm-up.

        After a `BadModel` the files are hashed: a new download repairs damage on the disk, which a person would suspect
        last.
        """
        if not isinstance(error, BadModel) or isinstance(error, FilesChanged):
            return load_failure_of(error, load.spec)
        is_anew = isinstance(error, SelfCheckFailed | BrokenFiles)
        verified = partial(self._verify_files, load.spec, load.files, lambda: not self._is_closed, is_anew=is_anew)
        return await self._workers.read_disk(verified) or load_failure_of(error, load.spec)

    # ---- engines ----

    async def _load(self, effect: StartLoad) -> PoolEvent:
        try:
            task = LoaderTask(f"the load of model {effect.spec.model_id!r}", load_limit_s(effect.need, self._hang_s))
            load = partial(self._load_unchanged, effect.spec, effect.files, placement_of(effect))
            engine = await self._workers.load(load, task)
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return LoadErrored(effect.slot_id, await self._diagnose(error, effect))
        self.engines[effect.slot_id], self._loads[effect.slot_id] = engine, effect
        return LoadCompleted(effect.slot_id)

    def _load_unchanged(self, spec: ModelSpec, files: ModelFiles, placement: Placement | None = None) -> Engine:
        """Loads the engine; checks before and after that the files are the expected ones.

        An operator may replace a local folder at any time, and an engine built from old and new files would compute
        wrong vectors.

        Raises:
            FilesChanged: the files have changed.
            BadModel, OutOfMemory: see `Loader.load`.
        """
        self._check_unchanged(spec, files)
        try:
            engine = load_engine(self._loader, spec, files, placement)
        except BadModel:
            self._check_unchanged(spec, files)
            raise
        try:
            self._check_unchanged(spec, files)
        except FilesChanged:
            engine.close()
            raise
        return engine

    def _check_unchanged(self, spec: ModelSpec, files: ModelFiles) -> None:
        if not self._files.is_current(spec, files):
            raise FilesChanged(
                "the files changed during the load; retry once they are written, or put each version in its own folder "
                "and set 'source' to it"
            )

    async def _warm(self, effect: StartWarm) -> PoolEvent:
        engine = self.engines[effect.slot_id]
        try:
            await engine.warm_up()
        except Exception as error:  # noqa: BLE001  # becomes the waiters' answer
            return WarmUpErrored(effect.slot_id, await self._diagnose(error, self._loads[effect.slot_id]))
        shares = engine.info.share_bytes if self._loads[effect.slot_id].split is not None else ()
        return WarmUpCompleted(effect.slot_id, engine.weight_bytes, engine.workspace_bytes, shares)

    async def _unload(self, effect: StartUnload) -> PoolEvent:
        """Closes the engine. If that fails, its memory is lost, which the next reading of the device shows."""
        try:
            del self._loads[effect.slot_id]
            close = self.engines.pop(effect.slot_id).close
            await self._workers.load(close, LoaderTask("freeing a model", self._hang_s))
        except Exception:  # the slot must not stay in `unloading` forever
            log.exception("model.not_closed", slot=effect.slot_id)
        return UnloadCompleted(effect.slot_id)

    async def _park(self, effect: StartPark) -> PoolEvent:
        engine, spec = self.engines[effect.slot_id], self._loads[effect.slot_id].spec
        try:
            task = LoaderTask(f"parking model {spec.model_id!r}", self._hang_s)
            host_bytes = await self._workers.load(engine.park, task)
        except Exception as error:  # noqa: BLE001  # the model is unloaded instead
            log.warning("model.not_parked", model=spec.model_id, error=str(error))
            return ParkErrored(effect.slot_id, load_failure_of(error, spec))
        return ParkCompleted(effect.slot_id, host_bytes)

    async def _wake(self, effect: StartWake) -> PoolEvent:
        engine, spec = self.engines[effect.slot_id], self._loads[effect.slot_id].spec
        try:
            await self._workers.load(engine.wake, LoaderTask(f"waking model {spec.model_id!r}", self._hang_s))
            await engine.resume()
        except Exception as error:  # noqa: BLE001  # the model is loaded from its files instead
            log.warning("model.not_woken", model=spec.model_id, error=str(error))
            return WakeErrored(effect.slot_id, load_failure_of(error, spec))
        return WakeCompleted(effect.slot_id)

    async def save_measurement(self, spec: ModelSpec, files: ModelFiles, measurement: Measurement) -> None:
        """Saves the measurement for later estimates."""
        await self._workers.read_disk(partial(self._estimates.save, spec, files, measurement))


class DiskScanner:
    """Finds files and sizes of models that no request needs yet; passes results to `step`. `spawn` holds the tasks."""

    def __init__(
        self,
        runner: EffectRunner,
        step: Callable[[PoolEvent], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        self._runner = runner
        self._step = step
        self._spawn = spawn

    async def scan(self, slots: Iterable[Slot]) -> None:
        """Searches the disk for all slots concurrently, without the network; returns after `SCAN_S` at the latest."""
        searches = [self._spawn(self._search(slot)) for slot in slots]
        if searches:
            await asyncio.wait(searches, timeout=SCAN_S)

    async def estimate_size(self, slot: Slot) -> None:
        """Estimates an unknown size: from the disk, else from a few kilobytes read from the hub."""
        if slot.need is None:
            await self._search(slot)
        if slot.need is None:
            self._step_if_found(await self._runner.estimate_size(slot.slot_id, slot.spec))

    async def _search(self, slot: Slot) -> None:
        self._step_if_found(await self._runner.find_on_disk(slot.slot_id, slot.spec))

    def _step_if_found(self, event: PoolEvent | None) -> None:
        if event is not None:
            self._step(event)


def load_limit_s(need: MemoryNeed, hang_s: float) -> float:
    """Returns how long a load may take before it counts as hanging; generous, as slow disks are legitimate."""
    return hang_s + need.weight_bytes / _SLOWEST_BYTES_PER_S + _LOAD_TIME_FACTOR * (need.load_s or 0.0)


def load_failure_of(error: Exception, spec: ModelSpec | None) -> LoadFailure:
    """Converts an exception to a failure that is safe to show to clients; logs details that are not."""
    if isinstance(error, BrokenFiles):
        return LoadFailure(kind=error.kind, message=str(error), file=error.file)
    if isinstance(error, BadModel):
        return LoadFailure(kind=error.kind, message=str(error))
    if isinstance(error, OutOfMemory | MemoryError):
        return LoadFailure(kind="out_of_memory", message=str(error) or "the device ran out of memory")
    if is_out_of_memory(error):  # recognized by its message, which may hold details that no client may see
        return LoadFailure(kind="out_of_memory", message="the device ran out of memory")
    if isinstance(error, EngineError):
        return LoadFailure(kind="load", message=str(error))
    log.error("model.load_raised", model=spec and spec.model_id, exc_info=error)
    return LoadFailure(kind="load", message=f"{type(error).__name__}; the server's log has the details")
