"""The load throttle: a load waits for short tasks, but not for ever. On a fake clock."""

import threading

import pytest
import torch

from engines.device.load_throttle import LoadThrottle, is_serving, throttle_point, throttled_load


class ThrottledLoad:
    """A load on a fake clock, which finds at each check a short task that runs for `busy_s`.

    Attributes:
        timeouts: the longest wait allowed at each check, in seconds.
    """

    def __init__(self, busy_s: float) -> None:
        self.now_s = 0.0
        self.busy_s = busy_s
        self.timeouts: list[float] = []
        self.throttle = LoadThrottle(self.wait_for_short_tasks, lambda: self.now_s)

    def wait_for_short_tasks(self, timeout_s: float) -> bool:
        self.timeouts.append(timeout_s)
        self.now_s += min(self.busy_s, timeout_s)
        return self.busy_s <= timeout_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds
        self.throttle.pause_if_busy()


def test_a_step_that_took_no_time_is_not_followed_by_a_check() -> None:
    load = ThrottledLoad(busy_s=1.0)

    load.work(0.0001)

    assert load.timeouts == []


def test_a_load_beside_an_idle_device_loses_no_time() -> None:
    load = ThrottledLoad(busy_s=0.0)

    for _ in range(100):
        load.work(0.01)

    assert load.now_s == pytest.approx(1.0)


def test_a_load_beside_a_device_that_is_never_idle_takes_twice_its_time_and_half_a_second() -> None:
    load = ThrottledLoad(busy_s=60.0)

    for _ in range(100):
        load.work(0.01)

    assert load.now_s == pytest.approx(2 * 1.0 + 0.5)


def test_every_module_and_every_tensor_that_the_thread_puts_in_place_is_a_throttle_point() -> None:
    load = ThrottledLoad(busy_s=0.0)
    load.throttle.pause_if_busy = lambda: load.timeouts.append(0.0)  # type: ignore[method-assign]  # every step counts here

    with throttled_load(load.throttle):
        torch.nn.Sequential(torch.nn.Linear(2, 2))
        other = threading.Thread(target=lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)))
        other.start()
        other.join()
    torch.nn.Sequential(torch.nn.Linear(2, 2))
    throttle_point()

    assert len(load.timeouts) == 3  # a module, its weight and its bias; nothing of the other thread, nothing after


def test_a_load_knows_whether_a_short_task_runs_beside_it() -> None:
    assert not is_serving(), "nothing is loaded on this thread"
    for busy_s in (0.0, 1.0):
        with throttled_load(ThrottledLoad(busy_s).throttle):
            assert is_serving() == (busy_s > 0)
