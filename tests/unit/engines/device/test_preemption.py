"""Preemption of long tasks between layers: small models do not wait for the self-check of a large one."""

import asyncio
import threading
from typing import Any

import pytest

from benchmarks.lib.engine_kit import Kit
from engines.device.scheduler import DeviceScheduler
from engines.models import self_check
from engines.models.verification import select_forward_path
from tests.testkit.scheduling import ScriptedSource, TaskLog


def order_of(num_tasks: int, other_tasks: int, parts: int, part_s: float = 2.0) -> list[str]:
    """Returns the order of a long task's parts and another source's tasks of 1 s, there from the first part on."""
    tasks = TaskLog(num_tasks)
    other = ScriptedSource(0, tasks.task("other", 1.0))
    scheduler = tasks.scheduler()

    def long_task() -> None:
        for part in range(parts):
            tasks.task("part", part_s)()
            other.left = other_tasks if part == 0 else other.left
            scheduler.preemption_point()

    try:
        scheduler.attach(other)
        scheduler.attach(ScriptedSource(1, long_task))
        scheduler.notify()
        assert tasks.done.wait(10)
    finally:
        scheduler.close()
    return tasks.order


def test_between_two_parts_a_source_that_used_less_time_goes_first() -> None:
    assert order_of(7, other_tasks=4, parts=3) == ["part", "other", "other", "part", "other", "other", "part"]


def test_a_source_that_is_always_busy_gets_no_more_than_a_fair_share() -> None:
    order = order_of(12, other_tasks=100, parts=4)

    assert order[:12] == ["part", "other", "other"] * 4


def test_the_time_of_preempting_tasks_is_not_charged_to_the_preempted_one() -> None:
    """Parts of 2 s and 0.5 s, and 2 s of the other in between: the other has used less at the end, and goes first."""
    tasks = TaskLog(7)
    other = ScriptedSource(0, tasks.task("other", 1.0))
    scheduler = tasks.scheduler()
    long = ScriptedSource(1, lambda: None)

    def long_task() -> None:
        tasks.task("part", 2.0)()
        other.left = 4
        scheduler.preemption_point()
        tasks.task("part", 0.5)()
        long.work, long.left = tasks.task("next", 1.0), 1

    long.work = long_task
    try:
        scheduler.attach(other)
        scheduler.attach(long)
        scheduler.notify()
        assert tasks.done.wait(10)
    finally:
        scheduler.close()

    assert tasks.order == ["part", "other", "other", "part", "other", "next", "other"]


def test_outside_of_a_task_a_preemption_point_does_nothing() -> None:
    scheduler = DeviceScheduler("idle")
    source = ScriptedSource(0, lambda: None)
    scheduler.attach(source)
    source.left = 1
    scheduler.preemption_point()
    left = source.left
    scheduler.close()

    assert left == 1


async def test_detaching_waits_for_a_preempted_task() -> None:
    scheduler = DeviceScheduler("test", check_interval_s=0.0)
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(10)

    inner = ScriptedSource(0, wait)

    def long_task() -> None:
        inner.left = 1
        scheduler.preemption_point()

    outer = ScriptedSource(1, long_task)
    scheduler.attach(inner)
    scheduler.attach(outer)
    scheduler.notify()
    await asyncio.to_thread(begun.wait, 10)
    detaching = asyncio.create_task(asyncio.to_thread(scheduler.detach, outer))
    await asyncio.sleep(0.01)
    was_waiting = not detaching.done()
    gate.set()
    await detaching
    scheduler.close()

    assert was_waiting


async def test_a_preempting_task_may_fail() -> None:
    scheduler = DeviceScheduler("test", check_interval_s=0.0)

    def fail() -> None:
        raise ValueError("a bug of the source")

    inner = ScriptedSource(0, fail)
    scheduler.attach(inner)

    def long_task() -> int:
        inner.left = 1
        scheduler.preemption_point()
        return inner.left

    assert await scheduler.call(long_task) == 0
    assert scheduler.is_alive
    scheduler.close()


def order_with_small(num_tasks: int, small: int, parts: int, *, is_long: bool = True) -> list[str]:
    """Returns the order of a task's parts of 2 s and its source's small tasks of 1 s, there from the first part on."""
    tasks = TaskLog(num_tasks)
    scheduler = tasks.scheduler()
    source = ScriptedSource(1, lambda: None, is_long=is_long)

    def long_task() -> None:
        for part in range(parts):
            tasks.task("part", 2.0)()
            if part == 0:
                source.small = [tasks.task("small", 1.0)] * small
            scheduler.preemption_point()

    source.work = long_task
    try:
        scheduler.attach(source)
        scheduler.notify()
        assert tasks.done.wait(10)
    finally:
        scheduler.close()
    return tasks.order


def test_small_tasks_of_the_same_source_preempt_a_long_one_between_its_parts() -> None:
    assert order_with_small(4, small=2, parts=2) == ["part", "small", "small", "part"]


def test_small_tasks_get_no_more_than_about_as_much_time_as_the_long_one() -> None:
    order = order_with_small(11, small=100, parts=4)

    assert order[:11] == ["part", *["small"] * 3, "part", *["small"] * 2, "part", *["small"] * 2, "part"]


def test_a_task_that_is_not_long_is_not_preempted_by_small_ones() -> None:
    assert order_with_small(2, small=1, parts=2, is_long=False) == ["part", "part"]


def order_with_nested(num_tasks: int, small: int, *, is_long: bool) -> list[str]:
    """Returns the order of tasks of a source whose bulk is preempted by another's of three parts, both of 2 s a part;
    its small tasks of 1 s are there from the first of these on."""
    tasks = TaskLog(num_tasks)
    scheduler = tasks.scheduler()
    first, second = ScriptedSource(1, lambda: None, is_long=True), ScriptedSource(0, lambda: None, is_long=is_long)

    def preempted() -> None:
        tasks.task("first", 2.0)()
        second.left = 1
        scheduler.preemption_point()
        tasks.task("first", 2.0)()

    def preempting() -> None:
        for part in range(3):
            tasks.task("second", 2.0)()
            if part == 0:
                first.small = [tasks.task("small", 1.0)] * small
            scheduler.preemption_point()

    first.work, second.work = preempted, preempting
    try:
        scheduler.attach(first)
        scheduler.attach(second)
        scheduler.notify()
        assert tasks.done.wait(10)
    finally:
        scheduler.close()
    return tasks.order


def test_small_tasks_of_a_preempted_source_go_between_the_parts_of_the_task_that_preempts_it() -> None:
    """Two models have bulk requests, and a query comes for the one whose batches are preempted on every thread."""
    order = order_with_nested(6, small=1, is_long=True)

    assert order == ["first", "second", "second", "small", "second", "first"]


def test_small_tasks_of_a_preempted_source_get_no_more_time_than_is_fair() -> None:
    order = order_with_nested(8, small=100, is_long=True)

    assert order == ["first", "second", "second", *["small"] * 2, "second", "small", "first"]


def test_a_short_task_is_not_preempted_by_small_tasks_of_the_source_that_it_preempts() -> None:
    """Two sources of small tasks would preempt each other without end."""
    order = order_with_nested(6, small=1, is_long=False)

    assert order == ["first", "second", "second", "second", "small", "first"]


def test_a_task_that_has_just_begun_is_not_preempted() -> None:
    """The check takes the lock, and there is a preemption point before each of perhaps a hundred layers."""
    tasks = TaskLog(2)
    scheduler = DeviceScheduler("busy", clock=lambda: tasks.now_s, check_interval_s=0.5)
    other = ScriptedSource(0, tasks.task("other", 1.0))

    def task() -> None:
        other.left = 1
        tasks.now_s += 0.4
        scheduler.preemption_point()
        tasks.task("task", 1.0)()

    scheduler.attach(other)
    scheduler.attach(ScriptedSource(1, task))
    scheduler.notify()
    assert tasks.done.wait(10)
    scheduler.close()

    assert tasks.order == ["task", "other"]


def test_a_real_self_check_is_preempted_between_layers(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    other = ScriptedSource(0, lambda: runs.append(1))
    during: list[int] = []

    def checked(*arguments: Any) -> Any:
        other.left = 10_000
        try:
            return select_forward_path(*arguments)
        finally:
            during.append(len(runs))
            other.left = 0

    monkeypatch.setattr(self_check, "select_forward_path", checked)
    kit.scheduler.attach(other)
    try:
        engine = kit.load(kit.recipe_folder("bert-cls"))
    finally:
        kit.scheduler.detach(other)
    asyncio.run(asyncio.to_thread(engine.close))

    assert during[0] >= 4, "two layers, run through the reference and through the fast path"
