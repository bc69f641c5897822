"""Shares one device between its engines: the worker threads of the device, and which task each of them runs next.

A GPU has two threads: while one waits for a batch, the other prepares the next one. A CPU has one thread for each core,
and each runs its own batch on its own core: nothing waits at a barrier for a core that is busy elsewhere. A thread also
uses the cores of idle threads, until one of those finds work.

The shares are fair in time, not in number of tasks: the source that has used the fewest seconds goes next, and one that
was idle starts level with the rest, so that it can neither save up time nor be starved (start-time fair queuing: Goyal,
Vin and Cheng 1996). Nothing crosses the event loop between two batches: the threads form the next batch themselves.
Between two layers a task can be preempted (`DeviceScheduler.preemption_point`): by sources that have used less time,
and, where it belongs to a bulk job, by small tasks of its own model. Flex tasks run on threads of their own, when these
are idle (`engines.device.flex`).
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from engines.device.cores import IdleCores, WakingCores
from engines.device.flex import LONGEST_SLICE_S, FlexSource, FlexThreads, FlexWork
from engines.device.health import DeviceHealth, least_healthy
from engines.device.tasks import ActiveTask, CallQueue, IdleThreads, Task, TaskSource, Usage, WorkerThread, post
from engines.errors import device_loss

__all__ = ["DeviceScheduler", "Task", "TaskSource", "post"]

log = structlog.get_logger(__name__)

_JOIN_TIMEOUT_S = 2.0
"""A task that hangs must not keep the process from ending."""

_CHECK_INTERVAL_S = 0.002
"""Least time between two checks of a running task for preemption: it reaches a preemption point before every layer, and
a check takes the lock."""

Result = TypeVar("Result")


class DeviceScheduler:
    """Runs the tasks of all sources on the worker threads of one device.

    Args:
        name: of the device, for the names of the threads.
        prepare: called once on each thread before its first task.
        clock: seconds, for the fair shares.
        num_threads: the number of tasks that may run at once.
        use_cores: called on a thread with the number of cores that it may use from now on.
        check_interval_s: the least time between two checks of a running task for preemption.
        flex_work: how the work of flex threads is measured; by default on the same clock.
        waking_cores: on which core threads wake while all device threads work; None leaves it to the operating system.
        idle_cores: how many cores of idle threads a batch uses.
    """

    def __init__(  # noqa: PLR0913  # one device, and the parts of the environment that a test replaces
        self,
        name: str,
        prepare: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        num_threads: int = 1,
        use_cores: Callable[[int], None] = lambda cores: None,
        check_interval_s: float = _CHECK_INTERVAL_S,
        flex_work: FlexWork | None = None,
        waking_cores: WakingCores | None = None,
        idle_cores: IdleCores | None = None,
    ) -> None:
        self._waking_cores, self._idle_cores = waking_cores, idle_cores or IdleCores(clock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._clock = clock
        self._use_cores = use_cores
        self._check_interval_s = check_interval_s
        self._usages: list[Usage] = []
        self._virtual_time_s = 0.0
        self._is_closed = False
        self._loss = ""
        self._lock = threading.Lock()
        self._work = IdleThreads(self._lock)
        self._ended = threading.Condition(self._lock)
        self._num_free = self._num_woken = 0
        self._local = threading.local()
        self._name, self._prepare = name, prepare
        self._num_aside = 0
        self._flex = FlexThreads(self._lock, clock, self._is_busy, num_threads, self._run_flex, work=flex_work)
        self._calls = CallQueue(num_threads, self.report_error)
        self.attach(self._calls)
        self._workers = [WorkerThread() for _ in range(num_threads)]
        names = [f"device-{name}"] if num_threads == 1 else [f"device-{name}-{index}" for index in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(worker, prepare), name=own, daemon=True)
            for worker, own in zip(self._workers, names, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        """The number of tasks that may run at once."""
        return len(self._workers)

    @property
    def is_alive(self) -> bool:
        """Whether every thread still runs."""
        return all(thread.is_alive() for thread in (*self._threads, *self._flex.threads))

    def health(self) -> DeviceHealth:
        """Returns the health of the thread nearest to its limit; the threads of a closed scheduler count as alive."""
        is_alive, now_s = self.is_alive or self._is_closed, self._clock()
        return least_healthy(
            DeviceHealth(is_alive, worker.running_for_s(now_s), worker.is_running(self._calls), self._loss)
            for worker in self._workers
        )

    def report_error(self, error: BaseException) -> None:
        """Takes an error that work on the device raised, on any thread; where it says that the device has failed,
        `health` says so from now on."""
        loss = device_loss(error)
        if loss and not self._loss:
            self._loss = loss
            log.error("device.lost", loss=loss, exc_info=error)

    def attach(self, source: TaskSource, flex: FlexSource | None = None) -> None:
        """Adds a source, which may have work already, and that of its flex tasks."""
        with self._lock:
            self._usages.append(usage := Usage(source))
            if flex is not None:
                self._flex.attach(flex, usage)
            self._work.notify()

    def detach(self, source: TaskSource) -> None:
        """Removes a source; blocks until its running tasks have ended, so that its memory can be freed."""
        with self._lock:
            self._usages = [usage for usage in self._usages if usage.source is not source]
            sources, workers = [source, *self._flex.detach(source)], [*self._workers, *self._flex.workers]
            self._ended.wait_for(lambda: not any(worker.holds(each) for worker in workers for each in sources))

    def seconds_of(self, source: TaskSource) -> float:
        """Returns the seconds charged to a source's tasks so far; 0 for a source that is not attached."""
        with self._lock:
            usual_s = sum(usage.total_s for usage in self._usages if usage.source is source)
            return usual_s + self._flex.seconds_of(source)

    def notify(self, *, is_flex: bool = False) -> None:
        """Announces that a source may have work, also flex work. Wakes one thread, which wakes the next when there is
        more."""
        with self._lock:
            self._work.notify()
            if is_flex:
                self._flex.notify(self._name)

    def post(self, loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
        """Schedules a call on the event loop, at the end of a task. While all threads work, the loop wakes on the core
        of this one, which then waits for what the loop brings; else on one that is idle."""
        cores = self._waking_cores
        if cores is None or self._num_free or loop is not self._loop or not loop.is_running():
            post(loop, function, *args)
            return
        with cores.waking_here(self._loop_thread):
            post(loop, function, *args)

    def preemption_point(self) -> None:
        """Runs the tasks that go before the present one. Called before each layer, on the task's thread.

        Outside of a task it does nothing.
        """
        worker: WorkerThread | None = getattr(self._local, "worker", None)
        if worker is None or not worker.running:
            return
        if worker.is_flex:
            self._flex.give_way(worker)
            return
        if self._clock() - worker.checked_s >= self._check_interval_s:
            with self._lock:
                seconds = worker.charge(self._clock())
                if self._flex.is_active:
                    self._flex.on_charged(worker.running[-1].usage, seconds)
                    self._stand_aside(worker)
            while (picked := self._next_preempting(worker)) is not None:
                self._run_task(worker, picked)
            worker.checked_s = self._clock()
        self._share_idle_cores(worker)

    def task_elapsed_s(self) -> float:
        """Returns the seconds that the present task has run, without those of preempting tasks; 0 outside of a task."""
        worker: WorkerThread | None = getattr(self._local, "worker", None)
        if worker is None or not worker.running:
            return 0.0
        with self._lock:
            if worker.is_flex:
                self._flex.charge(worker)
            else:
                worker.charge(self._clock())
            return worker.running[-1].own_s

    def wait_for_short_tasks(self, timeout_s: float) -> bool:
        """Blocks while a short task runs, `timeout_s` at most; returns whether none runs any more.

        Long tasks do not count: their callers wait anyway.
        """
        with self._lock:
            return self._ended.wait_for(lambda: not any(worker.is_short for worker in self._workers), timeout_s)

    async def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function on the device as one task and returns, or raises, its outcome.

        A cancelled call still runs to its end when it has begun.
        """
        loop = asyncio.get_running_loop()
        self._loop, self._loop_thread = loop, threading.get_native_id()
        future: asyncio.Future[Result] = loop.create_future()
        self._calls.add(function, future)
        self.notify()
        return await future

    def close(self) -> None:
        """Ends the threads after their present tasks, and waits for each of them for `_JOIN_TIMEOUT_S` at most."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
            self._flex.close()
        for thread in (*self._threads, *self._flex.threads):
            thread.join(_JOIN_TIMEOUT_S)

    def _run(self, worker: WorkerThread, prepare: Callable[[], None]) -> None:
        self._local.worker = worker
        prepare()
        while (picked := self._wait_for_task(worker)) is not None:
            self._run_task(worker, picked)
            del picked  # it may hold a model, whose memory must be freed while this thread waits

    def _run_flex(self, worker: WorkerThread) -> None:
        """Runs flex tasks on a flex thread."""
        self._local.worker = worker
        self._prepare()
        while True:
            with self._lock:
                picked = self._flex.wait_for_task(worker)
            if picked is None:
                return
            self._flex.start_work(worker)
            try:
                picked.task.run()
            except Exception:
                log.exception("lane.turn_raised")
            with self._lock:
                self._flex.end_task(worker)
                self._ended.notify_all()
                self._work.notify()  # an engine whose batches run one at a time may have waited for this one
            del picked  # as in `_run`

    def _is_busy(self) -> bool:
        """Whether tasks that are not flex run or wait."""
        is_running = any(worker.running for worker in self._workers)
        return is_running or any(usage.source.ready_in_s() is not None for usage in self._usages)

    def _stand_aside(self, worker: WorkerThread) -> bool:
        """Leaves the core of this thread to flex tasks while the floor is open and no other thread is idle.

        Returns:
            Whether that was in vain: other processes took the core.
        """
        while self._flex.floor.is_open and not (self._num_free or self._num_aside or self._is_closed):
            self._num_aside += 1
            is_over = self._flex.slice_ended.wait(LONGEST_SLICE_S)
            self._num_aside -= 1
            if worker.running:
                worker.charged_until_s = self._clock()
            if not is_over:
                self._flex.floor.close()
                return True
        return False

    def _run_task(self, worker: WorkerThread, picked: ActiveTask) -> None:
        """Runs a task that `_pick` or `_pick_small` has started on this worker."""
        worker.charged_until_s = worker.checked_s = self._clock()
        self._share_idle_cores(worker, is_allowed=picked.task.begins_wide)
        is_shared = worker.cores > 1 and picked.usage.source is not self._calls  # which may wait for a disk
        started = self._idle_cores.start() if is_shared else None
        try:
            picked.task.run()
        except Exception:
            log.exception("lane.turn_raised")
        if started is not None and worker.cores > 1:
            self._idle_cores.end(started)
        with self._lock:
            seconds = worker.end_task(self._clock())
            self._ended.notify_all()
            if self._flex.is_active:
                self._flex.on_charged(picked.usage, seconds)

    def _share_idle_cores(self, worker: WorkerThread, *, is_allowed: bool = True) -> None:
        """Sets the cores of this thread: its own, and an equal part of those of threads that are idle and not woken."""
        is_wide = is_allowed and worker.running and worker.running[-1].task.uses_idle_cores
        num_free = max(0, self._num_free - self._num_woken) if is_wide else 0
        cores = self._idle_cores.limit(1 + num_free // max(1, len(self._workers) - num_free))
        if cores != worker.cores:
            self._use_cores(cores)
            worker.cores = cores

    def _wait_for_task(self, worker: WorkerThread) -> ActiveTask | None:
        """Waits for work and starts a task; returns None when the scheduler closes."""
        with self._lock:
            while not self._is_closed:
                if self._flex.is_active and self._stand_aside(worker):
                    in_slice = self._flex.pick(worker)
                    if in_slice is not None:
                        return in_slice
                wait_s = self._refresh_usages()
                picked = self._pick(worker, self._usages)
                if picked is not None:
                    self._wake_another()
                    return picked
                self._num_free += 1
                if self._flex.is_active:
                    self._flex.wake()
                self._wait_for_work(wait_s)
                self._num_free, self._num_woken = self._num_free - 1, max(0, self._num_woken - 1)
            return None

    def _wait_for_work(self, timeout_s: float | None) -> None:
        """Waits to be notified; while all other threads work, this thread wakes on the one core that they leave."""
        if self._waking_cores is None or self._num_free > 1:
            self._work.wait(timeout_s)
            return
        self._waking_cores.stay()
        self._work.wait(timeout_s)
        self._waking_cores.roam()

    def _wake_another(self) -> None:
        """Wakes another thread when there is work for it, unless all idle threads are woken already."""
        if self._num_free <= self._num_woken:
            return
        if any(usage.source.ready_in_s() == 0 and usage.can_run for usage in self._usages):
            self._num_woken += 1
            self._work.notify()

    def _next_preempting(self, worker: WorkerThread) -> ActiveTask | None:
        """Starts the task that goes before the running one.

        1. A task of a source that has used less time.
        2. A small task of such a source whose long task this one has preempted: else it would wait for all of this one.
        3. A small task of the same source.
        """
        outer = worker.running[-1]
        with self._lock:
            if self._is_closed:
                return None
            self._refresh_usages()
            others = [usage for usage in self._usages if usage.used_s < outer.usage.used_s]
            waiting = [active for active in worker.running[:-1] if active.usage in others and outer.task.is_long]
            return (
                self._pick(worker, others)  # (1)
                or next(filter(None, (self._pick_small(worker, active) for active in reversed(waiting))), None)  # (2)
                or self._pick_small(worker, outer)  # (3)
            )

    def _pick(self, worker: WorkerThread, usages: Sequence[Usage]) -> ActiveTask | None:
        """Starts a task of the source that has used the fewest seconds, of those that have work."""
        due = [usage for usage in usages if usage.is_due]
        if len(due) > 1:
            due.sort(key=lambda usage: usage.used_s)
        for usage in due:
            can_run = usage.can_run and not worker.holds(usage.source)
            task = usage.source.next_task(self._num_free) if can_run else None
            if task is not None:
                self._virtual_time_s = max(self._virtual_time_s, usage.used_s)
                return worker.start_task(ActiveTask(usage, task))
        return None

    def _pick_small(self, worker: WorkerThread, outer: ActiveTask) -> ActiveTask | None:
        """Starts a small task of the source of a long one, which runs on this thread or is preempted there.

        Small tasks get at most as much time as the long one has run, or a stream of small requests would stop it.
        """
        if not outer.task.is_long or outer.yielded_s > outer.own_s:
            return None
        task = outer.usage.source.next_small_task()
        return worker.start_task(ActiveTask(outer.usage, task, preempted=outer)) if task is not None else None

    def _refresh_usages(self) -> float | None:
        """Updates which sources are due, and brings those that were idle level with the rest.

        Returns:
            Seconds until the next source is due, None when none will be.
        """
        soonest: float | None = None
        for usage in self._usages:
            due_in_s = usage.source.ready_in_s()
            was_idle, usage.is_due = usage.is_idle, due_in_s == 0
            usage.is_idle = not usage.is_due and not usage.num_tasks
            if was_idle and not usage.is_idle:
                usage.used_s = max(usage.used_s, self._virtual_time_s)
            if due_in_s is not None and due_in_s > 0:
                soonest = due_in_s if soonest is None else min(soonest, due_in_s)
        return soonest
