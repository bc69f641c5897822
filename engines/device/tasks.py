"""The records of the device scheduler: sources, their tasks and used time, the tasks on each thread, and who waits.

Starts no thread and decides nothing: `engines.device.scheduler` does.
"""

import asyncio
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Args:
        run: does the work, and delivers its own failures: it must not raise.
        is_long: whether it is part of a bulk job, which small tasks of the same source may preempt.
        uses_idle_cores: whether it uses the cores of idle threads, too.
        begins_wide: whether it does so from its beginning, and not only from its first preemption point on. A batch of
            several small requests does not: it ends soon, and clients that were just answered are about to give the
            idle thread work, with 1.03 times as many texts a second with 8 and 32 clients.
    """

    run: Callable[[], None]
    is_long: bool = False
    uses_idle_cores: bool = False
    begins_wide: bool = True


class TaskSource(Protocol):
    """Supplies tasks to a device. Its methods are called on the device's threads, one at a time."""

    @property
    def max_concurrent_tasks(self) -> int:
        """The number of its tasks that may run at once."""

    def ready_in_s(self) -> float | None:
        """Returns the seconds until there is work: 0 for now, None for none."""

    def next_task(self, num_free: int) -> Task | None:
        """Returns the next task, while `num_free` other threads are idle; None when there is none."""

    def next_small_task(self) -> Task | None:
        """Returns a task that should not wait for a long task of this source; None when there is none."""


class Usage:
    """The device time of one source.

    Attributes:
        total_s: seconds that its tasks have run in all.
        used_s: seconds that count for the fair share, raised when an idle source becomes active.
        is_due: whether it has work now.
        is_idle: whether it has neither work nor a running task.
        num_tasks: its tasks that run now or are preempted.
    """

    def __init__(self, source: TaskSource) -> None:
        self.source = source
        self.total_s = 0.0
        self.used_s = 0.0
        self.is_due = False
        self.is_idle = True
        self.num_tasks = 0

    @property
    def can_run(self) -> bool:
        """Whether one more of its tasks may run beside those that do."""
        return self.num_tasks < self.source.max_concurrent_tasks


@dataclass
class ActiveTask:
    """A task on a thread.

    Attributes:
        usage: of its source.
        preempted: the long task of the same source that this small one preempts.
        own_s: seconds that it has run.
        yielded_s: seconds that small tasks of its source have run in between.
    """

    usage: Usage
    task: Task
    preempted: "ActiveTask | None" = None
    own_s: float = 0.0
    yielded_s: float = 0.0


@dataclass
class WorkerThread:
    """The state of one thread of a device.

    Attributes:
        running: its tasks: the last one runs, those before it are preempted.
        charged_until_s: the time up to which the running task has been charged, None between tasks.
        checked_s: the time of the last check for preemption.
        cores: the number of cores that the thread may use.
        is_flex: whether it runs flex tasks, and only these.
    """

    running: list[ActiveTask] = field(default_factory=list)
    charged_until_s: float | None = None
    checked_s: float = -math.inf
    cores: int = 0
    is_flex: bool = False

    def start_task(self, started: ActiveTask) -> ActiveTask:
        """Puts a task before the running one."""
        started.usage.num_tasks += 1
        self.running.append(started)
        return started

    def end_task(self, now_s: float) -> float:
        """Removes the running task, which has ended; returns the seconds since it was charged last."""
        seconds = self.charge(now_s)
        ended = self.running.pop()
        ended.usage.num_tasks -= 1
        if ended.preempted is not None:
            ended.preempted.yielded_s += ended.own_s
        self.charged_until_s = now_s if self.running else None
        return seconds

    def charge(self, now_s: float) -> float:
        """Charges the running task for the seconds since it began or was charged last, and returns them."""
        seconds = now_s - (now_s if self.charged_until_s is None else self.charged_until_s)
        self.running[-1].own_s += seconds
        self.running[-1].usage.total_s += seconds
        self.running[-1].usage.used_s += seconds
        self.charged_until_s = now_s
        return seconds

    def holds(self, source: TaskSource) -> bool:
        """Whether a task of the source runs here or is preempted."""
        return bool(self.running) and any(active.usage.source is source for active in self.running)

    def is_running(self, source: TaskSource) -> bool:
        """Whether the running task is of this source."""
        # A slice, because this worker's thread may end the task meanwhile.
        return any(active.usage.source is source for active in self.running[-1:])

    @property
    def is_short(self) -> bool:
        """Whether a task runs that is not long."""
        return any(not active.task.is_long for active in self.running[-1:])

    def running_for_s(self, now_s: float) -> float:
        """Returns the seconds since the running task began, was charged or was resumed; 0 between tasks."""
        charged_until_s = self.charged_until_s
        return 0.0 if charged_until_s is None else now_s - charged_until_s


class IdleThreads:
    """A condition whose `notify` wakes the thread that began to wait last; `threading.Condition` wakes the first.

    With one client two threads took turns, each on a core whose caches held the other work. When one of them does it
    all, a text over HTTP takes 2.90 instead of 3.07 ms (p95 3.5 instead of 4.1), and with 8 and 32 clients as long.

    Args:
        lock: held by callers of each method.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: list[threading.Lock] = []

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits to be notified, `timeout_s` at most, without the lock."""
        woken = threading.Lock()
        woken.acquire()
        self._waiting.append(woken)
        self._lock.release()
        try:
            woken.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        finally:
            self._lock.acquire()
            if woken in self._waiting:
                self._waiting.remove(woken)

    def notify(self) -> None:
        """Wakes the thread that waits since last, if any does."""
        if self._waiting:
            self._waiting.pop().release()

    def notify_all(self) -> None:
        """Wakes all threads that wait."""
        while self._waiting:
            self.notify()


class CallQueue:
    """Single functions that wait to run on the device (`TaskSource`).

    Args:
        max_tasks: how many may run at once.
        report_error: called with the error of a function, on the device's thread.
    """

    def __init__(self, max_tasks: int, report_error: Callable[[Exception], None] = lambda error: None) -> None:
        self._waiting: list[Task] = []
        self._max_tasks = max_tasks
        self._report_error = report_error

    @property
    def max_concurrent_tasks(self) -> int:
        """As many as the device has threads."""
        return self._max_tasks

    def add(self, function: Callable[[], Result], future: "asyncio.Future[Result]") -> None:
        """Adds a function, whose result or error is set on `future`."""
        run = partial(_call_and_resolve, future, function, self._report_error)
        self._waiting.append(Task(run, uses_idle_cores=True))

    def ready_in_s(self) -> float | None:
        """See `TaskSource`."""
        return 0.0 if self._waiting else None

    def next_task(self, num_free: int) -> Task | None:
        """See `TaskSource`."""
        return self._waiting.pop(0) if self._waiting else None

    def next_small_task(self) -> Task | None:
        """See `TaskSource`; the size of a call is not known."""
        return None


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Schedules a call on the event loop from another thread; a closed loop has no caller left, and is only logged."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.info("lane.loop_closed")


def _call_and_resolve(
    future: "asyncio.Future[Result]", function: Callable[[], Result], report_error: Callable[[Exception], None]
) -> None:
    loop = future.get_loop()
    try:
        result = function()
    except Exception as error:  # noqa: BLE001  # it is raised again where the call is awaited
        report_error(error)
        post(loop, _resolve, future, future.set_exception, error)
    else:
        post(loop, _resolve, future, future.set_result, result)


def _resolve(future: "asyncio.Future[Any]", set_outcome: Callable[[Any], None], outcome: object) -> None:
    if not future.done():
        set_outcome(outcome)
