"""A clock for tests; `engines.testing.runtime.FakeTime` also has timers, for hosts."""


class FakeClock:
    """A clock that the test advances; calling it returns its seconds."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
