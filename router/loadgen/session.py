"""One run of `embedyard bench`: one phase after the other, watched."""

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from msgspec import Struct

from router.loadgen.http_client import Request, Target
from router.loadgen.phases import Phase, send
from router.loadgen.report import Measured, summed_up
from router.loadgen.results import Figures, Tally


class Job(Struct, frozen=True):
    """What to send where, and for how long each."""

    target: Target
    requests: Sequence[Request]
    phases: Sequence[Phase]
    seconds: float


class Screen(Protocol):
    """Where a run is watched. Called on the loop that sends: it must be quick."""

    every_s: float

    def begin(self, phase: Phase) -> None: ...

    def update(self, figures: Figures) -> None: ...

    def end(self, measured: Measured) -> None: ...


async def measure(job: Job, screen: Screen) -> tuple[list[Measured], bool]:
    """All phases, and whether they are whole.

    Ctrl+C ends the one that runs and leaves the others out; what is under way is still waited for.
    """
    found: list[Measured] = []
    with _interruptible() as stopping:
        for phase in job.phases:
            measured = await _phase(job, phase, screen, stopping)
            found.append(measured)
            if stopping.is_set():
                break
    return found, not stopping.is_set()


@contextmanager
def _interruptible() -> Iterator[asyncio.Event]:
    """Set by the first Ctrl+C; the second waits for nothing."""
    stopping, loop, before = asyncio.Event(), asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)

    def restore() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)

    def stop() -> None:
        stopping.set()
        restore()

    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except NotImplementedError:  # Windows: there the first one already ends it all
        yield stopping
        return
    try:
        yield stopping
    finally:
        restore()


async def _phase(job: Job, phase: Phase, screen: Screen, stopping: asyncio.Event) -> Measured:
    screen.begin(phase)
    tally = Tally(time.perf_counter())
    showing = asyncio.create_task(_show(tally, screen))
    try:
        outcome = await send(
            job.target,
            job.requests,
            phase,
            until=lambda _sent, gone_s: gone_s >= job.seconds or stopping.is_set(),
            watch=tally.add,
        )
    finally:
        showing.cancel()
    measured = summed_up(phase, outcome, tally)
    screen.end(measured)
    return measured


async def _show(tally: Tally, screen: Screen) -> None:
    while True:
        await asyncio.sleep(screen.every_s)
        screen.update(tally.figures(time.perf_counter()))
