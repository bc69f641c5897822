"""A clock that a test turns by hand, for what needs no event loop."""


class HandClock:
    """Seconds; calling it reads it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
