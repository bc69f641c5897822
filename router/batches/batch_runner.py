"""`BatchRunner`: claims unfinished batches, runs a few of them at once, and removes what has expired."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from router.batches.batch_run import BatchRun
from router.batches.folder import DataFolder
from router.batches.parts import RunParts
from router.batches.store import BatchStore

log = structlog.get_logger()
Value = TypeVar("Value")

MAX_RUNNING = 4
"""Batches that one server runs at once."""
CLAIM_EVERY_S = 2.0
CLEAN_EVERY_S = 600.0
_LEFTOVER_S = 86400.0
"""What an upload or a lease left behind is deleted after this time, longer than any request takes."""


class BatchRunner:
    """Runs batches until it is stopped.

    Args:
        store: of files and batches.
        parts: of each run.

    Attributes:
        counts: batches by status, a few seconds old.
    """

    def __init__(self, store: BatchStore, parts: RunParts) -> None:
        self._store = store
        self._parts = parts
        self._runs: dict[asyncio.Task[None], BatchRun] = {}
        self._woken = asyncio.Event()
        self._is_stopping = False
        self._next_clean_s = 0.0
        self.counts: Mapping[str, int] = {}

    @property
    def num_running(self) -> int:
        """How many batches run here now."""
        return len(self._runs)

    def wake(self, batch_id: str = "") -> None:
        """Look for batches now, and at the status of this one."""
        self._woken.set()
        for run in self._runs.values():
            if run.batch.id == batch_id:
                run.nudge()

    async def run(self) -> None:
        """Claim batches and run them, until it is cancelled. Errors of the database or the disk are logged."""
        while not self._is_stopping:
            self._woken.clear()
            try:
                await self._claim()
                await self._clean()
            except (SQLAlchemyError, OSError) as error:
                log.warning("batches.unavailable", reason=type(error).__name__)
            try:
                async with asyncio.timeout(CLAIM_EVERY_S):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def stop(self, grace_s: float) -> None:
        """Stop all runs: they journal what is done and give their leases back."""
        self._is_stopping = True
        self._woken.set()
        for run in self._runs.values():
            run.stop()
        if self._runs:
            _, late = await asyncio.wait(tuple(self._runs), timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _claim(self) -> None:
        while len(self._runs) < MAX_RUNNING and not self._is_stopping:
            owners = Counter(run.batch.owner for run in self._runs.values())
            batch = await self._io(self._parts.leases.claim, owners)
            if batch is None:
                break
            run = BatchRun(self._parts, batch)
            log.info("batch.began", batch=batch.id, epoch=batch.epoch, done=batch.completed + batch.failed)
            task = asyncio.create_task(run.run())
            self._runs[task] = run
            task.add_done_callback(self._end)
            if self._is_stopping:
                run.stop()
        self.counts = await self._io(self._store.count_by_status)

    def _end(self, task: asyncio.Task[None]) -> None:
        run = self._runs.pop(task)
        self._woken.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("batch.crashed", batch=run.batch.id, exc_info=task.exception())

    async def _clean(self) -> None:
        now_s = self._parts.leases.now()
        if now_s >= self._next_clean_s:
            self._next_clean_s = now_s + CLEAN_EVERY_S
            await self._io(clean, self._store, self._parts.folder, now_s, self._parts.policy.retention_s)

    async def _io(self, function: Callable[..., Value], *args: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._parts.executor, function, *args)


def clean(store: BatchStore, folder: DataFolder, now_s: float, retention_s: float) -> None:
    """Delete expired files, batches that ended long ago, and what interrupted uploads and leases left behind."""
    while expired := store.drop_expired():
        folder.delete_files(expired)
    store.drop_old_batches(now_s - retention_s)
    folder.delete_leftovers(store.unfinished_ids(), now_s - _LEFTOVER_S)
    for ids in folder.old_file_ids(now_s - _LEFTOVER_S):
        folder.delete_files(ids - store.known_files(ids))
