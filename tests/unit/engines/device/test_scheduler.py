"""The device scheduler: its threads, shares that are fair in time, and the use of idle cores."""

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from engines.device import scheduler as scheduler_module
from engines.device.health import DeviceHealth
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource, TaskLog


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler("test")
    yield scheduler
    scheduler.close()


async def test_a_call_runs_on_the_scheduler_and_its_result_comes_back(scheduler: DeviceScheduler) -> None:
    name = await scheduler.call(lambda: threading.current_thread().name)

    assert name == "device-test"


async def test_what_a_call_raises_is_raised_where_it_is_awaited(scheduler: DeviceScheduler) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await scheduler.call(fail)

    assert await scheduler.call(lambda: 1) == 1


async def test_a_call_that_finds_the_device_lost_makes_it_unhealthy(scheduler: DeviceScheduler) -> None:
    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    before = scheduler.health()
    with pytest.raises(torch.AcceleratorError):
        await scheduler.call(fail)
    scheduler.report_error(torch.AcceleratorError("CUDA error: device-side assert triggered"))

    assert (before.loss, scheduler.health().loss) == ("", "unspecified launch failure")


async def test_a_thread_that_waits_holds_nothing_of_its_last_task(scheduler: DeviceScheduler) -> None:
    """The memory of a model whose check was the last task must be freed."""

    class Model:
        def check(self) -> None:
            pass

    model, is_gone = Model(), threading.Event()
    weakref.finalize(model, is_gone.set)

    await scheduler.call(model.check)
    del model

    assert await asyncio.to_thread(is_gone.wait, 5)


async def test_a_task_that_raises_does_not_end_the_scheduler(scheduler: DeviceScheduler) -> None:
    def fail() -> None:
        raise ValueError("a bug of the source")

    source = ScriptedSource(1, fail)
    scheduler.attach(source)
    scheduler.notify()

    assert await scheduler.call(lambda: 2) == 2
    assert scheduler.is_alive


def test_the_engine_that_used_less_time_goes_next() -> None:
    tasks = TaskLog(num_tasks=10)
    slow, quick = ScriptedSource(2, tasks.task("slow", 4.0)), ScriptedSource(8, tasks.task("quick", 1.0))

    order = tasks.run(slow, quick)

    assert order == ["slow", "quick", "quick", "quick", "quick", "slow", "quick", "quick", "quick", "quick"]


def test_an_engine_that_was_idle_starts_level_and_cannot_hoard_time() -> None:
    tasks = TaskLog(num_tasks=7)
    late = ScriptedSource(0, tasks.task("late", 1.0))
    busy = ScriptedSource(4, tasks.task("busy", 1.0))
    work = busy.work

    def work_and_wake() -> None:
        work()
        if tasks.order == ["busy", "busy"]:
            late.left = 3

    busy.work = work_and_wake

    order = tasks.run(busy, late)

    # With the credit of its idle time, all three of its tasks would come at once.
    assert order == ["busy", "busy", "late", "busy", "late", "busy", "late"]


async def test_detaching_waits_for_the_task_that_runs(scheduler: DeviceScheduler) -> None:
    began, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait()
        ended.set()

    source = ScriptedSource(1, work)
    scheduler.attach(source)
    scheduler.notify()
    await asyncio.to_thread(began.wait)
    detaching = asyncio.create_task(asyncio.to_thread(scheduler.detach, source))
    await asyncio.sleep(0.01)
    assert not detaching.done()
    gate.set()
    await detaching

    assert ended.is_set()


async def test_a_detached_source_gets_no_task(scheduler: DeviceScheduler) -> None:
    source = ScriptedSource(3, lambda: None)
    scheduler.attach(source)
    scheduler.detach(source)
    scheduler.notify()
    await scheduler.call(lambda: None)

    assert source.left == 3


async def test_the_scheduler_reports_how_long_its_task_has_been_running(scheduler: DeviceScheduler) -> None:
    def measure() -> float:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        return scheduler.health().task_s

    assert await scheduler.call(measure) >= 0.01


def test_a_closed_scheduler_has_no_thread() -> None:
    scheduler = DeviceScheduler("short")

    scheduler.close()

    assert not scheduler.is_alive


def test_the_thread_is_prepared_before_its_first_task() -> None:
    seen: list[str] = []
    scheduler = DeviceScheduler("prepared", lambda: seen.append(threading.current_thread().name))
    scheduler.close()

    assert seen == ["device-prepared"]


async def test_the_health_tells_how_long_the_present_task_has_been_running() -> None:
    now_s = 0.0
    scheduler = DeviceScheduler("test", clock=lambda: now_s)
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    scheduler.attach(ScriptedSource(1, hang))
    idle = scheduler.health()
    scheduler.notify()
    await asyncio.to_thread(begun.wait)
    now_s = 7.0
    busy = scheduler.health()
    gate.set()
    await asyncio.to_thread(scheduler.close)

    assert idle == DeviceHealth(is_alive=True, task_s=0.0)
    assert busy == DeviceHealth(is_alive=True, task_s=7.0, is_check=False)
    assert scheduler.health() == DeviceHealth(is_alive=True, task_s=0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_scheduler_that_cannot_prepare_its_thread_is_dead() -> None:
    def fail() -> None:
        raise RuntimeError("no such device")

    scheduler = DeviceScheduler("test", fail)
    await asyncio.to_thread(scheduler._threads[0].join)

    assert scheduler.health() == DeviceHealth(is_alive=False)


async def test_a_task_that_hangs_does_not_keep_the_scheduler_from_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_JOIN_TIMEOUT_S", 0.01)
    scheduler = DeviceScheduler("test")
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    scheduler.attach(ScriptedSource(1, hang))
    scheduler.notify()
    await asyncio.to_thread(begun.wait)
    scheduler.close()

    (thread,) = scheduler._threads
    assert thread.is_alive()
    gate.set()
    thread.join(5)
    assert not thread.is_alive()


# ---- several threads ----


class Gated:
    """Work that signals when it has begun, and waits until a test lets it end."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def __call__(self) -> None:
        self.begun.release()
        assert self.gate.acquire(timeout=10)

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=10)

    def end(self, count: int = 1) -> None:
        self.gate.release(count)


@pytest.fixture
def pair() -> Iterator[DeviceScheduler]:
    """A scheduler with two threads."""
    scheduler = DeviceScheduler("pair", num_threads=2, check_interval_s=0.0)
    yield scheduler
    scheduler.close()


def test_a_source_that_comes_with_work_needs_no_wake(pair: DeviceScheduler) -> None:
    work = Gated()
    pair.attach(ScriptedSource(1, work))

    work.wait()
    work.end()


def test_two_tasks_of_one_source_run_at_once_where_it_allows_that(pair: DeviceScheduler) -> None:
    work = Gated()
    pair.attach(ScriptedSource(2, work, max_tasks=2))

    pair.notify()
    work.wait(2)
    work.end(2)


def test_a_source_that_allows_one_task_gets_one_though_a_thread_is_free(pair: DeviceScheduler) -> None:
    work, other = Gated(), Gated()
    alone = ScriptedSource(2, work, max_tasks=1)
    pair.attach(alone)
    pair.attach(ScriptedSource(1, other))
    pair.notify()
    work.wait()
    other.wait()

    assert alone.left == 1
    work.end(2)
    other.end()
    work.wait()
    assert alone.left == 0


def test_a_source_is_told_how_many_threads_are_idle(pair: DeviceScheduler) -> None:
    work = Gated()
    source = ScriptedSource(1, work, max_tasks=2)
    pair.attach(source)
    pair.notify()
    work.wait()
    source.left = 1
    pair.notify()
    work.wait()
    work.end(2)

    assert source.free == [1, 0]


def test_a_wide_task_uses_the_cores_of_idle_threads_until_they_find_work() -> None:
    cores: dict[str, list[int]] = {}
    scheduler = DeviceScheduler(
        "cores",
        num_threads=2,
        check_interval_s=0.0,
        use_cores=lambda number: cores.setdefault(threading.current_thread().name, []).append(number),
    )
    second, ended = Gated(), threading.Event()

    def wide() -> None:
        name = threading.current_thread().name
        alone = list(cores[name])
        scheduler.attach(ScriptedSource(1, second))
        scheduler.notify()
        second.wait()
        scheduler.preemption_point()
        cores["seen"] = [*alone, -1, *cores[name]]
        second.end()
        ended.set()

    scheduler.attach(ScriptedSource(1, wide, uses_idle_cores=True))
    scheduler.notify()
    assert ended.wait(10)
    scheduler.close()

    assert cores["seen"] == [2, -1, 2, 1]


def test_a_task_that_begins_narrow_is_wide_from_its_first_preemption_point_on() -> None:
    cores, seen = [1], list[int]()
    scheduler = DeviceScheduler("cores", num_threads=2, use_cores=cores.append)
    while scheduler._num_free < 2:
        time.sleep(0.001)
    ended = threading.Event()

    def work() -> None:
        seen.append(cores[-1])
        scheduler.preemption_point()
        seen.append(cores[-1])
        ended.set()

    scheduler.attach(ScriptedSource(1, work, uses_idle_cores=True, begins_wide=False))
    assert ended.wait(10)
    scheduler.close()

    assert seen == [1, 2]


def test_a_wide_task_leaves_a_woken_thread_its_core() -> None:
    """The woken thread has work at once, and both would share its core for the first layers."""
    cores: list[int] = []
    scheduler = DeviceScheduler("cores", num_threads=2, use_cores=cores.append)
    while scheduler._num_free < 2:
        time.sleep(0.001)
    work = Gated()
    scheduler.attach(ScriptedSource(2, work, max_tasks=2, uses_idle_cores=True))
    work.wait(2)
    work.end(2)
    scheduler.close()

    assert cores[:2] == [1, 1]


def test_a_thread_that_was_woken_twice_is_idle_again_after_its_task() -> None:
    """A short task may end and wake again before the other thread is awake, whose core must not stay busy."""
    cores, seen = dict[str, int](), list[int]()
    scheduler = DeviceScheduler(
        "cores",
        num_threads=2,
        check_interval_s=0.0,
        use_cores=lambda number: cores.update({threading.current_thread().name: number}),
    )
    short, ended = ScriptedSource(0, lambda: None), threading.Event()

    def wide() -> None:
        short.left = 1
        with scheduler._lock:
            scheduler._wake_another()
            scheduler._wake_another()
        while short.left or not scheduler._num_free:
            time.sleep(0.001)
        scheduler.preemption_point()
        seen.append(cores[threading.current_thread().name])
        ended.set()

    scheduler.attach(short)
    while scheduler._num_free < 2:
        time.sleep(0.001)
    scheduler.attach(ScriptedSource(1, wide, uses_idle_cores=True))
    assert ended.wait(10)
    scheduler.close()

    assert seen == [2]


def test_a_task_that_is_not_wide_keeps_to_its_core() -> None:
    cores: list[int] = []
    scheduler = DeviceScheduler("cores", num_threads=2, use_cores=cores.append)
    ended = threading.Event()
    scheduler.attach(ScriptedSource(1, ended.set))
    scheduler.notify()
    assert ended.wait(10)
    scheduler.close()

    assert cores == [1]


def test_detaching_waits_for_the_tasks_of_all_threads(pair: DeviceScheduler) -> None:
    work = Gated()
    source = ScriptedSource(2, work, max_tasks=2)
    pair.attach(source)
    pair.notify()
    work.wait(2)
    detaching = threading.Thread(target=pair.detach, args=(source,))
    detaching.start()
    work.end()
    detaching.join(0.05)
    assert detaching.is_alive()
    work.end()
    detaching.join(10)

    assert not detaching.is_alive()


def test_the_health_is_that_of_the_thread_nearest_to_its_limit() -> None:
    now_s = 0.0
    scheduler = DeviceScheduler("pair", clock=lambda: now_s, num_threads=2)
    first, second = Gated(), Gated()
    scheduler.attach(ScriptedSource(1, first))
    scheduler.notify()
    first.wait()
    now_s = 5.0
    scheduler.attach(ScriptedSource(1, second))
    scheduler.notify()
    second.wait()
    now_s = 7.0

    assert scheduler.health() == DeviceHealth(task_s=7.0)
    first.end()
    second.end()
    scheduler.close()


def test_a_source_whose_only_work_runs_is_not_idle_and_keeps_its_used_time() -> None:
    """Otherwise a closed loop, with nothing queued while its batch runs, would start level after each batch."""
    tasks = TaskLog(num_tasks=5)
    heavy, light = ScriptedSource(1, lambda: None), ScriptedSource(0, tasks.task("light", 1.0))

    def run() -> None:
        tasks.task("heavy", 4.0)()
        heavy.left = 1 if tasks.order.count("heavy") < 2 else 0
        light.left = 3 if tasks.order == ["heavy"] else light.left

    heavy.work = run

    assert tasks.run(heavy, light) == ["heavy", "light", "light", "light", "heavy"]


@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
def test_other_work_waits_for_a_short_task_and_not_for_a_long_one(scheduler: DeviceScheduler, is_long: bool) -> None:
    runs, may_end = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        may_end.wait(10)

    scheduler.attach(ScriptedSource(1, work, is_long=is_long))
    scheduler.notify()
    runs.wait(10)
    passed = threading.Event()

    def wait() -> None:
        scheduler.wait_for_short_tasks(10)
        passed.set()

    other = threading.Thread(target=wait)
    other.start()

    assert passed.wait(10 if is_long else 0.05) is is_long
    may_end.set()
    assert passed.wait(10)
    other.join()


def test_other_work_waits_no_longer_than_it_may(scheduler: DeviceScheduler) -> None:
    runs, may_end = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        may_end.wait(10)

    scheduler.attach(ScriptedSource(1, work))
    scheduler.notify()
    runs.wait(10)

    scheduler.wait_for_short_tasks(0.001)

    may_end.set()
