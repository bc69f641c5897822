"""A turn that lasts lets others go first in between: small models do not wait for a large one's self-check."""

import asyncio
import threading
from typing import Any

import pytest

from engines.device.scheduler import DeviceScheduler
from engines.loading import loader
from engines.models.verification import select_forward_path
from tests.testkit.engine_kit import Kit
from tests.testkit.scheduling import ScriptedSource, TaskLog


def read(num_turns: int, other_turns: int, parts: int, part_s: float = 2.0) -> list[str]:
    """The order of a long turn's parts and of another source's turns of 1 s, which come up during the first part."""
    diary = TaskLog(num_turns)
    other = ScriptedSource(0, diary.turn("other", 1.0))
    lane = diary.open_lane()

    def long_turn() -> None:
        for part in range(parts):
            diary.turn("part", part_s)()
            other.left = other_turns if part == 0 else other.left
            lane.preemption_point()

    try:
        lane.attach(other)
        lane.attach(ScriptedSource(1, long_turn))
        lane.notify()
        assert diary.done.wait(10)
    finally:
        lane.close()
    return diary.order


def test_between_its_parts_those_go_first_who_had_less_time() -> None:
    assert read(7, other_turns=4, parts=3) == ["part", "other", "other", "part", "other", "other", "part"]


def test_who_is_always_busy_gets_no_more_than_a_fair_share() -> None:
    order = read(12, other_turns=100, parts=4)

    assert order[:12] == ["part", "other", "other"] * 4


def test_time_given_to_others_is_not_charged_to_who_gave_it() -> None:
    """Parts of 2 s and 0.5 s, and 2 s given away: the other has used less at the end, and goes first."""
    diary = TaskLog(7)
    other = ScriptedSource(0, diary.turn("other", 1.0))
    lane = diary.open_lane()
    long = ScriptedSource(1, lambda: None)

    def long_turn() -> None:
        diary.turn("part", 2.0)()
        other.left = 4
        lane.preemption_point()
        diary.turn("part", 0.5)()
        long.work, long.left = diary.turn("next", 1.0), 1

    long.work = long_turn
    try:
        lane.attach(other)
        lane.attach(long)
        lane.notify()
        assert diary.done.wait(10)
    finally:
        lane.close()

    assert diary.order == ["part", "other", "other", "part", "other", "next", "other"]


def test_outside_a_turn_there_is_nobody_to_give_way() -> None:
    lane = DeviceScheduler("idle")
    source = ScriptedSource(0, lambda: None)
    lane.attach(source)
    source.left = 1
    lane.preemption_point()
    left = source.left
    lane.close()

    assert left == 1


async def test_who_gave_way_cannot_be_detached_meanwhile() -> None:
    lane = DeviceScheduler("test", look_s=0.0)
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(10)

    inner = ScriptedSource(0, wait)

    def long_turn() -> None:
        inner.left = 1
        lane.preemption_point()

    outer = ScriptedSource(1, long_turn)
    lane.attach(inner)
    lane.attach(outer)
    lane.notify()
    await asyncio.to_thread(begun.wait, 10)
    detaching = asyncio.create_task(asyncio.to_thread(lane.detach, outer))
    await asyncio.sleep(0.01)
    was_waiting = not detaching.done()
    gate.set()
    await detaching
    lane.close()

    assert was_waiting


async def test_a_turn_that_is_given_way_to_may_fail() -> None:
    lane = DeviceScheduler("test", look_s=0.0)

    def fail() -> None:
        raise ValueError("a bug of the source")

    inner = ScriptedSource(0, fail)
    lane.attach(inner)

    def long_turn() -> int:
        inner.left = 1
        lane.preemption_point()
        return inner.left

    assert await lane.call(long_turn) == 0
    assert lane.is_alive
    lane.close()


def read_small(num_turns: int, small: int, parts: int, *, is_long: bool = True) -> list[str]:
    """The order of a turn's parts of 2 s and of small turns of 1 s of the same source, there from the first part on."""
    diary = TaskLog(num_turns)
    lane = diary.open_lane()
    source = ScriptedSource(1, lambda: None, is_long=is_long)

    def long_turn() -> None:
        for part in range(parts):
            diary.turn("part", 2.0)()
            if part == 0:
                source.small = [diary.turn("small", 1.0)] * small
            lane.preemption_point()

    source.work = long_turn
    try:
        lane.attach(source)
        lane.notify()
        assert diary.done.wait(10)
    finally:
        lane.close()
    return diary.order


def test_small_work_of_the_same_source_passes_a_long_turn_between_its_parts() -> None:
    assert read_small(4, small=2, parts=2) == ["part", "small", "small", "part"]


def test_a_long_turn_gives_no_more_than_about_as_much_time_as_it_takes() -> None:
    order = read_small(11, small=100, parts=4)

    assert order[:11] == ["part", *["small"] * 3, "part", *["small"] * 2, "part", *["small"] * 2, "part"]


def test_a_turn_that_is_not_long_is_not_passed_by_its_own_kind() -> None:
    assert read_small(2, small=1, parts=2, is_long=False) == ["part", "part"]


def test_a_turn_just_begun_is_not_asked_to_give_way() -> None:
    """Looking takes the lock, and it is asked before each of perhaps a hundred layers."""
    diary = TaskLog(2)
    lane = DeviceScheduler("busy", clock=lambda: diary.now_s, look_s=0.5)
    other = ScriptedSource(0, diary.turn("other", 1.0))

    def turn() -> None:
        other.left = 1
        diary.now_s += 0.4
        lane.preemption_point()
        diary.turn("turn", 1.0)()

    lane.attach(other)
    lane.attach(ScriptedSource(1, turn))
    lane.notify()
    assert diary.done.wait(10)
    lane.close()

    assert diary.order == ["turn", "other"]


def test_a_real_self_check_lets_others_go_first_between_layers(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    other = ScriptedSource(0, lambda: turns.append(1))
    during: list[int] = []

    def checked(*arguments: Any) -> Any:
        other.left = 10_000
        try:
            return select_forward_path(*arguments)
        finally:
            during.append(len(turns))
            other.left = 0

    monkeypatch.setattr(loader, "select_forward_path", checked)
    kit.lane.attach(other)
    try:
        engine = kit.load(kit.recipe_folder("bert-cls"))
    finally:
        kit.lane.detach(other)
    asyncio.run(asyncio.to_thread(engine.close))

    assert during[0] >= 4, "two layers, run through the reference and through the fast path"
