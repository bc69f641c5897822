"""Task sources and a fake clock for the device scheduler."""

import threading
from collections.abc import Callable

from engines.device.scheduler import DeviceScheduler, Task


class ScriptedSource:
    """A source with a fixed number of turns; each turn runs `work`. `small` are turns that pass long ones."""

    def __init__(
        self, turns: int, work: Callable[[], None], *, max_turns: int = 1, is_long: bool = False, is_wide: bool = False
    ) -> None:
        self.left = turns
        self.work = work
        self.max_concurrent_tasks = max_turns
        self.small: list[Callable[[], None]] = []
        self.free: list[int] = []
        self._is_long, self._is_wide = is_long, is_wide

    def ready_in_s(self) -> float | None:
        return 0.0 if self.left else None

    def next_task(self, num_free: int) -> Task | None:
        if not self.left:
            return None
        self.left -= 1
        self.free.append(num_free)
        return Task(self.work, self._is_long, self._is_wide)

    def next_small_task(self) -> Task | None:
        return Task(self.small.pop(0)) if self.small else None


class TaskLog:
    """Turns of several sources on a fake clock, written down in order."""

    def __init__(self, num_turns: int) -> None:
        self.now_s = 0.0
        self.order: list[str] = []
        self.done = threading.Event()
        self._num_turns = num_turns

    def turn(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.order.append(name)
            self.now_s += seconds
            if len(self.order) == self._num_turns:
                self.done.set()

        return work

    def read(self, *sources: ScriptedSource) -> list[str]:
        """Let the sources take all their turns on a lane of this clock,"""
        lane = self.open_lane()
        try:
            for source in sources:
                lane.attach(source)
            lane.notify()
            assert self.done.wait(10)
        finally:
            lane.close()
        return self.order

    def open_lane(self) -> DeviceScheduler:
        """One thread, on this clock."""
        return DeviceScheduler("diary", clock=lambda: self.now_s, look_s=0.0)
