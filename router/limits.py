"""How much a caller may ask for: how many requests at once, how many in a window, and how many tokens.

All of it is checked at the door, before the body is read. Knows no models.
"""

from math import ceil
from typing import cast

from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import HTTPReceiveMessage, Receive

from router.auth import Connection, Guard, key_of
from router.budgets import Balance, Limit, RequestBudget, TokenBudget
from router.callers import Caller, Door, caller_of
from router.errors import RateLimitExceeded
from router.limit_store import LimitStore, StoreDown
from router.settings import Settings
from router.visit import visit_of

RATE_HEADERS = {
    f"x-ratelimit-{word}-{family}": f"{meaning}; absent where there is no such limit."
    for family in ("requests", "tokens")
    for word, meaning in (
        ("limit", f"The {family} that a window admits"),
        ("remaining", f"The {family} that are left"),
        ("reset", "In how long the oldest use no longer counts: 6m0s, 1s, 120ms"),
    )
}
_TICK_S = 0.001
"""What is told in whole milliseconds must not be told too short."""


class Limiter:
    """The limits of one server."""

    def __init__(self, settings: Settings, store: LimitStore) -> None:
        self.settings = settings
        self.store = store
        self.door = Door(settings.max_concurrent_requests, settings.max_body_bytes)
        self.requests = RequestBudget(store)
        self.tokens = TokenBudget(store)
        self.fails_open = settings.rate_limit_on_error == "open"


class Ticket:
    """One request's way past the limits: `enter`, its body through `receiving`, `charge` when its tokens are known, and
    in any case `leave`.

    Args:
        headers: of the answer, to be filled with what is left.
    """

    def __init__(self, limiter: Limiter, caller: Caller, headers: dict[str, str]) -> None:
        self._limiter = limiter
        self._caller = caller
        self._headers = headers
        self._is_admitted = self._is_inside = False
        self._body_bytes = 0

    async def enter(self) -> None:
        """Let the caller send the request's body.

        Raises:
            TooManyRequests, RateLimitExceeded.
        """
        self._limiter.door.admit(self._caller)
        self._is_admitted = True
        try:
            await self._check_tokens()
            await self._take_request()
        except StoreDown:
            if not self._limiter.fails_open:
                raise RateLimitExceeded(
                    "The storage of the limits does not answer, and without it no request is let in: try again"
                ) from None

    def receiving(self, receive: Receive) -> Receive:
        """Count what comes of the body; once it is whole, the request takes its place.

        What is returned raises TooManyRequests where there is no room.
        """

        async def receive_some() -> HTTPReceiveMessage:
            message = cast(HTTPReceiveMessage, await receive())
            if self._is_inside or message["type"] != "http.request":
                return message
            door = self._limiter.door
            if message["more_body"]:
                door.receive(self._caller, len(message["body"]))
                self._body_bytes += len(message["body"])
            else:
                self._forget_body()
                door.enter()
                self._is_inside = True
            return message

        return cast(Receive, receive_some)

    async def charge(self, tokens: int) -> None:
        """Count the tokens that the request took; a storage that is down forgets them."""
        caller = self._caller
        if caller.tokens is None:
            return
        try:
            balance = await self._limiter.tokens.charge(caller.name, caller.tokens, tokens)
        except StoreDown:
            return
        self._headers |= headers_of("tokens", balance)

    def leave(self) -> None:
        """Make room for another request; called again, it does nothing."""
        door = self._limiter.door
        self._forget_body()
        if self._is_inside:
            self._is_inside = False
            door.leave()
        if self._is_admitted:
            self._is_admitted = False
            door.dismiss(self._caller)

    def _forget_body(self) -> None:
        if self._body_bytes:
            self._limiter.door.received(self._caller, self._body_bytes)
            self._body_bytes = 0

    async def _check_tokens(self) -> None:
        caller = self._caller
        if caller.tokens is None:
            return
        balance = await self._limiter.tokens.look(caller.name, caller.tokens)
        self._headers |= headers_of("tokens", balance)
        if not balance.left:
            raise _exceeded(caller, "tokens", caller.tokens, balance)

    async def _take_request(self) -> None:
        caller = self._caller
        if caller.requests is None:
            return
        is_taken, balance = await self._limiter.requests.take(caller.name, caller.requests)
        self._headers |= headers_of("requests", balance)
        if not is_taken:
            raise _exceeded(caller, "requests", caller.requests, balance)


def _exceeded(caller: Caller, what: str, limit: Limit, balance: Balance) -> RateLimitExceeded:
    wait_s = balance.resets_in_s + _TICK_S
    return RateLimitExceeded(
        f"{caller.words} has used its {limit.amount} {what} in {limit.window_s} s: try again in {duration(wait_s)}",
        retry_after_s=wait_s,
    )


def headers_of(family: str, balance: Balance) -> dict[str, str]:
    """`x-ratelimit-*` of one family, `requests` or `tokens`, as OpenAI names and writes them."""
    return {
        f"x-ratelimit-limit-{family}": str(balance.limit),
        f"x-ratelimit-remaining-{family}": str(balance.left),
        f"x-ratelimit-reset-{family}": duration(balance.resets_in_s),
    }


def duration(seconds: float) -> str:
    """`6m0s`, `1s`, `8.64s`, `120ms`: rounded up to milliseconds."""
    ms = ceil(round(seconds * 1000, 3))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] if hours else []
    parts += [f"{minutes}m"] if hours or minutes else []
    return "".join([*parts, f"{ms / 1000:g}s"])


class TextsHandler(HTTPRouteHandler):
    """Decorates routes that embed. Litestar copies a route for each of its guards, for each request: 17 µs a guard, and
    ours do not touch it."""

    async def authorize_connection(self, connection: Connection) -> None:
        """Ask all guards in turn."""
        for guard in self.resolve_guards():
            await cast(Guard, guard)(connection, self)


async def at_the_door(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard for routes that embed; it stands behind that of `router/auth.py`."""
    limiter: Limiter = connection.app.state.limiter
    visit = visit_of(connection)
    address = connection.client.host if connection.client else "unknown"
    caller = caller_of(key_of(connection), address, limiter.settings)
    ticket = Ticket(limiter, caller, visit.headers)
    visit.at_end(ticket.leave)
    connection.scope["state"]["ticket"] = ticket
    await ticket.enter()
    connection.receive = ticket.receiving(connection.receive)


def ticket_of(connection: Connection) -> Ticket:
    """The ticket with which a request came in."""
    ticket: Ticket = connection.scope["state"]["ticket"]
    return ticket
