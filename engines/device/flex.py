"""Runs flex tasks: bulk work that uses only what the other tasks of a device leave idle.

They have threads of their own, so that no other task ever waits for one between two layers. On Linux these have the
scheduling policy SCHED_IDLE: any other thread of the server takes their core at once, in the middle of a layer, and
before the next layer they wait until no other task runs or waits. Where there is no such policy, or on a GPU, only the
latter holds.

A floor keeps flex tasks moving under other work that never ends: they may have a share of the time that the other tasks
take while flex tasks wait, in slices, during which one of the other threads leaves its core. Where other processes take
that core, the thread runs a flex task itself.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engines.affinity import usable_cores
from engines.device.cores import CorePin, leave_cores_to_others
from engines.device.tasks import ActiveTask, TaskSource, Usage, WorkerThread

FLOOR = 0.02
"""The share of the seconds of a device that flex tasks have at least."""

_SLICE_S = 0.05
"""Seconds that flex tasks run at once under the floor: some layers. A slice is due once its seconds are owed."""

_MAX_OWED_S = 4 * _SLICE_S

LONGEST_SLICE_S = 0.1
"""The wait of a thread that has left its core in vain: it then runs a flex task itself, at its own priority."""

_RECHECK_S = 0.05
"""Waiting threads look again this often: a path that fails makes an engine exclusive without telling anyone."""


class FlexSource(TaskSource, Protocol):
    """Supplies flex tasks."""

    @property
    def is_exclusive(self) -> bool:
        """Whether none of its tasks may run while another task of its engine does."""

    @property
    def must_finish(self) -> bool:
        """Whether other work of its engine waits for its tasks to end, so that these must not wait for that work."""


class FlexFloor:
    """Decides when flex tasks run although other tasks do. Knows no clock.

    Attributes:
        is_open: whether they do now.
    """

    def __init__(self, share: float = FLOOR, slice_s: float = _SLICE_S) -> None:
        self._rate = share / (1.0 - share)
        self._slice_s = slice_s
        self._owed_s = 0.0
        self.is_open = False

    def on_others(self, seconds: float) -> None:
        """Counts seconds of other tasks, while flex tasks wait."""
        self._owed_s = min(self._owed_s + self._rate * seconds, _MAX_OWED_S)
        self.is_open = self.is_open or self._owed_s >= self._slice_s

    def on_flex(self, seconds: float) -> None:
        """Counts seconds of flex tasks, while other tasks run or wait."""
        self._owed_s -= seconds
        self.is_open = self.is_open and self._owed_s > 0

    def close(self) -> None:
        """Forgets what is owed: the slice was taken in vain, or no flex task waits."""
        self._owed_s, self.is_open = min(self._owed_s, 0.0), False


class _FlexUsage(Usage):
    """The device time of the flex tasks of one engine. `owner`: that of its other tasks."""

    def __init__(self, source: FlexSource, owner: Usage) -> None:
        super().__init__(source)
        self.flex_source = source
        self.owner = owner

    @property
    def may_start(self) -> bool:
        """Whether one more of its tasks may run now."""
        is_free = not (self.flex_source.is_exclusive and self.owner.num_tasks)
        return self.can_run and is_free and self.source.ready_in_s() is not None


@dataclass(frozen=True)
class FlexWork:
    """How flex threads measure their work.

    Args:
        clock: returns the seconds that the calling thread has worked. On a CPU that is its processor time: waiting for
            a core, which other processes may take for long, is no work. On a GPU it is the time.
        pins_cores: whether each thread keeps to a core of its own.
    """

    clock: Callable[[], float]
    pins_cores: bool = False


class _FlexLocal(threading.local):
    """What a flex thread knows of itself: its pin, and when it began or resumed its work, on both clocks."""

    pin: CorePin | None = None
    resumed_s: float = 0.0
    resumed_work_s: float = 0.0


class FlexThreads:
    """The flex threads of one device. All methods but `start_work` and `give_way` are called with the scheduler's lock
    held.

    Args:
        lock: the scheduler's.
        clock: seconds.
        is_busy: tells whether other tasks run or wait.
        num_threads: flex tasks that run at once.
        run: runs threads: called on each with its worker, returns at the scheduler's end.
        work: how their work is measured; by default on the same clock.

    Attributes:
        is_active: whether flex tasks run or wait.
        slice_ended: notified when the floor closes.
    """

    def __init__(
        self,
        lock: threading.Lock,
        clock: Callable[[], float],
        is_busy: Callable[[], bool],
        num_threads: int,
        run: Callable[[WorkerThread], None],
        *,
        work: FlexWork | None = None,
    ) -> None:
        self._lock, self._clock, self._is_busy, self._run = lock, clock, is_busy, run
        self._work = work or FlexWork(clock)
        self._local = _FlexLocal()
        self._changed = threading.Condition(lock)
        self.slice_ended = threading.Condition(lock)
        self.floor = FlexFloor()
        self.is_active = self._is_closed = False
        self._usages: list[_FlexUsage] = []
        self._virtual_time_s = 0.0
        self.workers = [WorkerThread(is_flex=True) for _ in range(num_threads)]
        self.threads: list[threading.Thread] = []

    def attach(self, source: FlexSource, owner: Usage) -> None:
        """Adds the flex tasks of an engine."""
        self._usages.append(_FlexUsage(source, owner))

    def detach(self, owner: TaskSource) -> list[TaskSource]:
        """Removes the flex tasks of an engine; returns their sources. Those that run go on to their end."""
        left = [usage for usage in self._usages if usage.owner.source is owner]
        self._usages = [usage for usage in self._usages if usage not in left]
        self._changed.notify_all()
        return [usage.source for usage in left]

    def seconds_of(self, owner: TaskSource) -> float:
        """Returns the seconds of the flex tasks of an engine."""
        return sum(usage.total_s for usage in self._usages if usage.owner.source is owner)

    def notify(self, name: str) -> None:
        """Announces that flex tasks may wait. The first time, it starts the threads."""
        self.is_active = True
        if not self.threads:
            self.threads = [
                threading.Thread(
                    target=self._run_thread, args=(worker, index), name=f"flex-{name}-{index}", daemon=True
                )
                for index, worker in enumerate(self.workers)
            ]
            for thread in self.threads:
                thread.start()
        self._changed.notify_all()

    def on_charged(self, usage: Usage, seconds: float) -> None:
        """Counts seconds of a task on one of the other threads, and wakes the flex threads: perhaps they may run now.

        Such a thread runs a flex task where a slice was in vain.
        """
        if isinstance(usage, _FlexUsage):
            self.floor.on_flex(seconds)
        else:
            self.floor.on_others(seconds)
        self._changed.notify_all()

    def wake(self) -> None:
        """Wakes the flex threads: one of the other threads has become idle."""
        self._changed.notify_all()

    def close(self) -> None:
        """Lets the threads end."""
        self._is_closed = True
        self._changed.notify_all()
        self.slice_ended.notify_all()

    def wait_for_task(self, worker: WorkerThread) -> ActiveTask | None:
        """Waits until a flex task may run, and starts it; returns None at the end."""
        while not self._is_closed:
            if self._may_run():
                picked = self.pick(worker)
                if picked is not None:
                    return picked
            waits = any(usage.source.ready_in_s() is not None for usage in self._usages)
            if not waits and not any(other.running for other in self.workers):
                self.is_active = False
                self._end_slice()
            self._changed.wait(_RECHECK_S if waits else None)
        return None

    def start_work(self, worker: WorkerThread) -> None:
        """Counts the running task's seconds from now on. Called on its thread."""
        self._local.resumed_s = self._clock()
        self._local.resumed_work_s = worker.charged_until_s = self._work.clock()

    def charge(self, worker: WorkerThread) -> float:
        """Charges the running task for its seconds of work, and returns them. Called on its thread."""
        return worker.charge(self._work.clock())

    def end_task(self, worker: WorkerThread) -> None:
        """Removes the task that has ended. Called on its thread."""
        self._charge(worker)
        worker.end_task(self._work.clock())

    def give_way(self, worker: WorkerThread) -> None:
        """Waits while other tasks run or wait. Called before each layer of a flex task, on its thread."""
        with self._lock:
            self._charge(worker)
            while self._must_wait(worker):
                worker.charged_until_s = None
                self._changed.wait(_RECHECK_S)
            self.start_work(worker)

    def _must_wait(self, worker: WorkerThread) -> bool:
        if self._is_closed or self._may_run():
            return False
        running = worker.running[-1].usage
        attached = [usage for usage in self._usages if usage is running]  # a detached engine waits for its tasks to end
        return any(not usage.flex_source.must_finish for usage in attached)

    def _may_run(self) -> bool:
        return self.floor.is_open or not self._is_busy()

    def _charge(self, worker: WorkerThread) -> None:
        seconds = self.charge(worker)
        if self._local.pin is not None:
            now_s = self._clock()
            worked_s = self._work.clock() - self._local.resumed_work_s
            self._local.pin.on_work(now_s - self._local.resumed_s, worked_s, now_s)
        if self.floor.is_open or self._is_busy():
            self.floor.on_flex(seconds)
            if not self.floor.is_open:
                self.slice_ended.notify_all()

    def _end_slice(self) -> None:
        self.floor.close()
        self.slice_ended.notify_all()

    def pick(self, worker: WorkerThread) -> ActiveTask | None:
        """Starts a flex task of the engine whose flex tasks have had the fewest seconds."""
        for usage in sorted(self._usages, key=lambda usage: usage.used_s):
            was_idle, usage.is_idle = usage.is_idle, usage.source.ready_in_s() is None and not usage.num_tasks
            if was_idle and not usage.is_idle:
                usage.used_s = max(usage.used_s, self._virtual_time_s)
        for usage in sorted(self._usages, key=lambda usage: usage.used_s):
            task = usage.source.next_task(0) if usage.may_start else None
            if task is not None:
                self._virtual_time_s = max(self._virtual_time_s, usage.used_s)
                return worker.start_task(ActiveTask(usage, task))
        return None

    def _run_thread(self, worker: WorkerThread, place: int) -> None:
        leave_cores_to_others()
        if self._work.pins_cores:
            self._local.pin = CorePin(place, usable_cores())
        self._run(worker)
