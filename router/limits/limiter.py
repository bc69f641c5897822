"""How much a caller may ask for: how many requests at once, how many in a window, and how many tokens.

All of it is checked at the door, before the body is read, but for the tokens of the request itself: they are reserved
when its inputs are known, and exchanged for what it used when it ends. Knows no models.
"""

from collections import Counter
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from math import ceil
from typing import cast

from litestar.handlers import BaseRouteHandler
from litestar.types import HTTPReceiveMessage, Receive
from msgspec import Struct

from engines.types import EmbedCall
from router.auth.guards import Connection, key_of
from router.auth.keys import Key
from router.config.settings import Settings
from router.errors import RateLimitExceeded, RequestExceedsLimit, TooManyRequests
from router.limits.budgets import Balance, Limit, RequestBudget, Reservation, TokenBudget
from router.limits.store import LimitStore, StoreDown
from router.observability.request_context import context_of

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
    label: str
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


class ConcurrencyLimiter:
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
                f"{caller.label} has {of_caller} requests running, and may have {caller.max_concurrent} at once: "
                "wait for an answer before the next"
            )
        self._check_places()
        self._admitted[caller.name] += 1

    def acquire(self) -> None:
        """Give a request whose body is there its place.

        Raises:
            TooManyRequests: there is none.
        """
        self._check_places()
        self.num_inside += 1

    def release(self) -> None:
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
                f"{caller.label} is sending bodies of {of_caller} bytes, and may send {limit} at once: send fewer "
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


RATE_HEADERS = {
    f"x-ratelimit-{word}-{family}": f"{meaning}; absent where there is no such limit."
    for family in ("requests", "tokens")
    for word, meaning in (
        ("limit", f"The {family} that a window admits"),
        ("remaining", f"The {family} that are left"),
        ("reset", "In how long the oldest use no longer counts: 6m0s, 1s, 120ms"),
    )
}


_CHARS_PER_TOKEN = 4


_SAMPLE_CHARS = 256


_SPECIAL_TOKENS = 2


_RUNNING_S = 1.0
"""When to ask again where running requests hold the tokens, and nothing was used yet."""


_TICK_S = 0.001
"""What is told in whole milliseconds must not be told too short."""


class Limiter:
    """The limits of one server."""

    def __init__(self, settings: Settings, store: LimitStore) -> None:
        self.settings = settings
        self.store = store
        self.concurrency = ConcurrencyLimiter(settings.max_concurrent_requests, settings.max_body_bytes)
        self.requests = RequestBudget(store)
        self.tokens = TokenBudget(store)
        self.fails_open = settings.rate_limit_on_error == "open"


class RequestPermit:
    """One request's way past the limits: `enter`, its body through `receiving`, `reserve` when its inputs are known,
    `settle` when its work has ended, and in any case `leave`.

    Args:
        headers: of the answer, to be filled with what is left.
    """

    def __init__(self, limiter: Limiter, caller: Caller, headers: dict[str, str]) -> None:
        self._limiter = limiter
        self._caller = caller
        self._headers = headers
        self._is_admitted = self._is_inside = False
        self._body_bytes = 0
        self._reservation: Reservation | None = None

    async def acquire(self) -> None:
        """Let the caller send the request's body.

        Raises:
            TooManyRequests, RateLimitExceeded.
        """
        self._limiter.concurrency.admit(self._caller)
        self._is_admitted = True
        try:
            await self._check_tokens()
            await self._take_request()
        except StoreDown:
            self._let_in_or_refuse()

    def receiving(self, receive: Receive) -> Receive:
        """Count what comes of the body; once it is whole, the request takes its place.

        What is returned raises TooManyRequests where there is no room.
        """

        async def receive_some() -> HTTPReceiveMessage:
            message = cast(HTTPReceiveMessage, await receive())
            if self._is_inside or message["type"] != "http.request":
                return message
            door = self._limiter.concurrency
            if message["more_body"]:
                door.receive(self._caller, len(message["body"]))
                self._body_bytes += len(message["body"])
            else:
                self._forget_body()
                door.acquire()
                self._is_inside = True
            return message

        return cast(Receive, receive_some)

    async def reserve(self, tokens: int, *, is_certain: bool) -> None:
        """Set tokens aside for this request; `settle` must follow. Without a limit of tokens it does nothing.

        Args:
            tokens: about as many as it will take.
            is_certain: whether it cannot be far fewer, so that more than a window admits are refused for good. Else it
                may have a whole window to itself.

        Raises:
            RateLimitExceeded: running requests and those before leave too few.
            RequestExceedsLimit: no window admits so many.
        """
        caller = self._caller
        if caller.tokens is None:
            return
        if tokens > caller.tokens.amount and is_certain:
            raise RequestExceedsLimit(
                f"This request has about {tokens} tokens, and {caller.label.lower()} may use {caller.tokens.amount} in "
                f"{caller.tokens.window_s} s: send fewer or shorter inputs a request"
            )
        tokens = min(tokens, caller.tokens.amount)
        try:
            self._reservation, balance = await self._limiter.tokens.reserve(caller.name, caller.tokens, tokens)
        except StoreDown:
            self._let_in_or_refuse()
            return
        self._headers |= headers_of("tokens", balance)
        if self._reservation is None:
            raise _too_few_left(caller, caller.tokens, tokens, balance)

    async def settle(self, tokens: int) -> None:
        """Give back what was reserved and count what was used; a storage that is down forgets it."""
        caller, reservation, self._reservation = self._caller, self._reservation, None
        if caller.tokens is None:
            return
        budget = self._limiter.tokens
        try:
            if reservation is not None and not tokens:
                await budget.release(reservation)
            elif reservation is not None:
                self._headers |= headers_of("tokens", await budget.settle(reservation, tokens))
            elif tokens:  # the storage was down then
                self._headers |= headers_of("tokens", await budget.charge(caller.name, caller.tokens, tokens))
        except StoreDown:
            return

    @property
    def reserved_tokens(self) -> int:
        """What is set aside for this request now."""
        return self._reservation.tokens if self._reservation is not None else 0

    @property
    def counts_tokens(self) -> bool:
        """Whether the caller has a limit of tokens."""
        return self._caller.tokens is not None

    def release(self) -> None:
        """Make room for another request; called again, it does nothing."""
        door = self._limiter.concurrency
        self._forget_body()
        if self._is_inside:
            self._is_inside = False
            door.release()
        if self._is_admitted:
            self._is_admitted = False
            door.dismiss(self._caller)

    def _forget_body(self) -> None:
        if self._body_bytes:
            self._limiter.concurrency.received(self._caller, self._body_bytes)
            self._body_bytes = 0

    def _let_in_or_refuse(self) -> None:
        """What a storage that is down means."""
        if not self._limiter.fails_open:
            raise RateLimitExceeded(
                "The storage of the limits does not answer, and without it no request is let in: try again"
            ) from None

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
        f"{caller.label} has used its {limit.amount} {what} in {limit.window_s} s: try again in {duration(wait_s)}",
        retry_after_s=wait_s,
    )


def _too_few_left(caller: Caller, limit: Limit, tokens: int, balance: Balance) -> RateLimitExceeded:
    wait_s = (balance.resets_in_s or _RUNNING_S) + _TICK_S
    return RateLimitExceeded(
        f"This request has about {tokens} tokens, and {caller.label.lower()} has {balance.left} left of its "
        f"{limit.amount} in {limit.window_s} s, running requests counted: try again in {duration(wait_s)}",
        retry_after_s=wait_s,
    )


def estimate_tokens(call: EmbedCall, longest: int | None) -> int:
    """About how many tokens a request will take, without a tokenizer, whose time is what the limit is to save.

    Told when the body has been decoded: its length alone says little where characters are escaped and token ids are
    written as numbers. Ids are counted. Texts are judged by their bytes in UTF-8, four a token (with MiniLM's tokenizer
    5.1 in English prose, 3.6 in code, 3.0 in Chinese), of a sample: what it costs must not grow with a text.

    Args:
        longest: tokens that the model reads of one input; None where that is not known.
    """
    if call.token_ids:
        sizes = [len(ids) for ids in call.token_ids]
    else:
        frame = len(call.prompt or "") + len(call.instruction or "")
        sizes = [_text_tokens(text) + frame // _CHARS_PER_TOKEN for text in call.texts]
    return sum(sizes) if longest is None else sum(min(size, longest) for size in sizes)


def _text_tokens(text: str) -> int:
    num_bytes = len(text)
    if not text.isascii():
        sample = text[:_SAMPLE_CHARS]
        num_bytes = num_bytes * len(sample.encode(errors="surrogatepass")) // len(sample)
    return -(-num_bytes // _CHARS_PER_TOKEN) + _SPECIAL_TOKENS


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


def limiter_of(connection: Connection) -> Limiter:
    """Return the limiter of the server that a connection belongs to."""
    limiter: Limiter = connection.app.state.limiter
    return limiter


async def acquire_permit(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard for routes that embed; it stands behind that of `router/auth/guards.py`."""
    limiter = limiter_of(connection)
    visit = context_of(connection)
    address = connection.client.host if connection.client else "unknown"
    caller = caller_of(key_of(connection), address, limiter.settings)
    ticket = RequestPermit(limiter, caller, visit.headers)
    visit.on_finish(ticket.release)
    connection.scope["state"]["ticket"] = ticket
    await ticket.acquire()
    connection.receive = ticket.receiving(connection.receive)


def permit_of(connection: Connection) -> RequestPermit:
    """The ticket with which a request came in."""
    ticket: RequestPermit = connection.scope["state"]["ticket"]
    return ticket
