"""The cores on which device threads and the event loop wake, while each other core has a thread that computes."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from engines.affinity import usable_cores
from engines.device.cores import WakingCores, cores_of_thread, current_core, keep_thread_to, waking_cores
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource

needs_affinity = pytest.mark.skipif(current_core() is None, reason="the system binds no threads to cores")


class Affinity:
    """Keeps the cores of threads, and records which thread was given which: by its id, 0 for the one that calls, which
    is named."""

    def __init__(self, *cores: int) -> None:
        self.calls: list[tuple[str | int, list[int]]] = []
        self.cores = cores
        self.of_thread: dict[int, frozenset[int]] = {}

    def keep_to(self, thread_id: int, cores: Collection[int]) -> None:
        """Records the call."""
        self.calls.append((thread_id or threading.current_thread().name, sorted(cores)))
        self.of_thread[thread_id or threading.get_native_id()] = frozenset(cores)

    def cores_of(self, thread_id: int) -> frozenset[int]:
        """Returns what a thread was given last, and at first all."""
        return self.of_thread.get(thread_id or threading.get_native_id(), frozenset(self.cores))

    def taskset(self, *cores: int, threads: Collection[int] = ()) -> None:
        """Gives threads other cores, as an operator does; all of them where none are named."""
        self.cores = self.cores if threads else cores
        for thread in threads or [*self.of_thread, threading.get_native_id()]:
            self.of_thread[thread] = frozenset(cores)


@pytest.fixture
def affinity() -> Affinity:
    return Affinity(0, 1)


@pytest.fixture
def pair(affinity: Affinity) -> Iterator[DeviceScheduler]:
    """A scheduler with two threads on cores 0 and 1, whose threads are all found on core 1."""
    cores = WakingCores([0, 1], lambda: 1, affinity.keep_to, affinity.cores_of)
    scheduler = DeviceScheduler("pair", num_threads=2, check_interval_s=0.0, waking_cores=cores)
    wait_until(lambda: scheduler._num_free == 2)
    affinity.calls.clear()
    yield scheduler
    scheduler.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for other threads."""
    deadline_s = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_a_thread_wakes_where_it_waits_and_then_roams(affinity: Affinity) -> None:
    cores = on_core_1(affinity)
    cores.stay()
    cores.roam()

    assert affinity.calls == [("MainThread", [1]), ("MainThread", [0, 1])]


def test_a_thread_that_is_woken_here_may_roam_although_waking_it_fails(affinity: Affinity) -> None:
    cores = on_core_1(affinity)

    with pytest.raises(ValueError, match="closed"), cores.waking_here(LOOP):
        raise ValueError("closed")

    assert affinity.calls == [(LOOP, [1]), (LOOP, [0, 1])]


LOOP = 77
"""The id of the thread of a loop."""


def on_core_1(affinity: Affinity) -> WakingCores:
    """Where the calling thread runs on core 1."""
    return WakingCores([0, 1], lambda: 1, affinity.keep_to, affinity.cores_of)


def wake_and_wait(cores: WakingCores) -> None:
    """Wakes the loop once, and waits once."""
    with cores.waking_here(LOOP):
        pass
    cores.stay()
    cores.roam()


@pytest.mark.parametrize("core", [0, 1])
def test_cores_that_the_operator_sets_stay_as_they_are(affinity: Affinity, core: int) -> None:
    cores = on_core_1(affinity)
    wake_and_wait(cores)
    affinity.taskset(core)
    affinity.calls.clear()
    wake_and_wait(cores)

    assert affinity.calls == []
    assert affinity.cores_of(LOOP) == affinity.cores_of(0) == {core}


@pytest.mark.parametrize("core", [0, 1])
def test_cores_that_are_set_while_a_thread_waits_are_kept(affinity: Affinity, core: int) -> None:
    cores = on_core_1(affinity)
    wake_and_wait(cores)
    cores.stay()
    affinity.taskset(core)
    cores.roam()

    assert affinity.cores_of(LOOP) == affinity.cores_of(0) == {core}


@pytest.mark.parametrize("core", [0, 1])
def test_cores_that_are_set_while_the_loop_wakes_are_kept(affinity: Affinity, core: int) -> None:
    cores = on_core_1(affinity)
    with cores.waking_here(LOOP):
        affinity.taskset(core)

    assert affinity.cores_of(LOOP) == {core}


def test_device_threads_follow_a_loop_that_alone_was_given_other_cores(affinity: Affinity) -> None:
    cores = on_core_1(affinity)
    wake_and_wait(cores)
    affinity.taskset(0, threads=[LOOP])
    wake_and_wait(cores)

    assert affinity.cores_of(LOOP) == affinity.cores_of(0) == {0}


def test_threads_wake_on_named_cores_again_once_they_have_both(affinity: Affinity) -> None:
    cores = on_core_1(affinity)
    for given in ((0,), (0, 1)):
        affinity.taskset(*given)
        affinity.calls.clear()
        wake_and_wait(cores)

    assert [of for _, of in affinity.calls] == [[1], [0, 1], [1], [0, 1]]


def test_two_threads_that_wake_the_loop_at_once_give_it_back_its_cores(affinity: Affinity) -> None:
    places = iter((0, 1))
    cores = WakingCores([0, 1], lambda: next(places), affinity.keep_to, affinity.cores_of)
    with cores.waking_here(LOOP), cores.waking_here(LOOP):
        assert affinity.cores_of(LOOP) == {1}

    assert affinity.cores_of(LOOP) == {0, 1}


def test_a_thread_whose_cores_cannot_be_read_is_left_alone(affinity: Affinity) -> None:
    cores = WakingCores([0, 1], lambda: 1, affinity.keep_to, lambda _: frozenset())
    cores.stay()
    cores.roam()

    assert affinity.calls == []


def test_a_device_thread_waits_on_its_core_while_all_others_work(pair: DeviceScheduler, affinity: Affinity) -> None:
    gate, short, woken = threading.Event(), threading.Event(), threading.Event()
    pair.attach(ScriptedSource(1, lambda: assert_within(gate)))
    wait_until(lambda: pair._num_free == 1)
    pair.attach(ScriptedSource(1, short.set))
    wait_until(lambda: short.is_set() and pair._num_free == 1 and affinity.calls[-1][1] == [1])
    waiting = affinity.calls[-1]
    pair.attach(ScriptedSource(1, woken.set))
    wait_until(woken.is_set)
    after = affinity.calls[affinity.calls.index(waiting) + 1]
    gate.set()

    assert (waiting[1], after) == ([1], (waiting[0], [0, 1]))


def test_threads_that_wait_together_are_not_bound(pair: DeviceScheduler, affinity: Affinity) -> None:
    ended = threading.Event()
    pair.attach(ScriptedSource(1, ended.set))
    wait_until(lambda: ended.is_set() and pair._num_free == 2)

    assert [1] not in [cores for _, cores in affinity.calls]


async def test_the_loop_wakes_on_the_core_of_a_task_that_ends_while_all_threads_work(
    pair: DeviceScheduler, affinity: Affinity
) -> None:
    loop, both, came = asyncio.get_running_loop(), threading.Barrier(2), asyncio.Event()

    def end() -> None:
        both.wait(10)  # both threads work
        pair.post(loop, came.set)
        both.wait(10)

    await pair.call(lambda: None)
    await asyncio.to_thread(wait_until, lambda: pair._num_free == 2)
    affinity.calls.clear()
    pair.attach(ScriptedSource(2, end, max_tasks=2))
    pair.notify()
    await came.wait()
    await asyncio.to_thread(wait_until, lambda: pair._num_free == 2)

    of_loop = [cores for thread, cores in affinity.calls if thread == threading.get_native_id()]
    assert sorted(of_loop) == [[0, 1], [0, 1], [1], [1]]


async def test_the_loop_wakes_anywhere_while_a_device_thread_is_idle(pair: DeviceScheduler, affinity: Affinity) -> None:
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    await pair.call(lambda: pair.post(loop, came.set))
    await came.wait()

    assert threading.get_native_id() not in [thread for thread, _ in affinity.calls]


def test_a_loop_whose_thread_is_not_known_is_only_told(pair: DeviceScheduler, affinity: Affinity) -> None:
    """The id of a thread that has ended may belong to another by then."""
    loop, told = asyncio.new_event_loop(), list[str]()
    loop.run_until_complete(pair.call(lambda: None))
    wait_until(lambda: pair._num_free == 2)
    affinity.calls.clear()
    both = threading.Barrier(2)

    def end() -> None:
        both.wait(10)
        pair.post(loop, told.append, "after its thread has left it")
        both.wait(10)

    source = ScriptedSource(2, end, max_tasks=2)
    pair.attach(source)
    pair.notify()
    wait_until(lambda: not source.left)
    wait_until(lambda: pair._num_free == 2)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()

    assert told == ["after its thread has left it"] * 2
    assert threading.get_native_id() not in [thread for thread, _ in affinity.calls]


def assert_within(gate: threading.Event) -> None:
    """Waits for a test to let the task end."""
    assert gate.wait(10)


@needs_affinity
def test_the_operating_system_binds_the_thread_that_is_named_and_no_other() -> None:
    ids, gate, mine = list[int](), threading.Event(), usable_cores()

    def work() -> None:
        ids.append(threading.get_native_id())
        gate.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: bool(ids))
    keep_thread_to(ids[0], mine[:1])
    bound = sorted(os.sched_getaffinity(ids[0]))
    gate.set()
    thread.join()

    assert (bound, usable_cores()) == (mine[:1], mine)


@needs_affinity
def test_cores_are_named_only_where_each_has_a_device_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.device.cores.usable_cores", lambda: [0, 1])

    assert waking_cores(2) is not None
    assert [waking_cores(1), waking_cores(3)] == [None, None]


@needs_affinity
def test_one_core_leaves_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.device.cores.usable_cores", lambda: [0])

    assert waking_cores(1) is None


@needs_affinity
def test_the_cores_of_a_thread_are_those_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(cores_of_thread(0)) == usable_cores()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores_of_thread(0) == frozenset()
