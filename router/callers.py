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
    """How many requests are inside, of each caller and of all."""

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._inside: Counter[str] = Counter()
        self.num_inside = 0

    def enter(self, caller: Caller) -> None:
        """Let one more in.

        Raises:
            TooManyRequests: there is no room.
        """
        of_caller = self._inside[caller.name]
        if caller.max_concurrent is not None and of_caller >= caller.max_concurrent:
            raise TooManyRequests(
                f"{caller.words} has {of_caller} requests running, and may have {caller.max_concurrent} at once: "
                "wait for an answer before the next"
            )
        if self.num_inside >= self._max_inside:
            raise TooManyRequests(
                f"The server has {self.num_inside} requests running, and runs {self._max_inside} at once: try again"
            )
        self._inside[caller.name] += 1
        self.num_inside += 1

    def leave(self, caller: Caller) -> None:
        """One of those that were let in has gone."""
        self.num_inside -= 1
        self._inside[caller.name] -= 1
        if not self._inside[caller.name]:
            del self._inside[caller.name]
