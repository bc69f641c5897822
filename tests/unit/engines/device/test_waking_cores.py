"""The cores on which device threads and the event loop wake, while each other core has a thread that computes."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from engines.affinity import usable_cores
from engines.device.cores import WakingCores, current_core, keep_thread_to, waking_cores
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource

needs_affinity = pytest.mark.skipif(current_core() is None, reason="the system binds no threads to cores")


class Affinity:
    """Records which thread was given which cores: by the thread's id, 0 for the one that calls, which is named."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | int, list[int]]] = []

    def keep_to(self, thread_id: int, cores: Collection[int]) -> None:
        """Records the call."""
        self.calls.append((thread_id or threading.current_thread().name, sorted(cores)))


@pytest.fixture
def affinity() -> Affinity:
    return Affinity()


@pytest.fixture
def pair(affinity: Affinity) -> Iterator[DeviceScheduler]:
    """A scheduler with two threads on cores 0 and 1, whose threads are all found on core 1."""
    cores = WakingCores([0, 1], lambda: 1, affinity.keep_to)
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
    cores = WakingCores([3, 5], lambda: 5, affinity.keep_to)
    cores.stay()
    cores.roam()

    assert affinity.calls == [("MainThread", [5]), ("MainThread", [3, 5])]


def test_a_thread_that_is_woken_here_may_roam_although_waking_it_fails(affinity: Affinity) -> None:
    cores = WakingCores([3, 5], lambda: 5, affinity.keep_to)

    with pytest.raises(ValueError, match="closed"), cores.waking_here(77):
        raise ValueError("closed")

    assert affinity.calls == [(77, [5]), (77, [3, 5])]


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
