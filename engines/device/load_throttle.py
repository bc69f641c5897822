"""A load stands back while somebody is served: between two of its parts it waits for the turns that run.

Building a model is Python, and beside it every step of a forward pass waits for the interpreter's lock
(`benchmarks/load_latency.py` measures it). Between two modules that it makes, and two tensors that it puts in place,
the load looks whether a short turn runs, and lets it end first. That can cost it `_CREDIT_S`, and beyond it as much
time again as it works itself: under load that never ends a model still comes.
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
_LOOK_S = 0.001
"""Looking takes a lock, and a thousand parts come in a second."""

_here = threading.local()


class LoadThrottle:
    """The breaks of one load.

    Args:
        let_pass: waits until nobody is served, but no longer than so many seconds.
        clock: seconds.
    """

    def __init__(self, let_pass: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._let_pass = let_pass
        self._clock = clock
        self._since_s = clock()
        self._left_s = _CREDIT_S

    def pause_if_busy(self) -> None:
        """Between two parts: wait, if somebody is served."""
        now_s = self._clock()
        worked_s = now_s - self._since_s
        if worked_s < _LOOK_S:
            return
        self._left_s += worked_s
        self._let_pass(self._left_s)
        self._since_s = self._clock()
        self._left_s -= self._since_s - now_s


@contextmanager
def throttled_load(breaks: LoadThrottle) -> Iterator[None]:
    """Inside, a part ends with every module and every tensor that this thread puts into a module."""
    hooks = [
        register_module_module_registration_hook(lambda *_: throttle_point()),
        register_module_parameter_registration_hook(lambda *_: throttle_point()),
    ]
    _here.breaks = breaks
    try:
        yield
    finally:
        _here.breaks = None
        for hook in hooks:
            hook.remove()


def throttle_point() -> None:
    """The load that this thread carries out has done a part; without one, nothing happens."""
    breaks: LoadThrottle | None = getattr(_here, "breaks", None)
    if breaks is not None:
        breaks.pause_if_busy()
