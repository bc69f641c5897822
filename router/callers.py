"""Whose requests are counted together, what limits they have, and how many of them are inside the server now."""

from collections import Counter
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from msgspec import Struct

from router.budgets import Limit
from router.errors import TooManyRequests
from router.keys import Key
from router.settings import Settings

_MINUTE_S = 60
_BODY_BYTES = 64 * 2**20
_INCOMING_BYTES = 512 * 2**20
"""Of bodies that are being read, together; half of it for one caller. Four of the largest bodies fit in any case."""
_SUBSCRIBER_BITS = 64
"""An IPv6 subscriber has a whole network of this prefix, and may take another address for each request."""


class Caller(Struct, frozen=True):
    """Whose requests are counted together, and how many there may be; `None`: no limit.

    `name` is that of the counters; `words` stand for the caller in messages.
    """

    name: str
    words: str
    requests: Limit | None = None
    tokens: Limit | None = None
    max_concurrent: int | None = None


def caller_of(key: Key, address: str, settings: Settings) -> Caller:
    """A key's own limits win over the server's. Callers without a key are known by their address."""
    requests = _limit(key.requests_per_minute, settings.rate_limit_requests, settings.rate_limit_window_s)
    tokens = _limit(key.tokens_per_minute, settings.rate_limit_tokens, settings.rate_limit_window_s)
    if key.is_anonymous:
        return Caller(f"address:{_subscriber(address)}", "This address", requests, tokens)
    return Caller(f"key:{key.id}", "This key", requests, tokens, key.max_concurrent)


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


class Door:
    """How many requests are inside, of each caller and of all, and how many bytes of bodies that are on their way.

    A request counts for its caller from its head on, and for the server once its body is there: whoever sends a body
    byte by byte takes what is his own, and no place that somebody else could have.
    """

    def __init__(self, max_inside: int, max_body_bytes: int = _BODY_BYTES) -> None:
        """`max_body_bytes`: of one body."""
        self._max_inside = max_inside
        self._max_incoming_bytes = max(4 * max_body_bytes, _INCOMING_BYTES)
        self._admitted: Counter[str] = Counter()
        self._incoming_bytes: Counter[str] = Counter()
        self.num_inside = 0
        self.incoming_bytes = 0

    def admit(self, caller: Caller) -> None:
        """Let the caller send one more body.

        Raises:
            TooManyRequests: the caller, or the server, has no room for the request.
        """
        of_caller = self._admitted[caller.name]
        if caller.max_concurrent is not None and of_caller >= caller.max_concurrent:
            raise TooManyRequests(
                f"{caller.words} has {of_caller} requests running, and may have {caller.max_concurrent} at once: "
                "wait for an answer before the next"
            )
        self._check_places()
        self._admitted[caller.name] += 1

    def enter(self) -> None:
        """Give a request whose body is there its place.

        Raises:
            TooManyRequests: there is none.
        """
        self._check_places()
        self.num_inside += 1

    def leave(self) -> None:
        """One of those that had a place has gone."""
        self.num_inside -= 1

    def dismiss(self, caller: Caller) -> None:
        """One of those that were admitted has gone."""
        _subtract(self._admitted, caller, 1)

    def receive(self, caller: Caller, num_bytes: int) -> None:
        """Count a piece of a body that is not whole yet.

        Raises:
            TooManyRequests: the bodies of this caller, or of all, are too much; nothing was counted.
        """
        limit = self._max_incoming_bytes // 2
        of_caller = self._incoming_bytes[caller.name] + num_bytes
        if of_caller > limit:
            raise TooManyRequests(
                f"{caller.words} is sending bodies of {of_caller} bytes, and may send {limit} at once: send fewer "
                "requests at a time"
            )
        if self.incoming_bytes + num_bytes > self._max_incoming_bytes:
            raise TooManyRequests(
                f"The server is reading bodies of {self.incoming_bytes} bytes, and reads {self._max_incoming_bytes} "
                "at once: try again"
            )
        self._incoming_bytes[caller.name] = of_caller
        self.incoming_bytes += num_bytes

    def received(self, caller: Caller, num_bytes: int) -> None:
        """A body of which so much was counted is whole, or will never be."""
        self.incoming_bytes -= num_bytes
        _subtract(self._incoming_bytes, caller, num_bytes)

    def _check_places(self) -> None:
        if self.num_inside >= self._max_inside:
            raise TooManyRequests(
                f"The server has {self.num_inside} requests running, and runs {self._max_inside} at once: try again"
            )


def _subtract(counts: Counter[str], caller: Caller, amount: int) -> None:
    counts[caller.name] -= amount
    if not counts[caller.name]:
        del counts[caller.name]
