"""Detects that this process stood still: SIGSTOP, Ctrl-Z, `docker pause`, a blocked event loop."""

import math

MAX_GAP_S = 10.0
"""Between two looks, which are a second apart as a rule."""


class PauseDetector:
    """How long this process has run without standing still: SIGSTOP, Ctrl-Z, `docker pause`, a blocked event loop.

    Clocks go on meanwhile, and what others did or said is not known before the next look. So nothing may be judged by
    seconds from before the last gap.
    """

    def __init__(self) -> None:
        self._looked_s = math.inf
        self._since_s = -math.inf

    def seconds_since_pause(self, now_s: float) -> float:
        """Seconds since the last gap between two looks; infinity when there was none."""
        if now_s - self._looked_s > MAX_GAP_S:
            self._since_s = now_s
        self._looked_s = now_s
        return now_s - self._since_s
