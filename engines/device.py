"""The lane: the one thread on which the engines of a device take turns.

Turns are fair in time, not in number: the engine that has used the least seconds goes next, and one that was idle
starts level with the rest, so that it can neither hoard time nor be starved (start-time fair queuing: Goyal, Vin and
Cheng 1996). Between two batches nothing crosses the event loop: the thread cuts the next one itself. A turn that lasts
(the self-check of a large model) lets others go first in between.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import structlog

from engines.pulse import Pulse

log = structlog.get_logger(__name__)

_END_S = 2.0
"""A turn that hangs must not keep the process from ending."""

Turn = Callable[[], None]
Result = TypeVar("Result")


class Source(Protocol):
    """Whoever takes turns. Called on the lane's thread."""

    def due_in_s(self) -> float | None:
        """Seconds until there is work: 0 for now, None for none."""

    def take(self) -> Turn | None:
        """The work of one turn. It must deliver its own failures: a turn does not raise."""


class _Account:
    """One source and the seconds it has used."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.used_s = 0.0
        self.is_idle = True


class Lane:
    """The thread of one device.

    Args:
        name: for the thread's name.
        prepare: called once on the thread before its first turn (thread counts, device).
        clock: seconds, for the fair shares.
    """

    def __init__(
        self, name: str, prepare: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._accounts: list[_Account] = []
        self._level_s = 0.0
        self._is_closed = False
        self._changed = threading.Condition()
        self._turns: list[_Account] = []  # whose turn it is; before it, those who gave way to it
        self._running_since: float | None = None
        self._calls = _Calls()
        self.attach(self._calls)
        self._thread = threading.Thread(target=self._run, args=(prepare,), name=f"lane-{name}", daemon=True)
        self._thread.start()

    @property
    def running_for_s(self) -> float:
        """How long the present turn has been running; 0 between turns."""
        since = self._running_since
        return 0.0 if since is None else self._clock() - since

    @property
    def is_alive(self) -> bool:
        """Whether the thread still takes turns."""
        return self._thread.is_alive()

    def pulse(self) -> Pulse:
        """How it goes; a lane that was closed has not died."""
        is_check = bool(self._turns) and self._turns[-1].source is self._calls  # the calls that last are loads
        return Pulse(self.is_alive or self._is_closed, self.running_for_s, is_check)

    def attach(self, source: Source) -> None:
        """Let a source take turns."""
        with self._changed:
            self._accounts.append(_Account(source))

    def detach(self, source: Source) -> None:
        """Take a source's turns away; blocks until one that runs has ended, so that its memory can be freed."""
        with self._changed:
            self._accounts = [account for account in self._accounts if account.source is not source]
            self._changed.wait_for(lambda: all(account.source is not source for account in self._turns))

    def wake(self) -> None:
        """Say that a source may have work."""
        with self._changed:
            self._changed.notify_all()

    def give_way(self) -> None:
        """Called again and again by a turn that lasts, on the lane's thread: whoever has had less time goes first.

        Without effect outside a turn.
        """
        if threading.current_thread() is not self._thread or not self._turns:
            return
        outer = self._turns[-1]
        with self._changed:
            self._charge(outer)
        while (picked := self._due_before(outer)) is not None:
            self._take(*picked)
        self._running_since = self._clock()

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the lane as one turn and give back what it returns or raises.

        A cancelled call still runs to its end when it has begun.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._calls.add(lambda: _answer(loop, future, function))
        self.wake()
        return await future

    def close(self) -> None:
        """End the thread after the present turn, and wait for it, but not for ever."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_END_S)

    def _run(self, prepare: Callable[[], None]) -> None:
        prepare()
        while (picked := self._next_turn()) is not None:
            self._take(*picked)

    def _take(self, account: _Account, turn: Turn) -> None:
        self._running_since = self._clock()
        try:
            turn()
        except Exception:
            log.exception("lane.turn_raised")
        with self._changed:
            self._charge(account)
            self._turns.pop()
            self._running_since = None
            self._changed.notify_all()

    def _charge(self, account: _Account) -> None:
        """What the present turn has taken since it began or was charged last."""
        now_s = self._clock()
        account.used_s += now_s - (now_s if self._running_since is None else self._running_since)
        self._running_since = now_s

    def _next_turn(self) -> tuple[_Account, Turn] | None:
        """Wait for work; None when the lane closes."""
        with self._changed:
            while not self._is_closed:
                wait_s = self._mark_idle()
                picked = self._pick(self._accounts)
                if picked is not None:
                    return picked
                self._changed.wait(wait_s)
            return None

    def _due_before(self, outer: _Account) -> tuple[_Account, Turn] | None:
        """The next turn of somebody who has had less time than one whose turn lasts."""
        with self._changed:
            if self._is_closed:
                return None
            self._mark_idle()
            return self._pick([account for account in self._accounts if account.used_s < outer.used_s])

    def _pick(self, accounts: Sequence[_Account]) -> tuple[_Account, Turn] | None:
        """Of those with work, the one who has used the least; from now on it is its turn."""
        for account in sorted(accounts, key=lambda account: account.used_s):
            turn = None if account.is_idle or account in self._turns else account.source.take()
            if turn is not None:
                self._level_s = max(self._level_s, account.used_s)
                self._turns.append(account)
                return account, turn
        return None

    def _mark_idle(self) -> float | None:
        """Bring those who wake up level with the rest; seconds until the next is due, None when nobody will be."""
        soonest: float | None = None
        for account in self._accounts:
            due_in_s = account.source.due_in_s()
            was_idle, account.is_idle = account.is_idle, due_in_s != 0
            if was_idle and not account.is_idle:
                account.used_s = max(account.used_s, self._level_s)
            if due_in_s is not None and due_in_s > 0:
                soonest = due_in_s if soonest is None else min(soonest, due_in_s)
        return soonest


class _Calls:
    """Single functions that wait for a turn."""

    def __init__(self) -> None:
        self._waiting: list[Turn] = []

    def add(self, turn: Turn) -> None:
        self._waiting.append(turn)

    def due_in_s(self) -> float | None:
        return 0.0 if self._waiting else None

    def take(self) -> Turn | None:
        return self._waiting.pop(0) if self._waiting else None


def _answer(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Result], function: Callable[[], Result]) -> None:
    try:
        result = function()
    except Exception as error:  # noqa: BLE001  # it is raised again where the call is awaited
        post(loop, _set_error, future, error)
    else:
        post(loop, _set_result, future, result)


def post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Hand a call to the event loop from the lane; a loop that has closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.info("lane.loop_closed")


def _set_result(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
