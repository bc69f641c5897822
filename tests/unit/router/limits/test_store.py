"""Tests of `LimitStore`: counting, failures of the storage, and a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from router.config.settings import Settings, SettingsError
from router.limits import store as limit_store
from router.limits.budgets import Limit, TokenBudget
from router.limits.store import Bucket, BudgetRoom, Counter, LimitStore, MovingWindows, StoreDown, open_store
from tests.testkit.clocks import FakeClock
from tests.testkit.redis_server import RedisServer, needs_redis

TEN = Bucket("requests/key:web", 10, 60)


async def until_up(store: LimitStore) -> None:
    while store.is_down:  # noqa: ASYNC110  # the store has no event to wait for
        await asyncio.sleep(0)


class FaultyWindows(MovingWindows):
    """Raises a given error, or never returns."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.fault: Exception | None = None
        self.hangs = False
        self.calls = 0

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.fault:
            raise self.fault
        return await super().acquire_entry(key, limit, expiry, amount)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def faulty(clock: FakeClock) -> FaultyWindows:
    return FaultyWindows(clock)


@pytest.fixture
def store(faulty: FaultyWindows, clock: FakeClock) -> LimitStore:
    return LimitStore(faulty, clock)


async def test_a_bucket_tells_what_is_left_and_when_it_grows(store: LimitStore, clock: FakeClock) -> None:
    untouched = await store.room(TEN)
    await store.hit(TEN, 4)
    clock.advance(20)
    await store.hit(TEN)
    used = await store.room(TEN)
    full = await store.hit(TEN, 6)
    clock.advance(40.5)
    grown = await store.room(TEN)

    assert untouched == BudgetRoom(10, 0.0)
    assert used == BudgetRoom(5, 40.0)
    assert full is False
    assert grown == BudgetRoom(9, 19.5)


async def test_a_changed_limit_does_not_begin_with_a_fresh_window(store: LimitStore) -> None:
    await store.hit(TEN, 8)
    lower, higher = Bucket(TEN.name, 5, 60), Bucket(TEN.name, 20, 60)

    assert (await store.room(lower)).left == 0
    assert await store.hit(lower) is False
    assert (await store.room(higher)).left == 12


async def test_an_outage_is_logged_once_and_so_is_its_end(
    store: LimitStore, faulty: FaultyWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_store, "PROBE_INTERVAL_S", 0.0)
    faulty.fault = ConnectionError("redis://user:hunter2@cache is away")
    with capture_logs() as lines:
        for _ in range(3):
            with pytest.raises(StoreDown):
                await store.hit(TEN)
        down = store.is_down
        faulty.fault = None
        await until_up(store)
        await store.hit(TEN)
        await store.hit(TEN)
        faulty.fault = RuntimeError("again")
        with pytest.raises(StoreDown):
            await store.hit(TEN)

    assert down
    assert [(line["event"], line.get("reason")) for line in lines] == [
        ("limits.storage_down", "ConnectionError"),
        ("limits.storage_up", None),
        ("limits.storage_down", "RuntimeError"),
    ]
    assert store.num_outages == 2
    assert "hunter2" not in str(lines)


async def test_while_it_is_down_few_calls_try_the_storage(store: LimitStore, faulty: FaultyWindows) -> None:
    faulty.fault = ConnectionError()
    for _ in range(50):
        with pytest.raises(StoreDown):
            await store.hit(TEN)

    assert faulty.calls <= 2


async def test_a_storage_that_hangs_is_down_and_delays_no_other_request(
    store: LimitStore, faulty: FaultyWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_store, "STORE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(limit_store, "PROBE_INTERVAL_S", 0.0)
    faulty.hangs = True
    with pytest.raises(StoreDown):
        await store.hit(TEN)
    monkeypatch.setattr(limit_store, "STORE_TIMEOUT_S", 1000.0)
    while faulty.calls < 2:  # noqa: ASYNC110  # until a probe hangs too, for longer than this test may take
        await asyncio.sleep(0)
    for _ in range(20):
        with pytest.raises(StoreDown):
            await store.hit(TEN)

    assert store.is_down
    assert faulty.calls == 2
    await store.aclose()


async def test_closing_ends_the_probes(
    store: LimitStore, faulty: FaultyWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_store, "PROBE_INTERVAL_S", 0.0)
    faulty.fault = ConnectionError()
    before = asyncio.all_tasks()
    with pytest.raises(StoreDown):
        await store.hit(TEN)
    during = asyncio.all_tasks() - before
    await store.aclose()

    assert len(during) == 1
    assert asyncio.all_tasks() == before


async def test_a_storage_that_comes_back_is_found_without_any_request(
    store: LimitStore, faulty: FaultyWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_store, "PROBE_INTERVAL_S", 0.0)
    faulty.fault = ConnectionError()
    with pytest.raises(StoreDown):
        await store.hit(TEN)
    faulty.fault = None
    await until_up(store)

    assert await store.hit(TEN)


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("async+nowhere://cache", "unknown"),
        ("async+memcached://cache:11211", "RATE_LIMIT_STORAGE"),
        ("async+redis+cluster://:hunter2@cache", "RATE_LIMIT_STORAGE"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_without_showing_its_password(uri: str, part: str) -> None:
    with pytest.raises(SettingsError, match=part) as caught:
        open_store(Settings(rate_limit_storage=uri))

    assert "hunter2" not in str(caught.value)


async def test_counters_in_memory_need_nothing_closed() -> None:
    store = open_store(Settings())
    await store.hit(TEN)

    await store.aclose()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def shared(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[LimitStore]]:
    """Three servers with one Redis, and a timeout for a busy machine."""
    monkeypatch.setattr(limit_store, "STORE_TIMEOUT_S", 20.0)
    stores = [open_store(Settings(rate_limit_storage=redis.uri)) for _ in range(3)]
    yield stores
    for store in stores:
        await store.aclose()


@needs_redis
async def test_servers_share_their_counters_through_redis(shared: list[LimitStore]) -> None:
    buckets = [Bucket(f"requests/key:{index}", 5 + index, 60) for index in range(16)]
    asked = [(bucket, store) for bucket in buckets for store in shared for _ in range(12)]
    taken = await asyncio.gather(*(store.hit(bucket) for bucket, store in asked))
    admitted = [sum(ok for (asked_for, _), ok in zip(asked, taken, strict=True) if asked_for is b) for b in buckets]

    assert admitted == [bucket.amount for bucket in buckets]
    assert {(await store.room(buckets[0])).left for store in shared} == {0}


@needs_redis
async def test_redis_counts_like_memory(shared: list[LimitStore]) -> None:
    short = Bucket("requests/key:short", 4, 1)
    empty = await shared[0].room(short)
    first = [await shared[0].hit(short, 3), await shared[1].hit(short, 2), await shared[1].hit(short)]
    full = await shared[2].room(short)
    await asyncio.sleep(full.grows_in_s + 0.01)
    grown = await shared[2].hit(short, 3)

    assert empty == BudgetRoom(4, 0.0)
    assert first == [True, False, True]
    assert full.left == 0
    assert 0.5 < full.grows_in_s <= 1.0
    assert grown


@needs_redis
async def test_redis_counts_up_and_down_like_memory(shared: list[LimitStore]) -> None:
    counter = Counter("reserved/key:web", 1)
    changed = [await shared[0].add(counter, 5), await shared[1].add(counter, 7), await shared[2].add(counter, -10)]
    found = await shared[0].count(counter), await shared[1].count(Counter("reserved/nobody", 1))
    await asyncio.sleep(1.1)

    assert (changed, found) == ([5, 12, 2], (2, 0))
    assert await shared[2].count(counter) == 0


@needs_redis
async def test_servers_share_reservations_and_debts_through_redis(shared: list[LimitStore]) -> None:
    limit, servers = Limit(100, 60), [TokenBudget(store) for store in shared]
    asked = await asyncio.gather(*(server.reserve("key:web", limit, 20) for server in servers * 4))
    reserved = [reservation for reservation, _ in asked if reservation is not None]
    for reservation in reserved:
        await servers[0].settle(reservation, 30)
    restarted = await TokenBudget(shared[2]).balance_of("key:web", limit)
    debt = await shared[1].room(Bucket("debt/key:web/1", 100, 120))

    assert len(reserved) == 5
    assert (restarted.left, debt.left) == (0, 50)


@needs_redis
async def test_redis_may_go_and_come_back(
    shared: list[LimitStore], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_store, "PROBE_INTERVAL_S", 0.0)
    store = shared[0]
    before = await asyncio.gather(*(store.hit(Bucket("many", 1000, 60)) for _ in range(200)))
    redis.stop()
    with capture_logs() as lines:
        for _ in range(3):
            with pytest.raises(StoreDown):
                await store.hit(TEN)
        await asyncio.to_thread(redis.start)
        await until_up(store)
        after = await asyncio.gather(*(store.hit(TEN) for _ in range(20)))

    assert all(before)
    assert after.count(True) == 10
    assert [line["event"] for line in lines] == ["limits.storage_down", "limits.storage_up"]
