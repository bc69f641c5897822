"""The lane: the threads of one device, on which its engines take turns.

A GPU has two: while one waits for a batch, the other makes the next one ready. A CPU has one for each core, and each
runs its own batch on its own core: nothing waits at a barrier for a core that is busy elsewhere. A thread uses the
cores of neighbours that have nothing to do, too, until one of them finds work.

Turns are fair in time, not in number: the engine that has used the least seconds goes next, and one that was idle
starts level with the rest, so that it can neither hoard time nor be starved (start-time fair queuing: Goyal, Vin and
Cheng 1996). Between two batches nothing crosses the event loop: the threads cut the next one themselves. Between two
layers a turn can give way (`DeviceScheduler.preemption_point`): to engines that had less time, a bulk job also to its
model's small ones.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from engines.device.health import DeviceHealth, least_healthy
from engines.device.tasks import ActiveTask, CallQueue, Task, TaskSource, Usage, WorkerThread, post

__all__ = ["DeviceScheduler", "Task", "TaskSource", "post"]

log = structlog.get_logger(__name__)

_END_S = 2.0
"""A turn that hangs must not keep the process from ending."""

_LOOK_S = 0.002
"""A turn that lasts looks for others no more often: it is asked before every layer, and looking takes the lock."""

Result = TypeVar("Result")


class DeviceScheduler:
    """The threads of one device.

    Args:
        name: for the threads' names.
        prepare: called once on each thread before its first turn.
        clock: seconds, for the fair shares.
        num_threads: how many turns may run at once.
        use_cores: called on a thread with the number of cores it may use from now on.
        look_s: how often a turn that lasts looks for others, at the most.
    """

    def __init__(  # one device, and the parts of the world that a test replaces
        self,
        name: str,
        prepare: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        num_threads: int = 1,
        use_cores: Callable[[int], None] = lambda cores: None,
        look_s: float = _LOOK_S,
    ) -> None:
        self._clock = clock
        self._use_cores = use_cores
        self._look_s = look_s
        self._accounts: list[Usage] = []
        self._level_s = 0.0
        self._is_closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._num_free = self._num_called = 0
        self._here = threading.local()
        self._calls = CallQueue(num_threads)
        self.attach(self._calls)
        self._seats = [WorkerThread() for _ in range(num_threads)]
        names = [f"lane-{name}"] if num_threads == 1 else [f"lane-{name}-{index}" for index in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(seat, prepare), name=own, daemon=True)
            for seat, own in zip(self._seats, names, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        """How many turns may run at once."""
        return len(self._seats)

    @property
    def is_alive(self) -> bool:
        """Whether every thread still takes turns."""
        return all(thread.is_alive() for thread in self._threads)

    def health(self) -> DeviceHealth:
        """How it goes, by the turn nearest to its limit; a lane that was closed has not died."""
        is_alive, now_s = self.is_alive or self._is_closed, self._clock()
        return least_healthy(
            DeviceHealth(is_alive, seat.running_for_s(now_s), seat.is_at(self._calls)) for seat in self._seats
        )

    def attach(self, source: TaskSource) -> None:
        """Let a source take turns; it may have work already."""
        with self._lock:
            self._accounts.append(Usage(source))
            self._work.notify()

    def detach(self, source: TaskSource) -> None:
        """Take a source's turns away; blocks until those that run have ended, so that its memory can be freed."""
        with self._lock:
            self._accounts = [account for account in self._accounts if account.source is not source]
            self._ended.wait_for(lambda: not any(seat.holds(source) for seat in self._seats))

    def seconds_of(self, source: TaskSource) -> float:
        """Seconds of turns that have ended; 0 for a source that is not attached."""
        with self._lock:
            return sum(account.total_s for account in self._accounts if account.source is source)

    def notify(self) -> None:
        """Say that a source may have work. One thread is woken; it wakes the next when there is more."""
        with self._lock:
            self._work.notify()

    def preemption_point(self) -> None:
        """Before each layer of a turn, on its thread: whoever has had less time goes first. Nothing outside a turn."""
        seat: WorkerThread | None = getattr(self._here, "seat", None)
        if seat is None or not seat.running:
            return
        if self._clock() - seat.looked_s >= self._look_s:
            with self._lock:
                seat.charge(self._clock())
            while (picked := self._due_before(seat)) is not None:
                self._take(seat, picked)
            seat.looked_s = self._clock()
        self._spread(seat)

    def task_elapsed_s(self) -> float:
        """Seconds that the present turn has run, without what it gave to others; 0 outside a turn."""
        seat: WorkerThread | None = getattr(self._here, "seat", None)
        if seat is None or not seat.running:
            return 0.0
        with self._lock:
            seat.charge(self._clock())
            return seat.running[-1].own_s

    def wait_for_short_tasks(self, timeout_s: float) -> None:
        """Blocks while a short turn runs, and no longer than that; who wants a long one waits for more anyway."""
        with self._lock:
            self._ended.wait_for(lambda: not any(seat.is_short for seat in self._seats), timeout_s)

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the lane as one turn and give back what it returns or raises.

        A cancelled call still runs to its end when it has begun.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls.add(function, future)
        self.notify()
        return await future

    def close(self) -> None:
        """End the threads after their present turns, and wait for them, but not for ever."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(_END_S)

    def _run(self, seat: WorkerThread, prepare: Callable[[], None]) -> None:
        self._here.seat = seat
        prepare()
        while (picked := self._next(seat)) is not None:
            self._take(seat, picked)
            del picked  # it may hold a model, which must be free to leave while this thread waits

    def _take(self, seat: WorkerThread, picked: ActiveTask) -> None:
        """Run a turn that `_pick` has seated."""
        seat.since_s = seat.looked_s = self._clock()
        self._spread(seat)
        try:
            picked.task.run()
        except Exception:
            log.exception("lane.turn_raised")
        with self._lock:
            seat.leave(self._clock())
            self._ended.notify_all()

    def _spread(self, seat: WorkerThread) -> None:
        """Use the cores of those who have no work, and are not called to any, in equal parts, where it is worth it."""
        is_wide = seat.running and seat.running[-1].task.uses_idle_cores
        num_free = max(0, self._num_free - self._num_called) if is_wide else 0
        cores = 1 + num_free // max(1, len(self._seats) - num_free)
        if cores != seat.cores:
            self._use_cores(cores)
            seat.cores = cores

    def _next(self, seat: WorkerThread) -> ActiveTask | None:
        """Wait for work; None when the lane closes."""
        with self._lock:
            while not self._is_closed:
                wait_s = self._look()
                picked = self._pick(seat, self._accounts)
                if picked is not None:
                    self._pass_on()
                    return picked
                self._num_free += 1
                self._work.wait(wait_s)
                self._num_free, self._num_called = self._num_free - 1, max(0, self._num_called - 1)
            return None

    def _pass_on(self) -> None:
        """Wake another thread when there is work for it, unless all are called already."""
        is_due = (account.can_run and account.source.ready_in_s() == 0 for account in self._accounts)
        if self._num_free > self._num_called and any(is_due):
            self._num_called += 1
            self._work.notify()

    def _due_before(self, seat: WorkerThread) -> ActiveTask | None:
        """Whoever goes before a turn that lasts: 1. a source that has had less time; 2. small work of the same one."""
        outer = seat.running[-1]
        with self._lock:
            if self._is_closed:
                return None
            self._look()
            others = [account for account in self._accounts if account.used_s < outer.account.used_s]
            return self._pick(seat, others) or self._pick_small(seat, outer)  # (1), (2)

    def _pick(self, seat: WorkerThread, accounts: Sequence[Usage]) -> ActiveTask | None:
        """Of those with work, the one who has used the least; from now on it is its turn."""
        for account in sorted(accounts, key=lambda account: account.used_s):
            can_run = account.is_due and account.can_run and not seat.holds(account.source)
            turn = account.source.next_task(self._num_free) if can_run else None
            if turn is not None:
                self._level_s = max(self._level_s, account.used_s)
                return seat.sit(ActiveTask(account, turn))
        return None

    def _pick_small(self, seat: WorkerThread, outer: ActiveTask) -> ActiveTask | None:
        """A long turn gives at most as much time as it takes, or a stream of small requests would stop it."""
        if not outer.task.is_long or outer.given_s > outer.own_s:
            return None
        turn = outer.account.source.next_small_task()
        return seat.sit(ActiveTask(outer.account, turn, gives=outer)) if turn is not None else None

    def _look(self) -> float | None:
        """Bring those who wake up level with the rest; seconds until the next is due, None when nobody will be."""
        soonest: float | None = None
        for account in self._accounts:
            due_in_s = account.source.ready_in_s()
            was_idle, account.is_due = account.is_idle, due_in_s == 0
            account.is_idle = not account.is_due and not account.num_tasks
            if was_idle and not account.is_idle:
                account.used_s = max(account.used_s, self._level_s)
            if due_in_s is not None and due_in_s > 0:
                soonest = due_in_s if soonest is None else min(soonest, due_in_s)
        return soonest
