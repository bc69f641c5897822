"""SIGHUP, which means two things: read the registry again, as for every daemon; or, its terminal was closed, then end.

Knows neither registries nor servers. Does nothing where the signal does not exist (Windows).
"""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any


class Hangups:
    """Made on the main thread before anything slow begins: until `follow`, the signal is swallowed and not deadly.

    A process that was told to ignore hang-ups (`nohup`) outlives its terminal, and still reloads.
    """

    def __init__(self) -> None:
        self._number = getattr(signal, "SIGHUP", None)
        self._task: asyncio.Task[None] | None = None
        if self._number is not None:
            is_ignored = signal.getsignal(self._number) is signal.SIG_IGN
            self._ends_with_terminal = not is_ignored and _has_terminal()
            signal.signal(self._number, lambda *_: None)

    def follow(self, reload: Callable[[], Coroutine[Any, Any, None]], end: Callable[[], None]) -> None:
        """Call one of the two at each signal, from now on, on the running loop."""

        def on_signal() -> None:
            if self._ends_with_terminal and not _has_terminal():
                end()
            else:
                self._task = asyncio.create_task(reload())

        if self._number is not None:
            asyncio.get_running_loop().add_signal_handler(self._number, on_signal)


def _has_terminal() -> bool:
    """Whether the process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
