"""Gives threads of low priority cores of their own, and says on which core other threads wake, by Linux's scheduling
policies and CPU affinity."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from engines.affinity import usable_cores

_WINDOW_S = 0.5
"""Seconds of a thread's work, on the clock, after which it is decided whether it stays on its core."""

_LEAST_SHARE = 0.6
"""The part of that time in which a pinned thread must have had its core."""

_FREE_S = 5.0
"""Seconds after which a thread that has left its core returns to it."""

_SHARED_WINDOW_S = 0.05
"""Seconds of passes on several cores, on the clock, after which it is decided whether others follow."""

_LEAST_SHARED = 0.65
"""The part of that time in which the thread of a pass must have had its core."""

_ALONE_S = 2.0
"""Seconds of passes on fewer cores until all are tried again: that costs a fortieth of the time."""


def leave_cores_to_others() -> None:
    """Makes the operating system run this thread on cores that no other thread wants; does nothing where it cannot."""
    if hasattr(os, "SCHED_IDLE"):
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return


def keep_to(cores: Collection[int]) -> None:
    """Makes the operating system run this thread on these cores only; does nothing where it cannot."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            return


def keep_thread_to(thread_id: int, cores: Collection[int]) -> None:
    """Makes the operating system run a thread of this process on these cores only; does nothing where it cannot.

    Args:
        thread_id: `threading.get_native_id` of a thread that has not ended, or 0 for this one.
    """
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(thread_id, cores)
        except OSError:
            return


def cores_of_thread(thread_id: int) -> frozenset[int]:
    """Returns the cores that a thread of this process, or with 0 this one, may run on; none where it cannot be read."""
    try:
        return frozenset(os.sched_getaffinity(thread_id))
    except (AttributeError, OSError):  # not on every system; a thread that has ended
        return frozenset()


def current_core() -> Callable[[], int] | None:
    """Returns a function that names the core on which the calling thread runs; None where the system does not say."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    found = getattr(ctypes.PyDLL(None), "sched_getcpu", None)  # `PyDLL` keeps the interpreter's lock: it takes 0.2 µs
    return None if found is None or found() < 0 else found


class WakingCores:
    """Decides on which core threads wake while each other core has a device thread that computes.

    Linux wakes a thread where it ran last or beside the thread that wakes it. When both cores compute it often chooses
    the core of a batch that goes on, which has to stop, although the thread that wakes it is about to wait and leaves
    its own core idle; and threads that ran lately are not moved until the next tick (4 ms). With 8 clients on two cores
    a core was idle for 37 % of the time while a thread waited for the other one; with the cores named here 8 %, which
    gave 1.28 times as many texts a second, with 32 clients 1.12 times.

    A thread is bound to a core only while it waits or is being woken; while it runs it may be moved as before. Threads
    whose cores something else has set meanwhile, such as `taskset`, keep those; device threads then follow the event
    loop. Reading a thread's cores takes 0.4 µs, and is not done while a device thread is idle.

    Args:
        cores: that all threads may run on.
        current: names the core of the calling thread.
        keep_to: sets the cores of a thread.
        cores_of: reads the cores of a thread.
    """

    def __init__(
        self,
        cores: Collection[int],
        current: Callable[[], int],
        keep_to: Callable[[int, Collection[int]], None] = keep_thread_to,
        cores_of: Callable[[int], frozenset[int]] = cores_of_thread,
    ) -> None:
        self._all = frozenset(cores)
        self._current = current
        self._keep_to = keep_to
        self._cores_of = cores_of
        self._waiting = threading.local()
        self._lock = threading.Lock()
        self._num_waking = self._woken = 0
        self._woken_on: frozenset[int] = frozenset()

    def stay(self) -> None:
        """Makes the calling thread wake on the core that it is on, until `roam`."""
        own, core, cores = self._waiting, self._current(), self._cores_of(0)
        own.bound = None
        if cores not in (getattr(own, "given", self._all), self._all):
            return  # something else has set them
        if core in self._all and len(self._all) > 1:
            own.bound = frozenset((core,))
            self._keep_to(0, own.bound)
        elif cores != self._all:
            self._release()

    def roam(self) -> None:
        """Lets the calling thread run on any core again."""
        if self._waiting.bound is not None and self._cores_of(0) == self._waiting.bound:
            with self._lock:
                self._follow(self._woken)
            self._release()

    @contextmanager
    def waking_here(self, thread_id: int) -> Iterator[None]:
        """Makes a thread that is woken inside the block wake on the core of the calling thread, which waits next."""
        core, own = self._current(), self._cores_of(0)
        with self._lock:
            self._woken = thread_id
            self._follow(thread_id)
            self._num_waking += 1
            if core in self._all and len(self._all) > 1:
                self._woken_on = frozenset((core,))
                self._keep_to(thread_id, self._woken_on)
        try:
            yield
        finally:
            with self._lock:
                self._num_waking -= 1
                is_ours = self._cores_of(thread_id) in (self._woken_on, self._all) and self._cores_of(0) == own
                if self._woken_on and is_ours:  # else something has set them, perhaps those that it was bound to
                    self._keep_to(thread_id, self._all)
                self._woken_on = self._woken_on if self._num_waking else frozenset()

    def _follow(self, thread_id: int) -> None:
        """Takes over the cores of the thread that is woken; not while it is bound."""
        if thread_id and not self._num_waking:
            self._all = self._cores_of(thread_id) or self._all

    def _release(self) -> None:
        self._waiting.given = self._all
        self._keep_to(0, self._all)


def waking_cores(num_threads: int) -> WakingCores | None:
    """Returns the cores on which `num_threads` device threads and the event loop wake.

    None where cores are to spare, which Linux finds itself, where there is one core, and where the system cannot tell.
    """
    cores, current = usable_cores(), current_core()
    return None if current is None or len(cores) < 2 or len(cores) != num_threads else WakingCores(cores, current)


class IdleCores:
    """Decides how many cores of idle device threads a pass uses.

    Other processes may use these. Threads that share a product have equal parts of it, so that all of them wait for the
    one whose core is taken. Beside a process that kept one of two cores busy, the thread of a pass had its own core for
    0.51 to 0.56 of the time, and else for 0.99 (medians of 40 texts of 12 and 120 tokens, bfloat16).

    Args:
        clock: seconds.
        core_clock: seconds of a core that the calling thread has had.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, core_clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._core_clock = clock, core_clock
        self._wall_s = self._core_s = 0.0
        self._taken_until_s = float("-inf")

    def limit(self, num_cores: int) -> int:
        """Returns how many of so many cores, with its own, a pass uses: all, or half of them where some are taken."""
        return num_cores if self._clock() >= self._taken_until_s else max(1, num_cores // 2)

    def start(self) -> tuple[float, float]:
        """Returns what `end` takes; called on the thread of a pass on several cores."""
        return self._clock(), self._core_clock()

    def end(self, started: tuple[float, float]) -> None:
        """Counts the pass, on the same thread."""
        now_s, core_s = self.start()
        self._wall_s, self._core_s = self._wall_s + now_s - started[0], self._core_s + core_s - started[1]
        if self._wall_s < _SHARED_WINDOW_S:
            return
        if self._core_s < _LEAST_SHARED * self._wall_s:
            self._taken_until_s = now_s + _ALONE_S
        self._wall_s = self._core_s = 0.0


class CorePin:
    """Keeps one of several SCHED_IDLE threads on a core of its own, as long as nothing else takes that core.

    Without it Linux puts two such threads on one core when other threads use the second, and leaves them there for some
    milliseconds: the one that holds the interpreter's lock then waits for the other, and all threads of the server for
    the lock (decision 031). A core that another process keeps busy is left for `_FREE_S`.

    Args:
        place: of the thread among its kind.
        cores: that it may run on.
        keep_to: sets the cores of the calling thread.
        cores_of: reads those of a thread; where something else has set them, such as `taskset`, they stay.
    """

    def __init__(
        self,
        place: int,
        cores: Collection[int],
        keep_to: Callable[[Collection[int]], None] = keep_to,
        cores_of: Callable[[int], frozenset[int]] = cores_of_thread,
    ) -> None:
        self._all = sorted(cores)
        self._given = frozenset(cores)
        self._cores_of = cores_of
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
        if len(self._all) > 1 and self._cores_of(0) == self._given:
            self._given = frozenset(cores)
            self._keep_to(cores)
