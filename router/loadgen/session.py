"""Runs the phases of `embedyard bench` one after the other, with progress and Ctrl+C."""

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from msgspec import Struct

from router.loadgen.http_client import Request, Target
from router.loadgen.phases import Phase, send
from router.loadgen.report import Measured, summarize
from router.loadgen.results import Figures, PhaseStats


class Job(Struct, frozen=True):
    """Target, requests, phases, and seconds per phase."""

    target: Target
    requests: Sequence[Request]
    phases: Sequence[Phase]
    seconds: float


class Progress(Protocol):
    """Shows progress. Called on the sending event loop, so it must be quick."""

    every_s: float

    def begin(self, phase: Phase) -> None: ...

    def update(self, figures: Figures) -> None: ...

    def end(self, measured: Measured) -> None: ...


async def measure(job: Job, progress: Progress) -> tuple[list[Measured], bool]:
    """Run all phases; returns their results and whether all ran to the end.

    Ctrl+C ends the current phase and skips the others; requests in flight are awaited.
    """
    found: list[Measured] = []
    with _interruptible() as stopping:
        for phase in job.phases:
            measured = await _run_phase(job, phase, progress, stopping)
            found.append(measured)
            if stopping.is_set():
                break
    return found, not stopping.is_set()


@contextmanager
def _interruptible() -> Iterator[asyncio.Event]:
    """Yield an event that the first Ctrl+C sets; the second one interrupts at once."""
    stopping, loop, before = asyncio.Event(), asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)

    def restore() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)

    def stop() -> None:
        stopping.set()
        restore()

    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except NotImplementedError:  # Windows: there the first one interrupts at once
        yield stopping
        return
    try:
        yield stopping
    finally:
        restore()


async def _run_phase(job: Job, phase: Phase, progress: Progress, stopping: asyncio.Event) -> Measured:
    progress.begin(phase)
    stats = PhaseStats(time.perf_counter())
    updating = asyncio.create_task(_update_progress(stats, progress))
    try:
        outcome = await send(
            job.target,
            job.requests,
            phase,
            until=lambda _sent, elapsed_s: elapsed_s >= job.seconds or stopping.is_set(),
            watch=stats.add,
        )
    finally:
        updating.cancel()
    measured = summarize(phase, outcome, stats)
    progress.end(measured)
    return measured


async def _update_progress(stats: PhaseStats, progress: Progress) -> None:
    while True:
        await asyncio.sleep(progress.every_s)
        progress.update(stats.figures(time.perf_counter()))
