"""Moving windows in memory, compared with the definition and with the package's own storage."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.limits.store import MovingWindows
from tests.testkit.clocks import FakeClock

WINDOW_S = 60


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def windows(clock: FakeClock) -> MovingWindows:
    return MovingWindows(clock)


async def test_a_hit_counts_for_one_window_and_not_longer(windows: MovingWindows, clock: FakeClock) -> None:
    assert await windows.acquire_entry("a", 1, WINDOW_S)
    clock.advance(WINDOW_S)
    at_the_end = await windows.acquire_entry("a", 1, WINDOW_S)
    clock.advance(0.001)
    after = await windows.acquire_entry("a", 1, WINDOW_S)

    assert (at_the_end, after) == (False, True)


async def test_what_does_not_fit_takes_nothing(windows: MovingWindows) -> None:
    assert await windows.acquire_entry("a", 10, WINDOW_S, amount=7)
    assert not await windows.acquire_entry("a", 10, WINDOW_S, amount=4)
    assert await windows.acquire_entry("a", 10, WINDOW_S, amount=3)
    assert not await windows.acquire_entry("b", 10, WINDOW_S, amount=11)


async def test_keys_do_not_share(windows: MovingWindows) -> None:
    assert await windows.acquire_entry("a", 1, WINDOW_S)
    assert await windows.acquire_entry("b", 1, WINDOW_S)


async def test_a_window_tells_its_oldest_hit_and_its_use(windows: MovingWindows, clock: FakeClock) -> None:
    empty = await windows.get_moving_window("a", 10, WINDOW_S)
    await windows.acquire_entry("a", 10, WINDOW_S, amount=2)
    clock.advance(30)
    await windows.acquire_entry("a", 10, WINDOW_S, amount=5)
    both = await windows.get_moving_window("a", 10, WINDOW_S)
    clock.advance(31)
    one = await windows.get_moving_window("a", 10, WINDOW_S)
    lowered = await windows.get_moving_window("a", 3, WINDOW_S)

    assert empty == (1000.0, 0)
    assert both == (1000.0, 7)
    assert one == (1030.0, 5)
    assert lowered == (1030.0, 3)


async def test_unused_keys_are_removed(windows: MovingWindows, clock: FakeClock) -> None:
    for index in range(1000):
        await windows.acquire_entry(f"address:{index}", 5, WINDOW_S)
        clock.advance(0.5)

    assert len(windows) < 400
    clock.advance(10 * WINDOW_S)
    await windows.acquire_entry("last", 5, WINDOW_S)

    assert len(windows) == 1


async def test_a_counter_goes_up_and_down_and_is_forgotten(windows: MovingWindows, clock: FakeClock) -> None:
    up = [await windows.incr("a", 60, 5), await windows.incr("a", 60, 7)]
    clock.advance(59)
    down = [await windows.incr("a", 60, -12), await windows.incr("a", 60, 3)]
    clock.advance(59)
    unchanged = await windows.get("a"), await windows.get("b")
    clock.advance(2)

    assert (up, down, unchanged) == ([5, 12], [0, 3], (3, 0))
    assert await windows.get("a") == 0
    assert await windows.incr("a", 60, -2) == -2


async def test_unused_counters_are_removed(windows: MovingWindows, clock: FakeClock) -> None:
    for index in range(1000):
        await windows.incr(f"address:{index}", WINDOW_S)
        clock.advance(0.5)

    assert len(windows) < 400


async def test_what_is_cleared_begins_anew(windows: MovingWindows) -> None:
    for key in ("a", "b", "c"):
        await windows.acquire_entry(key, 1, WINDOW_S)
    await windows.clear("a")

    assert await windows.acquire_entry("a", 1, WINDOW_S)
    assert not await windows.acquire_entry("b", 1, WINDOW_S)
    assert await windows.reset() == 3
    assert await windows.acquire_entry("b", 1, WINDOW_S)


@given(
    limit=st.integers(1, 20),
    steps=st.lists(st.tuples(st.floats(0, 40), st.integers(1, 12)), max_size=80),
)
async def test_no_window_ever_holds_more_than_the_limit(limit: int, steps: list[tuple[float, int]]) -> None:
    clock = FakeClock()
    windows = MovingWindows(clock)
    admitted: list[tuple[float, int]] = []
    for wait_s, cost in steps:
        clock.advance(wait_s)
        used = sum(amount for at, amount in admitted if at >= clock.now_s - WINDOW_S)
        assert (await windows.get_moving_window("a", limit, WINDOW_S))[1] == used
        is_admitted = await windows.acquire_entry("a", limit, WINDOW_S, amount=cost)
        assert is_admitted == (used + cost <= limit)
        if is_admitted:
            admitted.append((clock.now_s, cost))


async def test_many_tokens_cost_no_more_than_one(windows: MovingWindows, clock: FakeClock) -> None:
    rng = random.Random(1)
    for _ in range(2000):
        await windows.acquire_entry("a", 10**9, WINDOW_S, amount=rng.randrange(10**6))
        clock.advance(0.05)

    assert len(windows._windows["a"].hits) <= WINDOW_S / 0.05 + 2
