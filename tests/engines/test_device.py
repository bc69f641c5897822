"""The lane: one thread, turns fair in time."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engines import device
from engines.device import Lane
from engines.pulse import Pulse


class Script:
    """A source with a fixed number of turns; each turn runs `work`."""

    def __init__(self, turns: int, work: Callable[[], None]) -> None:
        self.left = turns
        self.work = work

    def due_in_s(self) -> float | None:
        return 0.0 if self.left else None

    def take(self) -> Callable[[], None] | None:
        if not self.left:
            return None
        self.left -= 1
        return self.work


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane("test")
    yield lane
    lane.close()


async def test_a_call_runs_on_the_lane_and_its_result_comes_back(lane: Lane) -> None:
    name = await lane.call(lambda: threading.current_thread().name)

    assert name == "lane-test"


async def test_what_a_call_raises_is_raised_where_it_is_awaited(lane: Lane) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await lane.call(fail)

    assert await lane.call(lambda: 1) == 1


async def test_a_turn_that_raises_does_not_end_the_lane(lane: Lane) -> None:
    def fail() -> None:
        raise ValueError("a bug of the source")

    source = Script(1, fail)
    lane.attach(source)
    lane.wake()

    assert await lane.call(lambda: 2) == 2
    assert lane.is_alive


class Diary:
    """Turns of several sources on a fake clock, written down in order."""

    def __init__(self, num_turns: int) -> None:
        self.now_s = 0.0
        self.order: list[str] = []
        self.done = threading.Event()
        self._num_turns = num_turns

    def turn(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.order.append(name)
            self.now_s += seconds
            if len(self.order) == self._num_turns:
                self.done.set()

        return work

    def read(self, *sources: Script) -> list[str]:
        """Let the sources take all their turns on a lane of this clock,"""
        lane = Lane("diary", clock=lambda: self.now_s)
        try:
            for source in sources:
                lane.attach(source)
            lane.wake()
            assert self.done.wait(10)
        finally:
            lane.close()
        return self.order


def test_the_engine_that_used_less_time_goes_next() -> None:
    diary = Diary(num_turns=10)
    slow, quick = Script(2, diary.turn("slow", 4.0)), Script(8, diary.turn("quick", 1.0))

    order = diary.read(slow, quick)

    assert order == ["slow", "quick", "quick", "quick", "quick", "slow", "quick", "quick", "quick", "quick"]


def test_an_engine_that_was_idle_starts_level_and_cannot_hoard_time() -> None:
    diary = Diary(num_turns=7)
    late = Script(0, diary.turn("late", 1.0))
    busy = Script(4, diary.turn("busy", 1.0))
    work = busy.work

    def waking() -> None:
        work()
        if diary.order == ["busy", "busy"]:
            late.left = 3

    busy.work = waking

    order = diary.read(busy, late)

    # With the credit of its idle time, all three of its turns would come at once.
    assert order == ["busy", "busy", "late", "busy", "late", "busy", "late"]


async def test_detaching_waits_for_the_turn_that_runs(lane: Lane) -> None:
    began, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait()
        ended.set()

    source = Script(1, work)
    lane.attach(source)
    lane.wake()
    await asyncio.to_thread(began.wait)
    detaching = asyncio.create_task(asyncio.to_thread(lane.detach, source))
    await asyncio.sleep(0.01)
    assert not detaching.done()
    gate.set()
    await detaching

    assert ended.is_set()


async def test_a_detached_source_gets_no_turn(lane: Lane) -> None:
    source = Script(3, lambda: None)
    lane.attach(source)
    lane.detach(source)
    lane.wake()
    await lane.call(lambda: None)

    assert source.left == 3


async def test_the_lane_says_how_long_its_turn_has_been_running(lane: Lane) -> None:
    def measure() -> float:
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        return lane.running_for_s

    assert await lane.call(measure) >= 0.01


def test_a_closed_lane_has_no_thread() -> None:
    lane = Lane("short")

    lane.close()

    assert not lane.is_alive


def test_the_thread_is_prepared_before_its_first_turn() -> None:
    seen: list[str] = []
    lane = Lane("prepared", lambda: seen.append(threading.current_thread().name))
    lane.close()

    assert seen == ["lane-prepared"]


async def test_the_pulse_tells_how_long_the_present_turn_has_been_running() -> None:
    now_s = 0.0
    lane = Lane("test", clock=lambda: now_s)
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    lane.attach(Script(1, hang))
    idle = lane.pulse()
    lane.wake()
    await asyncio.to_thread(begun.wait)
    now_s = 7.0
    busy = lane.pulse()
    gate.set()
    await asyncio.to_thread(lane.close)

    assert idle == Pulse(is_alive=True, turn_s=0.0)
    assert busy == Pulse(is_alive=True, turn_s=7.0, is_check=False)
    assert lane.pulse() == Pulse(is_alive=True, turn_s=0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_lane_that_cannot_prepare_its_thread_is_dead() -> None:
    def fail() -> None:
        raise RuntimeError("no such device")

    lane = Lane("test", fail)
    await asyncio.to_thread(lane._thread.join)

    assert lane.pulse() == Pulse(is_alive=False)


async def test_a_turn_that_hangs_does_not_keep_the_lane_from_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_END_S", 0.01)
    lane = Lane("test")
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait()

    lane.attach(Script(1, hang))
    lane.wake()
    await asyncio.to_thread(begun.wait)
    lane.close()

    assert lane._thread.is_alive()
    gate.set()
    lane._thread.join(5)
    assert not lane._thread.is_alive()
