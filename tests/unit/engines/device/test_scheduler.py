"""The lane: its threads, turns fair in time, and the cores that nobody else uses."""

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from engines.device import scheduler as device
from engines.device.health import DeviceHealth
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource, TaskLog


@pytest.fixture
def lane() -> Iterator[DeviceScheduler]:
    lane = DeviceScheduler("test")
    yield lane
    lane.close()


async def test_a_call_runs_on_the_lane_and_its_result_comes_back(lane: DeviceScheduler) -> None:
    name = await lane.call(lambda: threading.current_thread().name)

    assert name == "lane-test"


async def test_what_a_call_raises_is_raised_where_it_is_awaited(lane: DeviceScheduler) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await lane.call(fail)

    assert await lane.call(lambda: 1) == 1


async def test_a_thread_that_waits_holds_nothing_of_its_last_turn(lane: DeviceScheduler) -> None:
    """A model whose check was the last turn must be free to leave."""

    class Model:
        def check(self) -> None:
            pass

    model, is_gone = Model(), threading.Event()
    weakref.finalize(model, is_gone.set)

    await lane.call(model.check)
    del model

    assert await asyncio.to_thread(is_gone.wait, 5)


async def test_a_turn_that_raises_does_not_end_the_lane(lane: DeviceScheduler) -> None:
    def fail() -> None:
        raise ValueError("a bug of the source")

    source = ScriptedSource(1, fail)
    lane.attach(source)
    lane.notify()

    assert await lane.call(lambda: 2) == 2
    assert lane.is_alive


def test_the_engine_that_used_less_time_goes_next() -> None:
    diary = TaskLog(num_turns=10)
    slow, quick = ScriptedSource(2, diary.turn("slow", 4.0)), ScriptedSource(8, diary.turn("quick", 1.0))

    order = diary.read(slow, quick)

    assert order == ["slow", "quick", "quick", "quick", "quick", "slow", "quick", "quick", "quick", "quick"]


def test_an_engine_that_was_idle_starts_level_and_cannot_hoard_time() -> None:
    diary = TaskLog(num_turns=7)
    late = ScriptedSource(0, diary.turn("late", 1.0))
    busy = ScriptedSource(4, diary.turn("busy", 1.0))
    work = busy.work

    def waking() -> None:
        work()
        if diary.order == ["busy", "busy"]:
            late.left = 3

    busy.work = waking

    order = diary.read(busy, late)

    # With the credit of its idle time, all three of its turns would come at once.
    assert order == ["busy", "busy", "late", "busy", "late", "busy", "late"]


async def test_detaching_waits_for_the_turn_that_runs(lane: DeviceScheduler) -> None:
    began, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait()
        ended.set()

    source = ScriptedSource(1, work)
    lane.attach(source)
    lane.notify()
    await asyncio.to_thread(began.wait)
    detaching = asyncio.create_task(asyncio.to_thread(lane.detach, source))
    await asyncio.sleep(0.01)
    assert not detaching.done()
    gate.set()
    await detaching

    assert ended.is_set()


async def test_a_detached_source_gets_no_turn(lane: DeviceScheduler) -> None:
    source = ScriptedSource(3, lambda: None)
    lane.attach(source)
    lane.detach(source)
    lane.notify()
    await lane.call(lambda: None)

    assert source.left == 3


async def test_the_lane_says_how_long_its_turn_has_been_running(lane: DeviceScheduler) -> None:
    def measure() -> float:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        return lane.health().task_s

    assert await lane.call(measure) >= 0.01


def test_a_closed_lane_has_no_thread() -> None:
    lane = DeviceScheduler("short")

    lane.close()

    assert not lane.is_alive


def test_the_thread_is_prepared_before_its_first_turn() -> None:
    seen: list[str] = []
    lane = DeviceScheduler("prepared", lambda: seen.append(threading.current_thread().name))
    lane.close()

    assert seen == ["lane-prepared"]


async def test_the_pulse_tells_how_long_the_present_turn_has_been_running() -> None:
    now_s = 0.0
    lane = DeviceScheduler("test", clock=lambda: now_s)
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    lane.attach(ScriptedSource(1, hang))
    idle = lane.health()
    lane.notify()
    await asyncio.to_thread(begun.wait)
    now_s = 7.0
    busy = lane.health()
    gate.set()
    await asyncio.to_thread(lane.close)

    assert idle == DeviceHealth(is_alive=True, task_s=0.0)
    assert busy == DeviceHealth(is_alive=True, task_s=7.0, is_check=False)
    assert lane.health() == DeviceHealth(is_alive=True, task_s=0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_lane_that_cannot_prepare_its_thread_is_dead() -> None:
    def fail() -> None:
        raise RuntimeError("no such device")

    lane = DeviceScheduler("test", fail)
    await asyncio.to_thread(lane._threads[0].join)

    assert lane.health() == DeviceHealth(is_alive=False)


async def test_a_turn_that_hangs_does_not_keep_the_lane_from_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_END_S", 0.01)
    lane = DeviceScheduler("test")
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    lane.attach(ScriptedSource(1, hang))
    lane.notify()
    await asyncio.to_thread(begun.wait)
    lane.close()

    (thread,) = lane._threads
    assert thread.is_alive()
    gate.set()
    thread.join(5)
    assert not thread.is_alive()


# ---- several threads ----


class Gated:
    """Work that says when it has begun, and waits until it may end."""

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
    """A lane of two threads; the number of cores that each is told goes to `used_cores`."""
    lane = DeviceScheduler("pair", num_threads=2, look_s=0.0)
    yield lane
    lane.close()


def test_a_source_that_comes_with_work_needs_no_wake(pair: DeviceScheduler) -> None:
    work = Gated()
    pair.attach(ScriptedSource(1, work))

    work.wait()
    work.end()


def test_two_turns_of_one_source_run_at_once_where_it_allows_that(pair: DeviceScheduler) -> None:
    work = Gated()
    pair.attach(ScriptedSource(2, work, max_turns=2))

    pair.notify()
    work.wait(2)
    work.end(2)


def test_a_source_that_allows_one_turn_gets_one_though_a_thread_is_free(pair: DeviceScheduler) -> None:
    work, other = Gated(), Gated()
    alone = ScriptedSource(2, work, max_turns=1)
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


def test_a_turn_is_told_how_many_threads_have_nothing_to_do(pair: DeviceScheduler) -> None:
    work = Gated()
    source = ScriptedSource(1, work, max_turns=2)
    pair.attach(source)
    pair.notify()
    work.wait()
    source.left = 1
    pair.notify()
    work.wait()
    work.end(2)

    assert source.free == [1, 0]


def test_a_wide_turn_uses_the_cores_of_the_idle_until_they_find_work() -> None:
    cores: dict[str, list[int]] = {}
    lane = DeviceScheduler(
        "cores",
        num_threads=2,
        look_s=0.0,
        use_cores=lambda number: cores.setdefault(threading.current_thread().name, []).append(number),
    )
    second, ended = Gated(), threading.Event()

    def wide() -> None:
        name = threading.current_thread().name
        alone = list(cores[name])
        lane.attach(ScriptedSource(1, second))
        lane.notify()
        second.wait()
        lane.preemption_point()
        cores["seen"] = [*alone, -1, *cores[name]]
        second.end()
        ended.set()

    lane.attach(ScriptedSource(1, wide, is_wide=True))
    lane.notify()
    assert ended.wait(10)
    lane.close()

    assert cores["seen"] == [2, -1, 2, 1]


def test_a_wide_turn_leaves_a_thread_that_is_called_its_core() -> None:
    """It has work at once, and would meet the neighbour on its core for the first layers."""
    cores: list[int] = []
    lane = DeviceScheduler("cores", num_threads=2, use_cores=cores.append)
    while lane._num_free < 2:
        time.sleep(0.001)
    work = Gated()
    lane.attach(ScriptedSource(2, work, max_turns=2, is_wide=True))
    work.wait(2)
    work.end(2)
    lane.close()

    assert cores[:2] == [1, 1]


def test_whoever_was_called_twice_is_idle_again_after_its_turn() -> None:
    """A short turn may end, and call again, before the neighbour is awake; its core must not count as busy for good."""
    cores, seen = dict[str, int](), list[int]()
    lane = DeviceScheduler(
        "cores",
        num_threads=2,
        look_s=0.0,
        use_cores=lambda number: cores.update({threading.current_thread().name: number}),
    )
    short, ended = ScriptedSource(0, lambda: None), threading.Event()

    def wide() -> None:
        short.left = 1
        with lane._lock:
            lane._pass_on()
            lane._pass_on()
        while short.left or not lane._num_free:
            time.sleep(0.001)
        lane.preemption_point()
        seen.append(cores[threading.current_thread().name])
        ended.set()

    lane.attach(short)
    while lane._num_free < 2:
        time.sleep(0.001)
    lane.attach(ScriptedSource(1, wide, is_wide=True))
    assert ended.wait(10)
    lane.close()

    assert seen == [2]


def test_a_turn_that_is_not_wide_keeps_to_its_core() -> None:
    cores: list[int] = []
    lane = DeviceScheduler("cores", num_threads=2, use_cores=cores.append)
    ended = threading.Event()
    lane.attach(ScriptedSource(1, ended.set))
    lane.notify()
    assert ended.wait(10)
    lane.close()

    assert cores == [1]


def test_detaching_waits_for_the_turns_of_all_threads(pair: DeviceScheduler) -> None:
    work = Gated()
    source = ScriptedSource(2, work, max_turns=2)
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


def test_the_pulse_is_that_of_the_thread_nearest_to_its_limit() -> None:
    now_s = 0.0
    lane = DeviceScheduler("pulse", clock=lambda: now_s, num_threads=2)
    first, second = Gated(), Gated()
    lane.attach(ScriptedSource(1, first))
    lane.notify()
    first.wait()
    now_s = 5.0
    lane.attach(ScriptedSource(1, second))
    lane.notify()
    second.wait()
    now_s = 7.0

    assert lane.health() == DeviceHealth(task_s=7.0)
    first.end()
    second.end()
    lane.close()


def test_a_source_whose_only_work_runs_is_not_idle_and_keeps_its_account() -> None:
    """Else a closed loop, which has nothing waiting while its batch runs, would start level after each of them."""
    diary = TaskLog(num_turns=5)
    heavy, light = ScriptedSource(1, lambda: None), ScriptedSource(0, diary.turn("light", 1.0))

    def run() -> None:
        diary.turn("heavy", 4.0)()
        heavy.left = 1 if diary.order.count("heavy") < 2 else 0
        light.left = 3 if diary.order == ["heavy"] else light.left

    heavy.work = run

    assert diary.read(heavy, light) == ["heavy", "light", "light", "light", "heavy"]


@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
def test_other_work_lets_a_short_turn_pass_and_does_not_wait_for_a_long_one(
    lane: DeviceScheduler, is_long: bool
) -> None:
    runs, may_end = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        may_end.wait(10)

    lane.attach(ScriptedSource(1, work, is_long=is_long))
    lane.notify()
    runs.wait(10)
    passed = threading.Event()

    def wait() -> None:
        lane.wait_for_short_tasks(10)
        passed.set()

    other = threading.Thread(target=wait)
    other.start()

    assert passed.wait(10 if is_long else 0.05) is is_long
    may_end.set()
    assert passed.wait(10)
    other.join()


def test_other_work_waits_no_longer_than_it_may(lane: DeviceScheduler) -> None:
    runs, may_end = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        may_end.wait(10)

    lane.attach(ScriptedSource(1, work))
    lane.notify()
    runs.wait(10)

    lane.wait_for_short_tasks(0.001)

    may_end.set()
