"""The counters behind limits, wherever they are kept: the `limits` package, a deadline, and outages told once.

Knows neither keys nor requests.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from msgspec import Struct, field

from router.config.settings import Settings, SettingsError


class Window(Struct):
    """The hits of one key: when, and at what cost; the oldest first."""

    hits: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0
    expires_at: float = 0.0

    def forget(self, before: float) -> None:
        """Drop hits older than that."""
        while self.hits and self.hits[0][0] < before:
            self.used -= self.hits.popleft()[1]


class Number(Struct):
    """A counter."""

    value: int = 0
    expires_at: float = 0.0


class MovingWindows(MemoryStorage):
    """A hit counts until it is older than the window: two hits exactly one window apart are in one window.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, Window] = {}
        self._numbers: dict[str, Number] = {}
        self._sweep_at = 0.0

    def __len__(self) -> int:
        return len(self._windows) + len(self._numbers)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to a counter; one that was 0 lives for `expiry` seconds from now, as in Redis."""
        now = self._clock()
        self._sweep(now, expiry)
        number = self._numbers.get(key)
        if number is None or number.expires_at < now:
            number = self._numbers[key] = Number()
        if not number.value:
            number.expires_at = now + expiry
        number.value += amount
        return number.value

    async def get(self, key: str) -> int:
        """What a counter is; 0 without one."""
        number = self._numbers.get(key)
        return 0 if number is None or number.expires_at < self._clock() else number.value

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count a hit of this cost, if the window has room for all of it."""
        now = self._clock()
        self._sweep(now, expiry)
        window = self._windows.setdefault(key, Window())
        window.forget(now - expiry)
        if window.used + amount > limit:
            return False
        window.hits.append((now, amount))
        window.used += amount
        window.expires_at = now + expiry
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest hit was (now, if there is none), and the cost of all hits; never above `limit`."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None:
            return now, 0
        window.forget(now - expiry)
        return window.hits[0][0] if window.hits else now, min(window.used, limit)

    async def clear(self, key: str) -> None:
        """Forget the hits of a key."""
        self._windows.pop(key, None)
        self._numbers.pop(key, None)
        await super().clear(key)

    async def reset(self) -> int | None:
        """Forget everything."""
        count = len(self)
        self._windows.clear()
        self._numbers.clear()
        return count + (await super().reset() or 0)

    def _sweep(self, now: float, expiry: float) -> None:
        """Once a window: drop the keys that nobody has used for one, or addresses would pile up."""
        if now < self._sweep_at:
            return
        self._sweep_at = now + expiry
        self._windows = {key: window for key, window in self._windows.items() if window.expires_at >= now}
        self._numbers = {key: number for key, number in self._numbers.items() if number.expires_at >= now}


log = structlog.get_logger()


T = TypeVar("T")


DEADLINE_S = 1.0
"""Longer than any healthy storage takes, also when this server is busy; shorter than clients wait. Whoever meets an
outage first waits so long, once: afterwards every call fails at once until a probe has been answered."""


PROBE_EVERY_S = 1.0


_MAX_CONNECTIONS = 16
"""A call takes a fraction of a millisecond: a herd of requests had better wait its turn than open a herd of these."""


_REDIS = re.compile(r"async\+(redis(?:s|\+\w+)?)://")


_NAMESPACE = "embedyard"


class StoreDown(Exception):
    """The storage did not answer in time, or failed."""


class Bucket(Struct, frozen=True):
    """One counter: what is counted (`name` holds for whom), and how much of it a window of so many seconds admits."""

    name: str
    amount: int
    window_s: int


class Counter(Struct, frozen=True):
    """A number that goes up and down, and is forgotten so many seconds after it was 0."""

    name: str
    expires_in_s: int


class Room(Struct, frozen=True):
    """What a bucket has left, and in how many seconds its oldest hit will have left it; 0 when it is untouched."""

    left: int
    grows_in_s: float


_PROBE = Bucket("probe", 1, 1)


class _Item(RateLimitItemPerSecond):
    """A window whose counter survives a changed amount: else a new limit would begin with a fresh window."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return "/".join(map(str, (self.namespace, *identifiers, self.multiples)))


class LimitStore:
    """Moving windows and counters in a storage of the `limits` package.

    While the storage is down, a task of its own probes it once a second; calls fail at once.

    Attributes:
        clock: seconds, as the storage counts them.
        num_outages: how often it went down.
        is_down: whether it is down now.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], *, is_own_memory: bool = False) -> None:
        """`is_own_memory`: the storage needs no deadline, which takes as long as all else that is done here."""
        self._storage = storage
        self._is_own_memory = is_own_memory
        self._limiter = MovingWindowRateLimiter(storage)
        self.clock = clock
        self._probe: asyncio.Task[None] | None = None
        self._is_closed = False
        self.num_outages = 0
        self.is_down = False

    async def hit(self, bucket: Bucket, cost: int = 1) -> bool:
        """Take `cost` out of a bucket; false, and nothing taken, when it has not so much left.

        Raises:
            StoreDown.
        """
        return await self._ask(lambda: self._limiter.hit(_item(bucket), bucket.name, cost=cost))

    async def room(self, bucket: Bucket) -> Room:
        """What a bucket has left.

        Raises:
            StoreDown.
        """
        return await self._ask(lambda: self._room(bucket))

    async def rooms(self, first: Bucket, second: Bucket) -> tuple[Room, Room]:
        """The same of two, within one deadline.

        Raises:
            StoreDown.
        """

        async def ask() -> tuple[Room, Room]:
            return await self._room(first), await self._room(second)

        return await self._ask(ask)

    async def add(self, counter: Counter, amount: int) -> int:
        """Add to a counter, or take from it where `amount` is negative; what it is then.

        Raises:
            StoreDown.
        """
        return await self._ask(lambda: self._storage.incr(_key(counter), counter.expires_in_s, amount))

    async def count(self, counter: Counter) -> int:
        """What a counter is.

        Raises:
            StoreDown.
        """
        return await self._ask(lambda: self._storage.get(_key(counter)))

    async def aclose(self) -> None:
        """Stop probing and hang up; for the latter the package itself has no word."""
        self._is_closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        bridge = getattr(self._storage, "bridge", None)
        if bridge is not None:
            await bridge.get_connection().aclose(close_connection_pool=True)

    async def _room(self, bucket: Bucket) -> Room:
        stats = await self._limiter.get_window_stats(_item(bucket), bucket.name)
        if stats.remaining >= bucket.amount:
            return Room(bucket.amount, 0.0)
        return Room(max(0, stats.remaining), min(max(0.0, stats.reset_time - self.clock()), float(bucket.window_s)))

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        if self._is_own_memory:
            return await ask()
        if self.is_down:
            raise StoreDown
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await ask()
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own, and none may fail a request
            self._note_failure(error)
            raise StoreDown from None

    def _note_failure(self, error: Exception) -> None:
        """Once an outage. The error's text stays out of the log: it may hold the address, and with it a password."""
        if self.is_down or self._is_closed:
            return
        self.is_down = True
        self.num_outages += 1
        log.error("limits.storage_down", reason=type(error).__name__)
        self._probe = asyncio.create_task(self._probe_until_up())

    async def _probe_until_up(self) -> None:
        """Write as requests do: a Redis that is full, or a replica, answers a ping and refuses every hit."""
        while self.is_down:
            await asyncio.sleep(PROBE_EVERY_S)
            with suppress(Exception):
                async with asyncio.timeout(DEADLINE_S):
                    await self._limiter.hit(_item(_PROBE), _PROBE.name)
                self.is_down = False
        log.warning("limits.storage_up")


def _key(counter: Counter) -> str:
    return f"{_NAMESPACE}/{counter.name}"


def _item(bucket: Bucket) -> RateLimitItem:
    return _item_of(bucket.amount, bucket.window_s)


@lru_cache(maxsize=1024)
def _item_of(amount: int, window_s: int) -> RateLimitItem:
    return _Item(amount, window_s, namespace=_NAMESPACE)


def open_store(settings: Settings, clock: Callable[[], float] | None = None) -> LimitStore:
    """The storage that `RATE_LIMIT_STORAGE` names. `clock` is for tests, and for counters in memory only.

    Raises:
        SettingsError: there is no such storage, or the package that speaks to it is missing.
    """
    uri = settings.rate_limit_storage
    if uri.startswith("async+memory:"):
        clock = clock or time.monotonic
        return LimitStore(MovingWindows(clock), clock, is_own_memory=True)
    try:
        storage = storage_from_string(uri, **_options(uri))
        if not isinstance(storage, Storage):
            _refuse("needs a storage URI that begins with async+")
        return LimitStore(storage, time.time)  # the storages of the package count in Unix time
    except ConfigurationError:
        _refuse("this storage is unknown, its address is incomplete, or its package is missing")
    except (NotImplementedError, ValueError):
        _refuse("this storage cannot count in moving windows: use async+memory:// or async+redis://host:6379")


def _options(uri: str) -> dict[str, Any]:
    """redis-py for Redis: it has no dependencies, and one quick second try finds connections that have died."""
    match = _REDIS.match(uri)
    if match is None:
        return {}
    try:
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        _refuse("Redis needs one more package: pip install 'embedyard[redis]'")
    options: dict[str, Any] = {"implementation": "redispy", "retry": Retry(NoBackoff(), 1)}
    if match[1] in ("redis", "rediss", "redis+unix"):
        url = uri.removeprefix("async+").replace("redis+unix:", "unix:")
        pool = BlockingConnectionPool.from_url(
            url, max_connections=_MAX_CONNECTIONS, timeout=DEADLINE_S, retry=options.pop("retry")
        )
        options["connection_pool"] = pool
    return options


def _refuse(what: str) -> NoReturn:
    raise SettingsError((f"RATE_LIMIT_STORAGE: {what}",))
