"""Gives threads of low priority cores of their own, by Linux's scheduling policies and CPU affinity."""

import os
from collections.abc import Callable, Collection

_WINDOW_S = 0.5
"""Seconds of a thread's work, on the clock, after which it is decided whether it stays on its core."""

_LEAST_SHARE = 0.6
"""The part of that time in which a pinned thread must have had its core."""

_FREE_S = 5.0
"""Seconds after which a thread that has left its core returns to it."""


def leave_cores_to_others() -> None:
    """Makes the operating system run this thread on cores that no other thread wants; does nothing where it cannot."""
    if hasattr(os, "SCHED_IDLE"):
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return


def usable_cores() -> list[int]:
    """Returns the cores that this thread may run on, empty where the operating system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def keep_to(cores: Collection[int]) -> None:
    """Makes the operating system run this thread on these cores only; does nothing where it cannot."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            return


class CorePin:
    """Keeps one of several SCHED_IDLE threads on a core of its own, as long as nothing else takes that core.

    Without it Linux puts two such threads on one core when other threads use the second, and leaves them there for some
    milliseconds: the one that holds the interpreter's lock then waits for the other, and all threads of the server for
    the lock (decision 031). A core that another process keeps busy is left for `_FREE_S`.

    Args:
        place: of the thread among its kind.
        cores: that it may run on.
        keep_to: sets the cores of the calling thread.
    """

    def __init__(
        self, place: int, cores: Collection[int], keep_to: Callable[[Collection[int]], None] = keep_to
    ) -> None:
        self._all = sorted(cores)
        self._own = self._all[place % len(self._all) :][:1] if self._all else []
        self._keep_to = keep_to
        self._wall_s = self._core_s = 0.0
        self._free_until_s: float | None = None
        self._set(self._own)

    def on_work(self, wall_s: float, core_s: float, now_s: float) -> None:
        """Counts work that took `wall_s` on the clock and `core_s` of a core. Called on the thread itself."""
        if self._free_until_s is not None:
            if now_s >= self._free_until_s:
                self._free_until_s = None
                self._set(self._own)
            return
        self._wall_s, self._core_s = self._wall_s + wall_s, self._core_s + core_s
        if self._wall_s < _WINDOW_S:
            return
        if self._core_s < _LEAST_SHARE * self._wall_s:
            self._free_until_s = now_s + _FREE_S
            self._set(self._all)
        self._wall_s = self._core_s = 0.0

    def _set(self, cores: Collection[int]) -> None:
        if len(self._all) > 1:
            self._keep_to(cores)
