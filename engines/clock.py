"""Time as an argument: what the pool's shell asks of a clock, so that tests can turn it by hand."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A callback that has not run yet."""

    def cancel(self) -> None:
        """Forget it; no effect once it ran."""


class Time(Protocol):
    """Monotonic seconds, callbacks at a moment, and the wall clock."""

    def now_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` on the event loop at `at_s` of this clock, or soon when that is past."""

    def unix_s(self) -> float:
        """Seconds since 1970, for people and event streams."""


class LoopTime:
    """The running event loop's own clock."""

    def now_s(self) -> float:
        return (
            time.monotonic()
        )  # what asyncio's loops count in; uvloop's own time is cached, and too coarse for timings

    def call_at(self, at_s: float, callback: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(max(0.0, at_s - self.now_s()), callback)

    def unix_s(self) -> float:
        return time.time()
