"""Flex threads keep to cores of their own, and leave those that other processes keep busy."""

import os
import threading
from collections.abc import Collection

import pytest

from engines.affinity import usable_cores
from engines.device.cores import CorePin, keep_to, leave_cores_to_others


class Affinity:
    """Keeps the cores of a thread, and records which it was given."""

    def __init__(self, *cores: int) -> None:
        self.calls: list[list[int]] = []
        self.cores = frozenset(cores)

    def keep_to(self, cores: Collection[int]) -> None:
        """Records the call."""
        self.calls.append(sorted(cores))
        self.cores = frozenset(cores)

    def cores_of(self, _: int) -> frozenset[int]:
        """Returns those that it has."""
        return self.cores


@pytest.mark.parametrize(("place", "core"), [(0, 2), (1, 5), (2, 7), (3, 2)])
def test_threads_keep_to_one_core_each_in_turn(place: int, core: int) -> None:
    affinity = Affinity(5, 2, 7)
    CorePin(place, [5, 2, 7], affinity.keep_to, affinity.cores_of)

    assert affinity.calls == [[core]]


@pytest.mark.parametrize("cores", [[], [3]])
def test_nothing_is_set_where_there_is_no_choice(cores: list[int]) -> None:
    affinity = Affinity(*cores)
    pin = CorePin(0, cores, affinity.keep_to, affinity.cores_of)
    pin.on_work(10.0, 0.0, now_s=10.0)

    assert affinity.calls == []


def test_a_core_that_others_keep_busy_is_left_and_tried_again_later() -> None:
    affinity = Affinity(0, 1)
    pin = CorePin(1, [0, 1], affinity.keep_to, affinity.cores_of)
    pin.on_work(1.0, 0.05, now_s=1.0)
    pin.on_work(1.0, 0.9, now_s=5.9)
    before = list(affinity.calls)
    pin.on_work(0.1, 0.1, now_s=6.1)

    assert (before, affinity.calls) == ([[1], [0, 1]], [[1], [0, 1], [1]])


def test_cores_that_the_operator_sets_stay_as_they_are() -> None:
    affinity = Affinity(0, 1)
    pin = CorePin(1, [0, 1], affinity.keep_to, affinity.cores_of)
    affinity.cores = frozenset((0,))
    for now_s in (1.0, 6.1, 7.0, 13.0):
        pin.on_work(1.0, 0.05, now_s=now_s)

    assert (affinity.calls, affinity.cores) == ([[1]], frozenset((0,)))


def test_a_thread_that_is_interrupted_briefly_stays_on_its_core() -> None:
    affinity = Affinity(0, 1)
    pin = CorePin(0, [0, 1], affinity.keep_to, affinity.cores_of)
    for index in range(100):
        pin.on_work(0.1, 0.02 if index % 4 == 0 else 0.1, now_s=0.1 * index)

    assert affinity.calls == [[0]]


def test_the_share_of_a_core_is_judged_anew_in_each_window() -> None:
    affinity = Affinity(0, 1)
    pin = CorePin(0, [0, 1], affinity.keep_to, affinity.cores_of)
    for index in range(50):
        pin.on_work(0.1, 0.1, now_s=0.1 * index)
    pin.on_work(0.6, 0.1, now_s=6.0)

    assert affinity.calls == [[0], [0, 1]]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the policy SCHED_IDLE is Linux's")
def test_the_operating_system_takes_the_policy_and_the_core_of_one_thread_only() -> None:
    found: list[tuple[int, list[int]]] = []

    def work() -> None:
        leave_cores_to_others()
        keep_to(usable_cores()[:1])
        found.append((os.sched_getscheduler(0), usable_cores()))

    mine = usable_cores()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert found == [(os.SCHED_IDLE, mine[:1])]
    assert (os.sched_getscheduler(0), usable_cores()) == (os.SCHED_OTHER, mine)


def test_a_core_that_does_not_exist_changes_nothing() -> None:
    before = usable_cores()
    keep_to([10_000])

    assert usable_cores() == before
