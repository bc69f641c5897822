"""`LimitStore`: counters in a storage of the `limits` package, with a timeout and one log line per outage.

Independent of keys and requests.
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
    """The hits of one key as (time, cost), oldest first."""

    hits: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0
    expires_at: float = 0.0

    def drop_before(self, before: float) -> None:
        """Drop hits older than `before`."""
        while self.hits and self.hits[0][0] < before:
            self.used -= self.hits.popleft()[1]


class Number(Struct):
    """A counter with an expiry."""

    value: int = 0
    expires_at: float = 0.0


class MovingWindows(MemoryStorage):
    """In-memory storage of moving windows. A hit counts until it is older than the window: two hits exactly one window
    apart are in one window.

    Args:
        clock: monotonic seconds.
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
        """Add to a counter and return it; one that was 0 expires `expiry` seconds from now, as in Redis."""
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
        """Return a counter's value; 0 when it does not exist."""
        number = self._numbers.get(key)
        return 0 if number is None or number.expires_at < self._clock() else number.value

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count a hit of this cost if it fits into the window as a whole."""
        now = self._clock()
        self._sweep(now, expiry)
        window = self._windows.setdefault(key, Window())
        window.drop_before(now - expiry)
        if window.used + amount > limit:
            return False
        window.hits.append((now, amount))
        window.used += amount
        window.expires_at = now + expiry
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Return the time of the oldest hit (now without hits), and the cost of all hits, at most `limit`."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None:
            return now, 0
        window.drop_before(now - expiry)
        return window.hits[0][0] if window.hits else now, min(window.used, limit)

    async def clear(self, key: str) -> None:
        """Delete the hits of a key."""
        self._windows.pop(key, None)
        self._numbers.pop(key, None)
        await super().clear(key)

    async def reset(self) -> int | None:
        """Delete everything."""
        count = len(self)
        self._windows.clear()
        self._numbers.clear()
        return count + (await super().reset() or 0)

    def _sweep(self, now: float, expiry: float) -> None:
        """Drop expired keys once per window, otherwise addresses would pile up."""
        if now < self._sweep_at:
            return
        self._sweep_at = now + expiry
        self._windows = {key: window for key, window in self._windows.items() if window.expires_at >= now}
        self._numbers = {key: number for key, number in self._numbers.items() if number.expires_at >= now}


log = structlog.get_logger()

T = TypeVar("T")

STORE_TIMEOUT_S = 1.0
"""Longer than any healthy storage takes, also when this server is busy; shorter than clients wait. Only the calls that
meet an outage first wait so long: afterwards every call fails at once until a probe succeeds."""

PROBE_INTERVAL_S = 1.0

_MAX_CONNECTIONS = 16
"""A call takes a fraction of a millisecond: under load, waiting for a connection beats opening many."""

_REDIS = re.compile(r"async\+(redis(?:s|\+\w+)?)://")
_NAMESPACE = "embedyard"


class StoreDown(Exception):
    """The storage timed out or failed."""


class Bucket(Struct, frozen=True):
    """A moving window: `name` (what is counted, and for which caller), and the `amount` that it admits."""

    name: str
    amount: int
    window_s: int


class Counter(Struct, frozen=True):
    """A number that goes up and down, and expires so many seconds after it was last 0."""

    name: str
    expires_in_s: int


class BudgetRoom(Struct, frozen=True):
    """What is left in a bucket, and the seconds until its oldest hit expires; 0 without hits."""

    left: int
    grows_in_s: float


_PROBE = Bucket("probe", 1, 1)


class _Item(RateLimitItemPerSecond):
    """A limit whose key does not depend on the amount: a changed limit keeps its window."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return "/".join(map(str, (self.namespace, *identifiers, self.multiples)))


class LimitStore:
    """Moving windows and counters in a storage of the `limits` package.

    While the storage is down, a task probes it once a second; calls fail at once.

    Attributes:
        clock: seconds, on the storage's time scale.
        num_outages: how often it went down.
        is_down: whether it is down now.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], *, is_own_memory: bool = False) -> None:
        """`is_own_memory`: the storage needs no timeout, which would cost as much as the rest of a call."""
        self._storage = storage
        self._is_own_memory = is_own_memory
        self._limiter = MovingWindowRateLimiter(storage)
        self.clock = clock
        self._probe: asyncio.Task[None] | None = None
        self._is_closed = False
        self.num_outages = 0
        self.is_down = False

    async def hit(self, bucket: Bucket, cost: int = 1) -> bool:
        """Take `cost` from a bucket; returns false, and takes nothing, when less is left.

        Raises:
            StoreDown.
        """
        return await self._call(lambda: self._limiter.hit(_item(bucket), bucket.name, cost=cost))

    async def room(self, bucket: Bucket) -> BudgetRoom:
        """Return what is left in a bucket.

        Raises:
            StoreDown.
        """
        return await self._call(lambda: self._room(bucket))

    async def rooms(self, first: Bucket, second: Bucket) -> tuple[BudgetRoom, BudgetRoom]:
        """Return what is left in two buckets, within one timeout.

        Raises:
            StoreDown.
        """

        async def call() -> tuple[BudgetRoom, BudgetRoom]:
            return await self._room(first), await self._room(second)

        return await self._call(call)

    async def add(self, counter: Counter, amount: int) -> int:
        """Add to a counter (`amount` may be negative); returns its new value.

        Raises:
            StoreDown.
        """
        return await self._call(lambda: self._storage.incr(_key(counter), counter.expires_in_s, amount))

    async def count(self, counter: Counter) -> int:
        """Return a counter's value.

        Raises:
            StoreDown.
        """
        return await self._call(lambda: self._storage.get(_key(counter)))

    async def aclose(self) -> None:
        """Stop probing and close the connections, for which the package has no method."""
        self._is_closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        bridge = getattr(self._storage, "bridge", None)
        if bridge is not None:
            await bridge.get_connection().aclose(close_connection_pool=True)

    async def _room(self, bucket: Bucket) -> BudgetRoom:
        stats = await self._limiter.get_window_stats(_item(bucket), bucket.name)
        if stats.remaining >= bucket.amount:
            return BudgetRoom(bucket.amount, 0.0)
        return BudgetRoom(
            max(0, stats.remaining), min(max(0.0, stats.reset_time - self.clock()), float(bucket.window_s))
        )

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._is_own_memory:
            return await call()
        if self.is_down:
            raise StoreDown
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await call()
        except Exception as error:  # noqa: BLE001 - each storage has its own errors, and none may fail a request
            self._on_failure(error)
            raise StoreDown from None

    def _on_failure(self, error: Exception) -> None:
        """Log once per outage. Without the error's text, which may contain the address with a password."""
        if self.is_down or self._is_closed:
            return
        self.is_down = True
        self.num_outages += 1
        log.error("limits.storage_down", reason=type(error).__name__)
        self._probe = asyncio.create_task(self._probe_until_up())

    async def _probe_until_up(self) -> None:
        """Probe with a hit: a Redis that is full, or a replica, answers a ping but refuses every hit."""
        while self.is_down:
            await asyncio.sleep(PROBE_INTERVAL_S)
            with suppress(Exception):
                async with asyncio.timeout(STORE_TIMEOUT_S):
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
    """Open the storage of `RATE_LIMIT_STORAGE`. `clock` is for tests, and applies to counters in memory only.

    Raises:
        SettingsError: the storage is unknown, or its package is missing.
    """
    uri = settings.rate_limit_storage
    if uri.startswith("async+memory:"):
        clock = clock or time.monotonic
        return LimitStore(MovingWindows(clock), clock, is_own_memory=True)
    try:
        storage = storage_from_string(uri, **_options(uri))
        if not isinstance(storage, Storage):
            _reject("must be a storage URI that begins with async+")
        return LimitStore(storage, time.time)  # the package's storages use Unix time
    except ConfigurationError:
        _reject("unknown storage, incomplete address, or missing package")
    except (NotImplementedError, ValueError):
        _reject("this storage does not support moving windows: use async+memory:// or async+redis://host:6379")


def _options(uri: str) -> dict[str, Any]:
    """Use redis-py for Redis: it has no dependencies; a single immediate retry replaces dead connections."""
    match = _REDIS.match(uri)
    if match is None:
        return {}
    try:
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        _reject("Redis requires another package: pip install 'embedyard[redis]'")
    options: dict[str, Any] = {"implementation": "redispy", "retry": Retry(NoBackoff(), 1)}
    if match[1] in ("redis", "rediss", "redis+unix"):
        url = uri.removeprefix("async+").replace("redis+unix:", "unix:")
        pool = BlockingConnectionPool.from_url(
            url, max_connections=_MAX_CONNECTIONS, timeout=STORE_TIMEOUT_S, retry=options.pop("retry")
        )
        options["connection_pool"] = pool
    return options


def _reject(what: str) -> NoReturn:
    raise SettingsError((f"RATE_LIMIT_STORAGE: {what}",))
