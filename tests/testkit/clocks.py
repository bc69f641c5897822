"""The clock of tests; `engines.testing.runtime.FakeTime` is the one that also has timers, for hosts."""


class FakeClock:
    """Seconds that pass when the test says so; calling it reads it."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
