"""What the lane keeps its books with: sources, their turns and accounts, and who sits where. No thread here."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One piece of work. `run` must deliver its own failures: a turn does not raise.

    Args:
        is_long: part of a bulk job, in the course of which small work of the same source may go first.
        is_wide: it uses the cores of threads that have nothing to do.
    """

    run: Callable[[], None]
    is_long: bool = False
    uses_idle_cores: bool = False


class TaskSource(Protocol):
    """Whoever takes turns. Called on the lane's threads, one at a time."""

    @property
    def max_concurrent_tasks(self) -> int:
        """How many of its turns may run at once."""

    def ready_in_s(self) -> float | None:
        """Seconds until there is work: 0 for now, None for none."""

    def next_task(self, num_free: int) -> Task | None:
        """The work of one turn, while `num_free` other threads have nothing to do."""

    def next_small_task(self) -> Task | None:
        """Work that should not wait for a long turn of this source; None when there is none."""


class Usage:
    """One source, the seconds it has run in all, and those that count for whose turn it is (`used_s`)."""

    def __init__(self, source: TaskSource) -> None:
        self.source = source
        self.total_s = 0.0
        self.used_s = 0.0
        self.is_due = False
        self.is_idle = True
        self.num_tasks = 0

    @property
    def can_run(self) -> bool:
        """Whether one more of its turns may run beside those that do."""
        return self.num_tasks < self.source.max_concurrent_tasks


@dataclass
class ActiveTask:
    """A turn on a thread: the seconds it has run, and those it gave to small turns in between (`gives`: to this)."""

    account: Usage
    task: Task
    gives: "ActiveTask | None" = None
    own_s: float = 0.0
    given_s: float = 0.0


@dataclass
class WorkerThread:
    """One thread of the lane: the turn that runs on it is the last of `running`, those before it gave way.

    `since_s`: until when the books are up to date, None between turns.
    """

    running: list[ActiveTask] = field(default_factory=list)
    since_s: float | None = None
    looked_s: float = -math.inf
    cores: int = 0

    def sit(self, running: ActiveTask) -> ActiveTask:
        """A turn comes, before the one that runs."""
        running.account.num_tasks += 1
        self.running.append(running)
        return running

    def leave(self, now_s: float) -> None:
        """The turn that runs has ended."""
        self.charge(now_s)
        ended = self.running.pop()
        ended.account.num_tasks -= 1
        if ended.gives is not None:
            ended.gives.given_s += ended.own_s
        self.since_s = now_s if self.running else None

    def charge(self, now_s: float) -> None:
        """What the turn that runs has taken since it began or was charged last."""
        seconds = now_s - (now_s if self.since_s is None else self.since_s)
        self.running[-1].own_s += seconds
        self.running[-1].account.total_s += seconds
        self.running[-1].account.used_s += seconds
        self.since_s = now_s

    def holds(self, source: TaskSource) -> bool:
        """Whether a turn of the source runs here, or gave way to the one that does."""
        return any(running.account.source is source for running in self.running)

    def is_at(self, source: TaskSource) -> bool:
        """Whether the turn that runs is this source's."""
        # A slice, because the thread of this seat may end the turn meanwhile.
        return any(running.account.source is source for running in self.running[-1:])

    @property
    def is_short(self) -> bool:
        """Whether a turn runs that is not long."""
        return any(not running.task.is_long for running in self.running[-1:])

    def running_for_s(self, now_s: float) -> float:
        """How long the present turn, or the present part of one, has been running; 0 between turns."""
        since_s = self.since_s
        return 0.0 if since_s is None else now_s - since_s


class CallQueue:
    """Single functions that wait for a turn (`TaskSource`)."""

    def __init__(self, max_turns: int) -> None:
        self._waiting: list[Task] = []
        self._max_turns = max_turns

    @property
    def max_concurrent_tasks(self) -> int:
        """As many as there are threads."""
        return self._max_turns

    def add(self, function: Callable[[], Result], future: "asyncio.Future[Result]") -> None:
        """Let `future` have what `function` returns or raises."""
        self._waiting.append(Task(lambda: _answer(future, function), uses_idle_cores=True))

    def ready_in_s(self) -> float | None:
        """See `TaskSource`."""
        return 0.0 if self._waiting else None

    def next_task(self, num_free: int) -> Task | None:
        """See `TaskSource`."""
        return self._waiting.pop(0) if self._waiting else None

    def next_small_task(self) -> Task | None:
        """See `TaskSource`: a call does not know how large it is."""
        return None


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Hand a call to the event loop from another thread; a loop that has closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.info("lane.loop_closed")


def _answer(future: "asyncio.Future[Result]", function: Callable[[], Result]) -> None:
    loop = future.get_loop()
    try:
        result = function()
    except Exception as error:  # noqa: BLE001  # it is raised again where the call is awaited
        post(loop, _settle, future, future.set_exception, error)
    else:
        post(loop, _settle, future, future.set_result, result)


def _settle(future: "asyncio.Future[Any]", settle: Callable[[Any], None], outcome: object) -> None:
    if not future.done():
        settle(outcome)
