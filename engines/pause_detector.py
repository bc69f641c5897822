"""Detects pauses of this process: SIGSTOP, Ctrl-Z, `docker pause`, a blocked event loop."""

import math

MAX_GAP_S = 10.0
"""A longer gap between two calls, which are normally a second apart, counts as a pause."""


class PauseDetector:
    """Measures how long this process has run without a pause.

    Monotonic clocks go on during a pause, and reports from threads and other processes are read only after it. So a
    time-out must not count seconds from before the last pause.
    """

    def __init__(self) -> None:
        self._last_call_s = math.inf
        self._resumed_s = -math.inf

    def seconds_since_pause(self, now_s: float) -> float:
        """Returns the seconds since the last gap between two calls of this method; infinity if there was none."""
        if now_s - self._last_call_s > MAX_GAP_S:
            self._resumed_s = now_s
        self._last_call_s = now_s
        return now_s - self._resumed_s
