"""Tasks that run as long as the server does: devices are looked at, events counted, the event loop timed."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import structlog

from router.backends.base import Backend
from router.observability import metrics
from router.observability.recorder import EventMetrics, MetricsRecorder

log = structlog.get_logger()

CHECK_EVERY_S = 1.0
LAG_EVERY_S = 0.25


@asynccontextmanager
async def watching(backend: Backend, meters: MetricsRecorder) -> AsyncIterator[None]:
    """The tasks run inside the block. Enter it before the backend starts, so that no event is missed."""
    works = [EventMetrics(meters).follow(backend.events()), check_devices(backend), time_the_loop(meters)]
    tasks = [asyncio.create_task(_logged(work)) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def check_devices(backend: Backend, every_s: float = CHECK_EVERY_S) -> None:
    """Whoever waits on a device that is down is told within a second."""
    while True:
        backend.check()
        await asyncio.sleep(every_s)


async def time_the_loop(meters: MetricsRecorder, every_s: float = LAG_EVERY_S) -> None:
    """How late the loop is: whatever blocks it delays every request alike."""
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(every_s)
        late_s = time.perf_counter() - began_s - every_s
        meters.observe(metrics.LOOP_LAG_SECONDS, value=max(0.0, late_s))


async def _logged(work: Coroutine[None, None, None]) -> None:
    """A task that nobody awaits would fail in silence."""
    try:
        await work
    except Exception:
        log.exception("watch.ended")
