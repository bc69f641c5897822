"""Flex tasks: they run when nothing else does, give way between layers, and keep moving by a floor."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from engines.device.flex import FlexFloor, FlexWork
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource, TaskLog


class ScriptedFlexSource(ScriptedSource):
    """A source of flex tasks (`engines.device.flex.FlexSource`)."""

    is_exclusive = False
    must_finish = False


@contextmanager
def running(tasks: TaskLog, source: ScriptedSource, *flex: ScriptedFlexSource) -> Iterator[DeviceScheduler]:
    """Runs a scheduler of one thread; each flex source belongs to an engine of its own, the first to `source`."""
    scheduler = tasks.scheduler()
    try:
        owners = [source, *(ScriptedSource(0, lambda: None) for _ in flex[1:])]
        for owner, own in zip(owners, flex, strict=True):
            scheduler.attach(owner, own)
        yield scheduler
    finally:
        scheduler.close()


# ---- the floor ----


def test_the_floor_opens_once_a_slice_is_owed_and_closes_when_it_is_used() -> None:
    floor = FlexFloor(share=0.02, slice_s=0.05)
    floor.on_others(2.4)
    before = floor.is_open
    floor.on_others(0.1)
    opened = floor.is_open
    floor.on_flex(0.03)
    during = floor.is_open
    floor.on_flex(0.03)

    assert (before, opened, during, floor.is_open) == (False, True, True, False)


def test_under_steady_work_flex_tasks_have_their_share_of_the_seconds_and_no_more() -> None:
    floor, flex_s = FlexFloor(share=0.02, slice_s=0.05), 0.0
    for _ in range(100_000):
        floor.on_others(0.01)
        while floor.is_open:
            floor.on_flex(0.02)
            flex_s += 0.02

    assert flex_s / (1000 + flex_s) == pytest.approx(0.02, rel=0.01)


def test_a_slice_that_was_taken_in_vain_is_not_owed_again() -> None:
    floor = FlexFloor(share=0.02, slice_s=0.05)
    floor.on_others(1000.0)
    floor.close()
    floor.on_others(1.0)

    assert not floor.is_open


# ---- order ----


def test_flex_tasks_run_when_no_other_task_is_left() -> None:
    tasks = TaskLog(5)
    usual = ScriptedSource(3, tasks.task("usual", 0.001))
    flex = ScriptedFlexSource(2, tasks.task("flex", 0.001))
    with running(tasks, usual, flex) as scheduler:
        scheduler.notify()
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)

    assert tasks.order == ["usual"] * 3 + ["flex"] * 2


def test_a_flex_task_waits_between_its_layers_while_another_task_runs() -> None:
    tasks = TaskLog(4)
    usual = ScriptedSource(0, lambda: None)

    def other() -> None:
        tasks.task("usual", 0.001)()

    def flex_task() -> None:
        tasks.task("flex", 0.001)()
        usual.left = 2
        scheduler.notify()
        scheduler.preemption_point()
        tasks.task("flex", 0.001)()

    usual.work = other
    with running(tasks, usual, ScriptedFlexSource(1, flex_task)) as scheduler:
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)

    assert tasks.order == ["flex", "usual", "usual", "flex"]


def test_another_task_does_not_wait_for_the_layer_of_a_flex_task() -> None:
    """It has a thread of its own."""
    begun, is_over = threading.Event(), threading.Event()
    usual, tasks = ScriptedSource(0, is_over.set), TaskLog(1)
    met: list[bool] = []

    def layer() -> None:
        begun.set()
        met.append(is_over.wait(10))
        tasks.done.set()

    with running(tasks, usual, ScriptedFlexSource(1, layer)) as scheduler:
        scheduler.notify(is_flex=True)
        assert begun.wait(10)
        usual.left = 1
        scheduler.notify()
        assert tasks.done.wait(10)

    assert met == [True]


def test_flex_tasks_never_starve_under_steady_work() -> None:
    """Tasks of 0.5 s without end, and flex tasks of 0.05 s: one for each 2.5 s."""
    tasks = TaskLog(60)
    usual = ScriptedSource(10_000, lambda: None)
    flex = ScriptedFlexSource(10_000, tasks.task("flex", 0.06))
    usual.work = tasks.task("usual", 0.5)
    with running(tasks, usual, flex) as scheduler:
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(20)
        usual.left = flex.left = 0

    first = tasks.order[:60].index("flex")
    # 10 by the clock; a thread that the machine holds up takes its slice later.
    assert 5 <= tasks.order[:60].count("flex") <= 12
    assert 4 <= first <= 15


def test_where_other_processes_hold_up_the_flex_threads_another_thread_runs_a_flex_task() -> None:
    tasks, held, gate = TaskLog(1_000_000), threading.Event(), threading.Event()
    usual, flex = ScriptedSource(0, tasks.task("usual", 0.5)), ScriptedFlexSource(2, lambda: None, max_tasks=2)
    threads: list[str] = []

    def flex_task() -> None:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            held.set()
            gate.wait(10)  # its core is taken
        else:
            tasks.done.set()

    flex.work = flex_task
    with running(tasks, usual, flex) as scheduler:
        scheduler.notify(is_flex=True)
        assert held.wait(10)
        usual.left = 10_000
        scheduler.notify()
        assert tasks.done.wait(10)
        usual.left = 0
        gate.set()

    assert threads == ["flex-test-0", "device-test"]


def test_flex_tasks_of_two_engines_have_equal_seconds() -> None:
    tasks = TaskLog(9)
    usual = ScriptedSource(0, lambda: None)
    large = ScriptedFlexSource(3, tasks.task("large", 2.0))
    small = ScriptedFlexSource(6, tasks.task("small", 1.0))
    with running(tasks, usual, large, small) as scheduler:
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)

    assert tasks.order.index("small") == 1
    assert [tasks.order[:6].count(name) for name in ("large", "small")] == [2, 4]


def test_seconds_in_which_a_flex_task_waits_for_a_core_are_not_charged_to_it() -> None:
    """Else other processes that keep the cores busy would use up the floor."""
    tasks, work_s = TaskLog(1), [0.0]

    def layer() -> None:
        tasks.now_s += 10.0
        work_s[0] += 0.25
        scheduler.preemption_point()
        tasks.task("flex", 10.0)()
        work_s[0] += 0.5

    work = FlexWork(lambda: work_s[0])
    scheduler = DeviceScheduler("test", clock=lambda: tasks.now_s, check_interval_s=0.0, flex_work=work)
    owner = ScriptedSource(0, lambda: None)
    try:
        scheduler.attach(owner, ScriptedFlexSource(1, layer))
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)
    finally:
        scheduler.close()

    assert scheduler.seconds_of(owner) == 0.75


# ---- engines that run one batch at a time ----


def test_a_flex_task_that_its_own_engine_waits_for_goes_on() -> None:
    """Else each would wait for the other."""
    tasks = TaskLog(2)
    usual, flex = ScriptedSource(0, tasks.task("usual", 0.001)), ScriptedFlexSource(1, lambda: None)

    def flex_task() -> None:
        usual.max_concurrent_tasks, usual.left, flex.must_finish = 0, 1, True
        scheduler.preemption_point()
        tasks.task("flex", 0.001)()
        usual.max_concurrent_tasks = 1

    flex.work = flex_task
    with running(tasks, usual, flex) as scheduler:
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)

    assert tasks.order == ["flex", "usual"]


def test_an_exclusive_flex_task_does_not_begin_while_its_engine_runs_another() -> None:
    flex = ScriptedFlexSource(1, lambda: None)
    flex.is_exclusive = True
    begun, gate, done = threading.Event(), threading.Event(), threading.Event()

    def usual_task() -> None:
        begun.set()
        gate.wait(10)

    flex.work = done.set
    tasks = TaskLog(1)
    with running(tasks, ScriptedSource(1, usual_task), flex) as scheduler:
        scheduler.notify()
        assert begun.wait(10)
        scheduler._flex.floor.on_others(1000.0)
        scheduler.notify(is_flex=True)
        has_begun_early = done.wait(0.05)
        gate.set()
        assert done.wait(10)

    assert not has_begun_early


# ---- ends ----


def test_detaching_an_engine_lets_its_held_up_flex_task_end() -> None:
    tasks = TaskLog(1)
    usual, other = ScriptedSource(0, lambda: None), ScriptedSource(0, lambda: None)
    held, ended = threading.Event(), threading.Event()

    def flex_task() -> None:
        other.left, other.max_concurrent_tasks = 1, 0  # waits for ever
        held.set()
        scheduler.preemption_point()
        ended.set()

    with running(tasks, usual, ScriptedFlexSource(1, flex_task)) as scheduler:
        scheduler.attach(other)
        scheduler.notify(is_flex=True)
        assert held.wait(10)
        was_held = not ended.wait(0.1)
        scheduler.detach(usual)
        has_ended = ended.is_set()

    assert was_held
    assert has_ended


def test_closing_ends_a_held_up_flex_task_and_its_thread() -> None:
    tasks = TaskLog(1)
    other, held = ScriptedSource(0, lambda: None), threading.Event()

    def flex_task() -> None:
        other.left, other.max_concurrent_tasks = 1, 0
        held.set()
        scheduler.preemption_point()

    with running(tasks, other, ScriptedFlexSource(1, flex_task)) as scheduler:
        scheduler.notify(is_flex=True)
        assert held.wait(10)

    assert not any(thread.is_alive() for thread in scheduler._flex.threads)


def test_a_held_up_flex_task_does_not_count_as_one_that_hangs() -> None:
    tasks = TaskLog(1)
    other, held = ScriptedSource(0, lambda: None), threading.Event()

    def flex_task() -> None:
        other.left, other.max_concurrent_tasks = 1, 0
        held.set()
        scheduler.preemption_point()

    with running(tasks, other, ScriptedFlexSource(1, flex_task)) as scheduler:
        scheduler.notify(is_flex=True)
        assert held.wait(10)
        tasks.now_s += 10_000.0
        health = scheduler.health()

    assert (health.is_alive, health.task_s) == (True, 0.0)


def test_the_seconds_of_flex_tasks_count_for_their_engine() -> None:
    tasks = TaskLog(2)
    usual = ScriptedSource(1, tasks.task("usual", 3.0))
    with running(tasks, usual, ScriptedFlexSource(1, tasks.task("flex", 2.0))) as scheduler:
        scheduler.notify()
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)
        wait_until(lambda: scheduler.seconds_of(usual) == 5.0)


def test_a_server_without_flex_work_has_no_flex_thread() -> None:
    tasks = TaskLog(1)
    with running(tasks, ScriptedSource(1, tasks.task("usual", 1.0)), ScriptedFlexSource(0, lambda: None)) as scheduler:
        scheduler.notify()
        assert tasks.done.wait(10)

        assert not scheduler._flex.threads


def test_a_flex_task_that_fails_does_not_end_its_thread() -> None:
    tasks = TaskLog(1)
    flex = ScriptedFlexSource(2, lambda: None)

    def fail_once() -> None:
        if flex.left == 1:
            raise ValueError("a bug of the source")
        tasks.done.set()

    flex.work = fail_once
    with running(tasks, ScriptedSource(0, lambda: None), flex) as scheduler:
        scheduler.notify(is_flex=True)
        assert tasks.done.wait(10)
        assert scheduler.is_alive


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for what another thread is about to do."""
    is_over = threading.Event()
    for _ in range(1000):
        if is_so():
            return
        is_over.wait(0.005)
    raise AssertionError("it never came")
