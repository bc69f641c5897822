"""Slows a load down while requests are served: between two of its steps it waits for the short tasks that run.

Building a model is Python, and while it runs every step of a forward pass waits for the interpreter's lock
(`benchmarks/lifecycle/load_latency.py` measures it). Between two modules that it makes, and two tensors that it puts in
place, the load checks whether a short task runs, and lets it end first. That can cost the load `_CREDIT_S`, and beyond
it as much time again as it works itself: a model still loads under traffic that never ends.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

_CREDIT_S = 0.5
_CHECK_INTERVAL_S = 0.001
"""Least time between two checks: a check takes a lock, and a load makes a thousand steps in a second."""

_local = threading.local()


class LoadThrottle:
    """Pauses one load while short tasks run, within its credit.

    Args:
        wait_for_short_tasks: blocks while a short task runs, but no longer than the given seconds; returns whether none
            runs any more.
        clock: seconds.
    """

    def __init__(
        self, wait_for_short_tasks: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wait_for_short_tasks = wait_for_short_tasks
        self._clock = clock
        self._resumed_at_s = clock()
        self._credit_s = _CREDIT_S

    def pause_if_busy(self) -> None:
        """Waits while a short task runs. Called between two steps of the load."""
        now_s = self._clock()
        worked_s = now_s - self._resumed_at_s
        if worked_s < _CHECK_INTERVAL_S:
            return
        self._credit_s += worked_s
        self._wait_for_short_tasks(self._credit_s)
        self._resumed_at_s = self._clock()
        self._credit_s -= self._resumed_at_s - now_s

    @property
    def is_serving(self) -> bool:
        """Tells whether a short task runs now."""
        return not self._wait_for_short_tasks(0.0)


@contextmanager
def throttled_load(throttle: LoadThrottle) -> Iterator[None]:
    """Makes each module and each tensor that this thread puts into a module, inside the block, a throttle point."""
    hooks = [
        register_module_module_registration_hook(lambda *_: throttle_point()),
        register_module_parameter_registration_hook(lambda *_: throttle_point()),
    ]
    _local.throttle = throttle
    try:
        yield
    finally:
        _local.throttle = None
        for hook in hooks:
            hook.remove()


def throttle_point() -> None:
    """Pauses the load of this thread if a short task runs; does nothing on a thread that loads nothing."""
    throttle: LoadThrottle | None = getattr(_local, "throttle", None)
    if throttle is not None:
        throttle.pause_if_busy()


def is_serving() -> bool:
    """Tells whether a short task runs beside the load of this thread; False on a thread that loads nothing."""
    throttle: LoadThrottle | None = getattr(_local, "throttle", None)
    return throttle is not None and throttle.is_serving
