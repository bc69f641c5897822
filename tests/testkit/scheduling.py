"""Task sources and a fake clock for the device scheduler."""

import threading
from collections.abc import Callable

from engines.device.scheduler import DeviceScheduler, Task


class ScriptedSource:
    """A source with a fixed number of tasks.

    Attributes:
        left: the number of tasks still to come.
        work: what each task runs.
        small: small tasks, which may preempt the long ones.
        free: the number of idle threads that each call of `next_task` was given.
    """

    def __init__(
        self,
        num_tasks: int,
        work: Callable[[], None],
        *,
        max_tasks: int = 1,
        is_long: bool = False,
        uses_idle_cores: bool = False,
        begins_wide: bool = True,
    ) -> None:
        self.left = num_tasks
        self.work = work
        self.max_concurrent_tasks = max_tasks
        self.small: list[Callable[[], None]] = []
        self.free: list[int] = []
        self._is_long, self._uses_idle_cores, self._begins_wide = is_long, uses_idle_cores, begins_wide

    def ready_in_s(self) -> float | None:
        return 0.0 if self.left else None

    def next_task(self, num_free: int) -> Task | None:
        if not self.left:
            return None
        self.left -= 1
        self.free.append(num_free)
        return Task(self.work, self._is_long, self._uses_idle_cores, self._begins_wide)

    def next_small_task(self) -> Task | None:
        return Task(self.small.pop(0)) if self.small else None


class TaskLog:
    """Records the order in which tasks of several sources run, on a fake clock.

    Attributes:
        done: set after `num_tasks` tasks.
    """

    def __init__(self, num_tasks: int) -> None:
        self.now_s = 0.0
        self.order: list[str] = []
        self.done = threading.Event()
        self._num_tasks = num_tasks

    def task(self, name: str, seconds: float) -> Callable[[], None]:
        """Returns a task that takes `seconds` of the clock."""

        def work() -> None:
            self.order.append(name)
            self.now_s += seconds
            if len(self.order) == self._num_tasks:
                self.done.set()

        return work

    def run(self, *sources: ScriptedSource) -> list[str]:
        """Runs all tasks of the sources on one thread and returns their order."""
        scheduler = self.scheduler()
        try:
            for source in sources:
                scheduler.attach(source)
            scheduler.notify()
            assert self.done.wait(10)
        finally:
            scheduler.close()
        return self.order

    def scheduler(self) -> DeviceScheduler:
        """Returns a scheduler with one thread, on this clock."""
        return DeviceScheduler("test", clock=lambda: self.now_s, check_interval_s=0.0)
