"""Budgets of requests and tokens: per window, under concurrency, and on average."""

import asyncio
import random

import pytest

from router.limits.budgets import Balance, Limit, RequestBudget, Reservation, TokenBudget
from router.limits.store import LimitStore, MovingWindows
from tests.testkit.clocks import FakeClock

WINDOW_S = 60


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> LimitStore:
    return LimitStore(MovingWindows(clock), clock)


@pytest.fixture
def tokens(store: LimitStore) -> TokenBudget:
    return TokenBudget(store)


def busiest(times: list[float]) -> int:
    """Return the maximum number of times in any window, including both ends."""
    first, most = 0, 0
    for last, time in enumerate(times):
        while times[first] < time - WINDOW_S:
            first += 1
        most = max(most, last - first + 1)
    return most


async def test_requests_are_taken_until_none_is_left(store: LimitStore, clock: FakeClock) -> None:
    requests, limit = RequestBudget(store), Limit(2, WINDOW_S)
    first = await requests.acquire("key:web", limit)
    clock.advance(10)
    second, refused = [await requests.acquire("key:web", limit) for _ in range(2)]
    clock.advance(refused[1].resets_in_s + 0.001)

    assert first == (True, Balance(2, 1, 60.0))
    assert second == (True, Balance(2, 0, 50.0))
    assert refused == (False, Balance(2, 0, 50.0))
    assert (await requests.acquire("key:web", limit))[0]
    assert (await requests.acquire("key:other", limit))[0]


async def test_32_keys_that_send_more_than_their_limit_get_their_limit(store: LimitStore, clock: FakeClock) -> None:
    requests = RequestBudget(store)
    rng = random.Random(7)
    limits = {f"key:{index}": Limit(10 + 9 * index, WINDOW_S) for index in range(32)}
    admitted: dict[str, list[float]] = {name: [] for name in limits}
    began = clock.now_s
    while clock.now_s < began + 3 * WINDOW_S:
        clock.advance(0.2)
        for name, limit in limits.items():
            for _ in range(rng.randint(0, 2 + limit.amount // 80)):
                if (await requests.acquire(name, limit))[0]:
                    admitted[name].append(clock.now_s)

    for name, limit in limits.items():
        assert busiest(admitted[name]) == limit.amount
        assert len(admitted[name]) >= 0.99 * 3 * limit.amount


async def test_tokens_are_counted_after_the_work_and_later_requests_are_refused(
    tokens: TokenBudget, clock: FakeClock
) -> None:
    limit = Limit(100, WINDOW_S)
    before = await tokens.balance_of("key:web", limit)
    charged = await tokens.charge("key:web", limit, 60)
    clock.advance(20)
    exactly = await tokens.charge("key:web", limit, 40)
    refused = await tokens.balance_of("key:web", limit)
    clock.advance(refused.resets_in_s + 0.001)
    again = await tokens.balance_of("key:web", limit)

    assert before == Balance(100, 100, 0.0)
    assert charged == Balance(100, 40, 60.0)
    assert exactly == refused == Balance(100, 0, 40.0)
    assert again.left == 60


async def test_what_is_too_much_is_paid_for_in_the_next_window(tokens: TokenBudget, clock: FakeClock) -> None:
    limit = Limit(100, WINDOW_S)
    charged = await tokens.charge("key:web", limit, 150)
    clock.advance(WINDOW_S + 1)
    half = await tokens.balance_of("key:web", limit)
    clock.advance(half.resets_in_s + 0.001)
    again = await tokens.balance_of("key:web", limit)

    assert charged == Balance(100, 0, 60.0)
    assert half == Balance(100, 50, 59.0)
    assert again == Balance(100, 100, 0.0)


async def test_a_debt_is_one_window_at_most(tokens: TokenBudget, clock: FakeClock) -> None:
    limit = Limit(100, WINDOW_S)
    charged = await tokens.charge("key:web", limit, 100_000)
    clock.advance(WINDOW_S + 1)
    still = await tokens.balance_of("key:web", limit)
    clock.advance(still.resets_in_s + 0.001)
    again = await tokens.balance_of("key:web", limit)

    assert charged == Balance(100, 0, 120.0)
    assert still == Balance(100, 0, 59.0)
    assert again == Balance(100, 100, 0.0)


async def test_a_debt_outlives_the_server_and_counts_for_all_of_them(store: LimitStore) -> None:
    limit = Limit(100, WINDOW_S)
    await TokenBudget(store).charge("key:web", limit, 170)

    assert await TokenBudget(store).charge("key:web", limit, 10) == Balance(100, 0, 60.0)
    assert (await TokenBudget(store).balance_of("key:other", limit)).left == 100


async def test_requests_at_once_get_what_is_there_and_not_more(store: LimitStore) -> None:
    one, two, limit = TokenBudget(store), TokenBudget(store), Limit(100, WINDOW_S)
    asked = await asyncio.gather(*(server.reserve("key:web", limit, 30) for server in (one, two) * 6))
    reserved = [reservation for reservation, _ in asked if reservation]
    refused = await two.reserve("key:web", limit, 30)
    settled = [await two.settle(reservation, 10) for reservation in reserved]

    assert len(reserved) == 3
    assert refused == (None, Balance(100, 10, 0.0))
    assert [balance.left for balance in settled] == [30, 50, 70]


async def test_what_was_reserved_for_nothing_is_there_again(tokens: TokenBudget) -> None:
    limit = Limit(100, WINDOW_S)
    reservation, balance = await tokens.reserve("key:web", limit, 100)
    assert reservation is not None
    await tokens.release(reservation)

    assert balance == Balance(100, 100, 0.0)
    assert (await tokens.reserve("key:web", limit, 100))[0] is not None


@pytest.mark.parametrize("amount", [100, 1_000_000])
async def test_a_request_of_a_whole_window_is_admitted_to_an_empty_one(
    tokens: TokenBudget, clock: FakeClock, amount: int
) -> None:
    limit = Limit(amount, WINDOW_S)
    await tokens.charge("key:web", limit, 1)
    clock.advance(WINDOW_S + 1)

    assert (await tokens.reserve("key:web", limit, amount))[0] is not None


async def test_a_reservation_lapses_when_its_server_died(tokens: TokenBudget, clock: FakeClock) -> None:
    limit = Limit(100, WINDOW_S)
    lost, _ = await tokens.reserve("key:web", limit, 100)
    assert lost is not None
    clock.advance(WINDOW_S)
    held = await tokens.reserve("key:web", limit, 1)
    clock.advance(WINDOW_S)
    lapsed, _ = await tokens.reserve("key:web", limit, 60)
    await tokens.release(lost)

    assert held[0] is None
    assert lapsed is not None
    assert (await tokens.reserve("key:web", limit, 41))[0] is None, "what came back too late would count twice"


async def test_whatever_is_reserved_and_settled_no_window_holds_more(store: LimitStore, clock: FakeClock) -> None:
    """Three servers, requests of any length, and estimates that are never too low."""
    servers, limit, rng = [TokenBudget(store) for _ in range(3)], Limit(1000, WINDOW_S), random.Random(3)
    running: list[tuple[float, Reservation]] = []
    charged: list[tuple[float, int]] = []
    for _ in range(4000):
        clock.advance(rng.random())
        server = rng.choice(servers)
        reservation, _ = await server.reserve("key:web", limit, rng.randint(1, 300))
        if reservation is not None:
            running.append((clock.now_s + rng.choice((0.1, 2.0, 20.0)), reservation))
        for ends_at, ending in [one for one in running if one[0] <= clock.now_s]:
            running.remove((ends_at, ending))
            used = rng.choice((0, ending.tokens // 2, ending.tokens))
            await server.settle(ending, used)
            charged.append((clock.now_s, used))
        recent = sum(used for at, used in charged if at >= clock.now_s - WINDOW_S)
        assert recent + sum(one.tokens for _, one in running) <= limit.amount

    assert sum(used for _, used in charged) > 0.4 * limit.amount * (clock.now_s - 1000.0) / WINDOW_S


@pytest.mark.parametrize("amount", [100, 8192, 8193, 1_000_000, 60_000_000])
async def test_large_budgets_are_counted_in_units_and_lose_nothing(tokens: TokenBudget, amount: int) -> None:
    limit = Limit(amount, WINDOW_S)
    rng = random.Random(amount)
    used = 0
    balance = await tokens.balance_of("key:web", limit)
    while balance.left:
        cost = rng.randint(1, max(1, amount // 50))
        balance = await tokens.charge("key:web", limit, cost)
        used += cost
        if balance.left:
            assert balance.left == amount - used

    assert 0.999 * amount <= used <= 1.02 * amount


async def test_32_keys_get_their_tokens_on_the_average(tokens: TokenBudget, clock: FakeClock) -> None:
    rng = random.Random(11)
    limits = {f"key:{index}": Limit(1000 + 997 * index, WINDOW_S) for index in range(32)}
    used = dict.fromkeys(limits, 0)
    began = clock.now_s
    windows = 8
    while clock.now_s < began + windows * WINDOW_S:
        clock.advance(0.5)
        for name, limit in limits.items():
            if (await tokens.balance_of(name, limit)).left:
                cost = rng.randint(1, limit.amount // 10)
                await tokens.charge(name, limit, cost)
                used[name] += cost

    for name, limit in limits.items():
        assert 0.99 * windows <= used[name] / limit.amount <= windows + 1


@pytest.mark.parametrize(("estimate", "windows_worth"), [(100, 1.0), (25, 2.0)])
async def test_requests_side_by_side_cannot_multiply_a_budget(
    tokens: TokenBudget, clock: FakeClock, estimate: int, windows_worth: float
) -> None:
    """With estimates of a quarter of the use, the overshoot is one window of debt.

    Fifteen times in each window fifty ask at once, which is 75 times the budget.
    """
    limit, used = Limit(1000, WINDOW_S), 0
    began = clock.now_s
    while clock.now_s < began + 100 * WINDOW_S:
        asked = [await tokens.reserve("key:web", limit, estimate) for _ in range(50)]
        for reservation, _ in asked:
            if reservation is not None:
                await tokens.settle(reservation, 100)
                used += 100
        clock.advance(4)

    assert used <= 1000 * 100 * windows_worth + 50 * 100


async def test_addresses_that_come_and_go_leave_nothing(store: LimitStore, clock: FakeClock) -> None:
    tokens, limit = TokenBudget(store), Limit(10**6, WINDOW_S)
    for index in range(25_000):
        await tokens.charge(f"address:{index}", limit, 1)

    assert len(tokens) <= 10_000
