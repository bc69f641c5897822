"""Breaks: a load waits for who is served, and not for ever. On a clock that tests set."""

import threading

import pytest
import torch

from engines.device.load_throttle import LoadThrottle, throttle_point, throttled_load


class Yard:
    """Time, and somebody who is served for so many seconds at each look."""

    def __init__(self, served_s: float) -> None:
        self.now_s = 0.0
        self.served_s = served_s
        self.allowed: list[float] = []
        self.breaks = LoadThrottle(self.let_pass, lambda: self.now_s)

    def let_pass(self, timeout_s: float) -> None:
        self.allowed.append(timeout_s)
        self.now_s += min(self.served_s, timeout_s)

    def work(self, seconds: float) -> None:
        self.now_s += seconds
        self.breaks.pause_if_busy()


def test_a_part_that_took_no_time_is_no_reason_to_look() -> None:
    yard = Yard(served_s=1.0)

    yard.work(0.0001)

    assert yard.allowed == []


def test_a_load_beside_an_idle_lane_loses_nothing() -> None:
    yard = Yard(served_s=0.0)

    for _ in range(100):
        yard.work(0.01)

    assert yard.now_s == pytest.approx(1.0)


def test_a_load_beside_a_lane_that_is_never_idle_takes_twice_its_time_and_half_a_second() -> None:
    yard = Yard(served_s=60.0)

    for _ in range(100):
        yard.work(0.01)

    assert yard.now_s == pytest.approx(2 * 1.0 + 0.5)


def test_every_module_and_every_tensor_that_the_thread_puts_in_place_ends_a_part() -> None:
    yard = Yard(served_s=0.0)
    yard.breaks.pause_if_busy = lambda: yard.allowed.append(0.0)  # type: ignore[method-assign]  # every part counts here

    with throttled_load(yard.breaks):
        torch.nn.Sequential(torch.nn.Linear(2, 2))
        other = threading.Thread(target=lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)))
        other.start()
        other.join()
    torch.nn.Sequential(torch.nn.Linear(2, 2))
    throttle_point()

    assert len(yard.allowed) == 3  # a module, its weight and its bias; nothing of the other thread, nothing after
