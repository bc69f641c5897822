"""Background tasks of the server: device checks, event metrics, event loop lag."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import structlog

from router.backends.base import Backend
from router.observability import metrics
from router.observability.recorder import EventMetrics, MetricsRecorder

log = structlog.get_logger()

CHECK_INTERVAL_S = 1.0
LAG_INTERVAL_S = 0.25


@asynccontextmanager
async def background_tasks(backend: Backend, recorder: MetricsRecorder) -> AsyncIterator[None]:
    """Run the tasks inside the block. Enter it before the backend starts, so that no event is missed."""
    coroutines = [EventMetrics(recorder).follow(backend.events()), check_devices(backend), measure_loop_lag(recorder)]
    tasks = [asyncio.create_task(_logged(coroutine)) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def check_devices(backend: Backend, every_s: float = CHECK_INTERVAL_S) -> None:
    """Check the devices every second: requests that wait for a device that is down fail then."""
    while True:
        backend.check()
        await asyncio.sleep(every_s)


async def measure_loop_lag(recorder: MetricsRecorder, every_s: float = LAG_INTERVAL_S) -> None:
    """Measure the event loop's lag: what blocks the loop delays every request."""
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(every_s)
        late_s = time.perf_counter() - began_s - every_s
        recorder.observe(metrics.LOOP_LAG_SECONDS, value=max(0.0, late_s))


async def _logged(coroutine: Coroutine[None, None, None]) -> None:
    """Log the exception of a task that is not awaited."""
    try:
        await coroutine
    except Exception:
        log.exception("watch.ended")
