"""`ConcurrencyLimiter`: limits running requests and incoming bodies, per caller and in total."""

import asyncio
from collections import Counter, deque
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from msgspec import Struct

from router.auth.keys import Key
from router.config.settings import Settings
from router.errors import TooManyRequests
from router.limits.budgets import Limit

_MINUTE_S = 60
_BODY_BYTES = 64 * 2**20

_MAX_INCOMING_BYTES = 512 * 2**20
"""Total bytes of bodies being received; one caller may have half of it. Always fits four bodies of maximum size."""

_MAX_WAITING = 1024
"""Requests that may wait for a running one to end. Their bodies count as incoming meanwhile."""

_SUBSCRIBER_BITS = 64
"""An IPv6 subscriber has a whole network of this prefix, and may use another address for each request."""


class Caller(Struct, frozen=True):
    """A caller whose requests are counted together, and its limits; `None`: no limit.

    `name` identifies the counters; `label` stands for the caller in messages.
    """

    name: str
    label: str
    requests: Limit | None = None
    tokens: Limit | None = None
    max_concurrent: int | None = None


def caller_of(key: Key, address: str, settings: Settings) -> Caller:
    """Identify the caller. A key's own limits override the server's; callers without a key are counted by address."""
    requests = _limit(key.requests_per_minute, settings.rate_limit_requests, settings.rate_limit_window_s)
    tokens = _limit(key.tokens_per_minute, settings.rate_limit_tokens, settings.rate_limit_window_s)
    if key.is_anonymous:
        return Caller(f"address:{_subscriber(address)}", "this address", requests, tokens)
    return Caller(f"key:{key.id}", "this key", requests, tokens, key.max_concurrent)


def _limit(per_minute: int | None, of_server: int | None, window_s: int) -> Limit | None:
    if per_minute is not None:
        return Limit(per_minute, _MINUTE_S)
    return None if of_server is None else Limit(of_server, window_s)


@lru_cache(maxsize=1024)
def _subscriber(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return f"{IPv6Address(int(found) >> _SUBSCRIBER_BITS << _SUBSCRIBER_BITS)}/{_SUBSCRIBER_BITS}"


class ConcurrencyLimiter:
    """Counts running requests, per caller and in total, and bytes of bodies being received.

    A request counts for its caller from its head on, and for the server once its body is complete: a client that sends
    a body byte by byte uses up its own limit, and none of the server's. When as many run as may, a complete request
    waits for one of them to end. Places are given to the waiting callers in turn, so that one with many requests does
    not delay the others. Flex requests, which may wait for long, have as many places of their own.
    """

    def __init__(self, max_running: int, max_body_bytes: int = _BODY_BYTES, max_wait_s: float = 0.0) -> None:
        """`max_body_bytes`: maximum size of one body; `max_wait_s`: the longest wait of a request for its place."""
        self._max_running = max_running
        self._max_wait_s = max_wait_s
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self.num_waiting = 0
        self._max_incoming_bytes = max(4 * max_body_bytes, _MAX_INCOMING_BYTES)
        self._admitted: Counter[str] = Counter()
        self._incoming_bytes: Counter[str] = Counter()
        self.num_running = self.num_flex = 0
        self.incoming_bytes = 0

    def admit(self, caller: Caller) -> None:
        """Count a request for its caller, before its body is received.

        Raises:
            TooManyRequests: the concurrency limit of the caller or of the server is reached.
        """
        of_caller = self._admitted.get(caller.name, 0)
        if caller.max_concurrent is not None and of_caller >= caller.max_concurrent:
            raise TooManyRequests(
                f"Concurrency limit reached: {caller.label} has {of_caller} of {caller.max_concurrent} requests "
                "running; wait for a response before the next request"
            )
        self._check_capacity(caller)
        self._admitted[caller.name] = of_caller + 1

    def try_acquire(self) -> bool:
        """Count a request whose body is complete as running, if there is a place and no other request waits for one."""
        if self.num_running >= self._max_running or self.num_waiting:
            return False
        self.num_running += 1
        return True

    async def acquire(self, caller: Caller) -> None:
        """Wait for a place, and count a request whose body is complete as running.

        Raises:
            TooManyRequests: too many wait already, or no request ended in time.
        """
        self._check_capacity(caller)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._waiting.setdefault(caller.name, deque())
        line.append(place)
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self.release()  # the place came in the same round as the cancellation
            else:
                self._leave(caller, place)
            if isinstance(error, TimeoutError):
                raise self._no_capacity(f"none ended within {self._max_wait_s:g} s") from None
            raise

    def release(self) -> None:
        """Uncount a running request, or hand its place to one that waits."""
        while self._waiting:
            name = next(iter(self._waiting))
            line = self._waiting.pop(name)
            place = line.popleft()
            self.num_waiting -= 1
            if line:
                self._waiting[name] = line  # behind the other callers
            if not place.done():  # else its request was cancelled, and has not run since
                place.set_result(None)
                return
        self.num_running -= 1

    def acquire_flex(self) -> None:
        """Count a running request as a flex request, and hand its place on.

        Raises:
            TooManyRequests: as many flex requests run as may; nothing was changed.
        """
        if self.num_flex >= self._max_running:
            raise TooManyRequests(
                f"Concurrency limit reached: {self.num_flex} flex requests running "
                f"(MAX_CONCURRENT_REQUESTS={self._max_running}); retry"
            )
        self.num_flex += 1
        self.release()

    def release_flex(self) -> None:
        """Uncount a flex request."""
        self.num_flex -= 1

    def release_admission(self, caller: Caller) -> None:
        """Uncount a request for its caller."""
        _subtract(self._admitted, caller, 1)

    def receive(self, caller: Caller, num_bytes: int) -> None:
        """Count a chunk of an incomplete body.

        Raises:
            TooManyRequests: the bodies of this caller, or of all callers, are too large; nothing was counted.
        """
        limit = self._max_incoming_bytes // 2
        of_caller = self._incoming_bytes[caller.name] + num_bytes
        if of_caller > limit:
            raise TooManyRequests(
                f"Limit of incoming bodies reached: {caller.label} is sending {of_caller} bytes (maximum {limit}); "
                "send fewer requests at a time"
            )
        if self.incoming_bytes + num_bytes > self._max_incoming_bytes:
            raise TooManyRequests(
                f"Limit of incoming bodies reached: the server is receiving {self.incoming_bytes + num_bytes} bytes "
                f"(maximum {self._max_incoming_bytes}); retry"
            )
        self._incoming_bytes[caller.name] = of_caller
        self.incoming_bytes += num_bytes

    def end_body(self, caller: Caller, num_bytes: int) -> None:
        """Uncount the chunks of a body that is complete or was abandoned."""
        self.incoming_bytes -= num_bytes
        _subtract(self._incoming_bytes, caller, num_bytes)

    def _leave(self, caller: Caller, place: asyncio.Future[None]) -> None:
        line = self._waiting.get(caller.name)
        if line is None or place not in line:
            return  # `release` has passed over it
        line.remove(place)
        self.num_waiting -= 1
        if not line:
            del self._waiting[caller.name]

    def _check_capacity(self, caller: Caller) -> None:
        """Refuse a request that could not even wait. One caller may have half of the places to wait in."""
        if self.num_running < self._max_running and not self.num_waiting:
            return
        if not self._max_wait_s:
            raise self._no_capacity("")
        if self.num_waiting >= _MAX_WAITING or len(self._waiting.get(caller.name, ())) >= _MAX_WAITING // 2:
            raise self._no_capacity(f"{self.num_waiting} waiting")

    def _no_capacity(self, why: str) -> TooManyRequests:
        return TooManyRequests(
            f"Concurrency limit reached: {self.num_running} requests running "
            f"(MAX_CONCURRENT_REQUESTS={self._max_running}){f', {why}' if why else ''}; retry"
        )


def _subtract(counts: Counter[str], caller: Caller, amount: int) -> None:
    left = counts[caller.name] - amount
    if left:
        counts[caller.name] = left
    else:
        del counts[caller.name]
