"""The counters behind limits, wherever they are kept: the `limits` package, a deadline, and outages told once.

Knows neither keys nor requests.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import structlog
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from msgspec import Struct

from router.moving_window import MovingWindows
from router.settings import Settings, SettingsError

log = structlog.get_logger()

T = TypeVar("T")

DEADLINE_S = 2.0
"""Longer than any healthy storage takes, also when this server is busy; shorter than clients wait."""
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


class Room(Struct, frozen=True):
    """What a bucket has left, and in how many seconds its oldest hit will have left it; 0 when it is untouched."""

    left: int
    grows_in_s: float


class _Item(RateLimitItemPerSecond):
    """A window whose counter survives a changed amount: else a new limit would begin with a fresh window."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return "/".join(map(str, (self.namespace, *identifiers, self.multiples)))


class LimitStore:
    """Moving windows in a storage of the `limits` package.

    While the storage is down, one call a second tries it; the others fail at once.

    Attributes:
        clock: seconds, as the storage counts them.
        num_outages: how often it went down.
        is_down: whether it is down now.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float]) -> None:
        self._storage = storage
        self._limiter = MovingWindowRateLimiter(storage)
        self.clock = clock
        self._probe_at = 0.0
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
        stats = await self._ask(lambda: self._limiter.get_window_stats(_item(bucket), bucket.name))
        if stats.remaining >= bucket.amount:
            return Room(bucket.amount, 0.0)
        return Room(max(0, stats.remaining), min(max(0.0, stats.reset_time - self.clock()), float(bucket.window_s)))

    async def aclose(self) -> None:
        """Hang up; the package itself has no word for it."""
        bridge = getattr(self._storage, "bridge", None)
        if bridge is not None:
            await bridge.get_connection().aclose(close_connection_pool=True)

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        now = time.monotonic()
        if self.is_down and now < self._probe_at:
            raise StoreDown
        self._probe_at = now + PROBE_EVERY_S
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer = await ask()
        except Exception as error:  # noqa: BLE001 - each storage has errors of its own, and none may fail a request
            self._note_failure(error)
            raise StoreDown from None
        if self.is_down:
            self.is_down = False
            log.warning("limits.storage_up")
        return answer

    def _note_failure(self, error: Exception) -> None:
        """Once an outage. The error's text stays out of the log: it may hold the address, and with it a password."""
        if not self.is_down:
            self.is_down = True
            self.num_outages += 1
            log.error("limits.storage_down", reason=type(error).__name__)


def _item(bucket: Bucket) -> RateLimitItem:
    return _Item(bucket.amount, bucket.window_s, namespace=_NAMESPACE)


def open_store(settings: Settings, clock: Callable[[], float] | None = None) -> LimitStore:
    """The storage that `RATE_LIMIT_STORAGE` names. `clock` is for tests, and for counters in memory only.

    Raises:
        SettingsError: there is no such storage, or the package that speaks to it is missing.
    """
    uri = settings.rate_limit_storage
    if uri.startswith("async+memory:"):
        clock = clock or time.monotonic
        return LimitStore(MovingWindows(clock), clock)
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
