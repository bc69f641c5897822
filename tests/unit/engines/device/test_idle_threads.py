"""The thread that began to wait last is woken first; nobody is woken for nothing, and nobody is forgotten."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engines.device.tasks import IdleThreads


class Waiters:
    """Threads that wait one after the other, and the order in which they went on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle = IdleThreads(self.lock)
        self.went_on: list[str] = []
        self._threads: list[threading.Thread] = []

    def start(self, name: str, timeout_s: float | None = None) -> None:
        """Starts a thread; returns once it waits."""
        before = len(self.idle._waiting)
        thread = threading.Thread(target=self._wait, args=(name, timeout_s))
        self._threads.append(thread)
        thread.start()
        self.until(lambda: len(self.idle._waiting) > before)

    def notify(self) -> None:
        """Notifies, and waits until a thread has gone on, if one waits."""
        expected = len(self.went_on) + bool(self.idle._waiting)
        with self.lock:
            self.idle.notify()
        self.until(lambda: len(self.went_on) == expected)

    def until(self, is_so: Callable[[], bool]) -> None:
        """Waits for other threads."""
        deadline_s = time.monotonic() + 10.0
        while not is_so():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)

    def end(self) -> None:
        """Lets all threads go on."""
        with self.lock:
            self.idle.notify_all()
        for thread in self._threads:
            thread.join(10)

    def _wait(self, name: str, timeout_s: float | None) -> None:
        with self.lock:
            self.idle.wait(timeout_s)
            self.went_on.append(name)


@pytest.fixture
def waiters() -> Iterator[Waiters]:
    waiters = Waiters()
    yield waiters
    waiters.end()


def test_the_thread_that_waits_since_last_goes_on_first(waiters: Waiters) -> None:
    for name in ("first", "second", "third"):
        waiters.start(name)
    for _ in range(3):
        waiters.notify()

    assert waiters.went_on == ["third", "second", "first"]


def test_a_thread_whose_time_is_over_is_not_woken_in_place_of_another(waiters: Waiters) -> None:
    waiters.start("patient")
    waiters.start("hasty", timeout_s=0.02)
    waiters.until(lambda: waiters.went_on == ["hasty"])
    waiters.notify()

    assert waiters.went_on == ["hasty", "patient"]


def test_nobody_waits_and_a_notification_is_lost_as_with_any_condition(waiters: Waiters) -> None:
    waiters.notify()
    waiters.start("later")

    assert waiters.went_on == []


def test_all_go_on_at_the_end(waiters: Waiters) -> None:
    for name in ("first", "second"):
        waiters.start(name)
    waiters.end()

    assert sorted(waiters.went_on) == ["first", "second"]


def test_a_thread_holds_the_lock_when_it_goes_on() -> None:
    lock = threading.Lock()
    with lock:
        IdleThreads(lock).wait(0.0)

        assert lock.locked()
