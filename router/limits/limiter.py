"""`Limiter`: limits per caller on concurrent requests, requests per window, and tokens per window.

All are checked before the body is read, except the request's own tokens: they are reserved when its inputs are known,
and replaced by the actual use when it ends. Independent of models.
"""

import asyncio
from collections.abc import Awaitable
from math import ceil
from typing import Any, cast

from litestar.handlers import BaseRouteHandler
from litestar.types import HTTPReceiveMessage, Receive

from engines.types import ModelCall, ScoreCall, TextCall
from router.auth.guards import Connection, key_of
from router.config.settings import Settings
from router.errors import ClientLeft, RateLimitExceeded, RequestExceedsLimit
from router.limits.answer_memory import AnswerMemory
from router.limits.budgets import Balance, Limit, RequestBudget, Reservation, TokenBudget
from router.limits.concurrency import Caller, ConcurrencyLimiter, caller_of
from router.limits.store import LimitStore, StoreDown
from router.observability.request_context import context_of

RATE_HEADERS = {
    f"x-ratelimit-{word}-{family}": f"{meaning}; absent without such a limit."
    for family in ("requests", "tokens")
    for word, meaning in (
        ("limit", f"Maximum {family} per window"),
        ("remaining", f"Remaining {family}"),
        ("reset", "Time until the oldest use expires: 6m0s, 1s, 120ms"),
    )
}

_CHARS_PER_TOKEN = 4
_SAMPLE_CHARS = 256
_SPECIAL_TOKENS = 2

_RETRY_RUNNING_S = 1.0
"""Retry-After when running requests have reserved the tokens, and nothing was used yet."""

_TICK_S = 0.001
"""Added to waits, which are rounded to milliseconds and must not be too short."""


class Limiter:
    """Holds the limits of one server."""

    def __init__(self, settings: Settings, store: LimitStore) -> None:
        self.settings = settings
        self.store = store
        self.concurrency = ConcurrencyLimiter(
            settings.max_concurrent_requests, settings.max_body_bytes, settings.concurrency_timeout_s
        )
        self.answers = AnswerMemory(settings.concurrency_timeout_s)
        self.requests = RequestBudget(store)
        self.tokens = TokenBudget(store)
        self.fails_open = settings.rate_limit_on_error == "open"


class RequestPermit:
    """Takes one request through the limits: `acquire`, then `receiving` for its body, `reserve` when its inputs are
    known, `settle` when its work has ended, and in any case `release`.

    Args:
        headers: of the response; the `x-ratelimit-*` headers are added to them.
    """

    def __init__(self, limiter: Limiter, caller: Caller, headers: dict[str, str]) -> None:
        self._limiter = limiter
        self._caller = caller
        self._headers = headers
        self._is_admitted = self._is_running = self._is_flex = False
        self._body_bytes = self._answer_bytes = 0
        self._reservation: Reservation | None = None

    async def acquire(self) -> None:
        """Admit the request, before its body is received.

        Raises:
            TooManyRequests, RateLimitExceeded.
        """
        self._limiter.concurrency.admit(self._caller)
        self._is_admitted = True
        caller = self._caller
        if caller.tokens is None and caller.requests is None:
            return
        try:
            await self._check_tokens()
            await self._count_request()
        except StoreDown:
            self._check_fail_open()

    def receiving(self, receive: Receive) -> Receive:
        """Wrap `receive` to count the body; once it is complete, the request waits for a place and counts as running.

        The wrapper raises TooManyRequests when a limit is reached, and ClientLeft when the client disconnects while the
        request waits.
        """

        async def count_and_receive() -> HTTPReceiveMessage:
            message: HTTPReceiveMessage = await receive()  # type: ignore[assignment]  # not of a WebSocket
            if self._is_running or message["type"] != "http.request":
                return message
            concurrency = self._limiter.concurrency
            if not message["more_body"] and concurrency.try_acquire():
                self._is_running = True
                if self._body_bytes:
                    self._end_body()
                return message
            concurrency.receive(self._caller, len(message["body"]))
            self._body_bytes += len(message["body"])
            if message["more_body"]:
                return message
            await self._wait_for_place(receive)
            self._is_running = True
            if self._body_bytes:
                self._end_body()
            return message

        return count_and_receive

    async def _wait_for_place(self, receive: Receive) -> None:
        """Wait until the request may run, unless its client disconnects."""
        place = asyncio.ensure_future(self._limiter.concurrency.acquire(self._caller))
        disconnected = asyncio.ensure_future(cast(Awaitable[Any], receive()))
        try:
            await asyncio.wait((place, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise ClientLeft
            place.result()
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._limiter.concurrency.release()
            raise
        finally:
            for task in (place, disconnected):
                task.cancel()

    def become_flex(self) -> None:
        """Exchange the place among the running requests for one among the flex requests, which may run for long.

        Raises:
            TooManyRequests: as many flex requests run as may.
        """
        if self._is_running and not self._is_flex:
            self._limiter.concurrency.acquire_flex()
            self._is_flex = True

    async def reserve_answer(self, num_bytes: int) -> None:
        """Wait until memory for a large answer is free, and hold it until the request ends.

        Raises:
            TooManyRequests: other large answers hold it, and too few of them were sent in time.
        """
        await self._limiter.answers.hold(self._caller.name, num_bytes)
        self._answer_bytes += num_bytes

    async def reserve(self, tokens: int, *, is_certain: bool) -> None:
        """Reserve tokens for this request; `settle` must follow. Does nothing without a token limit.

        Args:
            tokens: estimate of the use.
            is_certain: whether the estimate is close, so that more than a window admits is refused for good. Else such
                a request may have a whole window to itself.

        Raises:
            RateLimitExceeded: too few tokens are left beside running and earlier requests.
            RequestExceedsLimit: the request needs more tokens than a window admits.
        """
        caller = self._caller
        if caller.tokens is None:
            return
        if tokens > caller.tokens.amount and is_certain:
            raise RequestExceedsLimit(
                f"Request too large: about {tokens} tokens, and the limit of {caller.label} is "
                f"{caller.tokens.amount} per {caller.tokens.window_s} s; send fewer or shorter inputs per request"
            )
        tokens = min(tokens, caller.tokens.amount)
        try:
            self._reservation, balance = await self._limiter.tokens.reserve(caller.name, caller.tokens, tokens)
        except StoreDown:
            self._check_fail_open()
            return
        self._headers |= headers_of("tokens", balance)
        if self._reservation is None:
            raise _insufficient(caller, caller.tokens, tokens, balance)

    async def settle(self, tokens: int) -> None:
        """Release the reservation and count the actual use; neither is counted while the storage is down."""
        caller, reservation, self._reservation = self._caller, self._reservation, None
        if caller.tokens is None:
            return
        budget = self._limiter.tokens
        try:
            if reservation is not None and not tokens:
                await budget.release(reservation)
            elif reservation is not None:
                self._headers |= headers_of("tokens", await budget.settle(reservation, tokens))
            elif tokens:  # the storage was down at `reserve`
                self._headers |= headers_of("tokens", await budget.charge(caller.name, caller.tokens, tokens))
        except StoreDown:
            return

    @property
    def reserved_tokens(self) -> int:
        """Tokens reserved for this request now."""
        return self._reservation.tokens if self._reservation is not None else 0

    @property
    def counts_tokens(self) -> bool:
        """Whether the caller has a token limit."""
        return self._caller.tokens is not None

    def release(self) -> None:
        """Uncount the request. Idempotent."""
        concurrency = self._limiter.concurrency
        if self._body_bytes:
            self._end_body()
        if self._answer_bytes:
            self._limiter.answers.release(self._caller.name, self._answer_bytes)
            self._answer_bytes = 0
        if self._is_running:
            self._is_running = False
            (concurrency.release_flex if self._is_flex else concurrency.release)()
        if self._is_admitted:
            self._is_admitted = False
            concurrency.release_admission(self._caller)

    def _end_body(self) -> None:
        self._limiter.concurrency.end_body(self._caller, self._body_bytes)
        self._body_bytes = 0

    def _check_fail_open(self) -> None:
        """Raise when the storage is down, unless RATE_LIMIT_ON_ERROR is `open`."""
        if not self._limiter.fails_open:
            raise RateLimitExceeded("Rate limit storage unavailable (RATE_LIMIT_ON_ERROR=closed); retry") from None

    async def _check_tokens(self) -> None:
        caller = self._caller
        if caller.tokens is None:
            return
        balance = await self._limiter.tokens.balance_of(caller.name, caller.tokens)
        self._headers |= headers_of("tokens", balance)
        if not balance.left:
            raise _exceeded(caller, "tokens", caller.tokens, balance)

    async def _count_request(self) -> None:
        caller = self._caller
        if caller.requests is None:
            return
        is_taken, balance = await self._limiter.requests.acquire(caller.name, caller.requests)
        self._headers |= headers_of("requests", balance)
        if not is_taken:
            raise _exceeded(caller, "requests", caller.requests, balance)


def _exceeded(caller: Caller, what: str, limit: Limit, balance: Balance) -> RateLimitExceeded:
    wait_s = balance.resets_in_s + _TICK_S
    return RateLimitExceeded(
        f"Rate limit reached: {caller.label} has used its {limit.amount} {what} per {limit.window_s} s; retry in "
        f"{duration(wait_s)}",
        retry_after_s=wait_s,
    )


def _insufficient(caller: Caller, limit: Limit, tokens: int, balance: Balance) -> RateLimitExceeded:
    wait_s = (balance.resets_in_s or _RETRY_RUNNING_S) + _TICK_S
    return RateLimitExceeded(
        f"Rate limit reached: the request has about {tokens} tokens, and {caller.label} has {balance.left} left "
        f"of {limit.amount} per {limit.window_s} s, including running requests; retry in {duration(wait_s)}",
        retry_after_s=wait_s,
    )


def estimate_tokens(call: ModelCall, longest: int | None) -> int:
    """Estimate the tokens of a request without a tokenizer, whose time the limit is meant to save.

    Uses the decoded body: the body's length alone says little when characters are escaped and token ids are written as
    numbers. Token ids are counted. Texts are estimated at four UTF-8 bytes per token (measured with MiniLM's tokenizer:
    5.1 in English prose, 3.6 in code, 3.0 in Chinese) from a sample, so that the cost does not grow with a text.

    Args:
        longest: maximum tokens that the model reads of one input; None when unknown.
    """
    sizes = _sizes(call) if isinstance(call, TextCall) else _pair_sizes(call)
    return sum(sizes) if longest is None else sum(min(size, longest) for size in sizes)


def _sizes(call: TextCall) -> list[int]:
    if call.token_ids:
        return [len(ids) for ids in call.token_ids]
    frame = len(call.prompt or "") + len(call.instruction or "")
    return [_text_tokens(text) + frame // _CHARS_PER_TOKEN for text in call.texts]


def _pair_sizes(call: ScoreCall) -> list[int]:
    """Return the tokens of each pair: a model reads the query again with each document."""
    frame = len(call.instruction or "") // _CHARS_PER_TOKEN
    texts = [_text_tokens(text) for text in call.texts]
    if call.max_text_tokens is not None:
        texts = [min(size, call.max_text_tokens) for size in texts]
    queries = [_text_tokens(query) - _SPECIAL_TOKENS + 1 for query in call.queries] or [0]
    if len(queries) == 1:
        queries *= len(texts)
    return [query + text + frame for query, text in zip(queries, texts, strict=True)]


def _text_tokens(text: str) -> int:
    num_bytes = len(text)
    if not text.isascii():
        sample = text[:_SAMPLE_CHARS]
        num_bytes = num_bytes * len(sample.encode(errors="surrogatepass")) // len(sample)
    return -(-num_bytes // _CHARS_PER_TOKEN) + _SPECIAL_TOKENS


def headers_of(family: str, balance: Balance) -> dict[str, str]:
    """Build the `x-ratelimit-*` headers of one family, `requests` or `tokens`, with OpenAI's names and format."""
    return {
        f"x-ratelimit-limit-{family}": str(balance.limit),
        f"x-ratelimit-remaining-{family}": str(balance.left),
        f"x-ratelimit-reset-{family}": duration(balance.resets_in_s),
    }


def duration(seconds: float) -> str:
    """Format a duration, rounded up to milliseconds: `6m0s`, `1s`, `8.64s`, `120ms`."""
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
    """Admit a request. A guard of inference routes; runs after that of `router/auth/guards.py`."""
    limiter = limiter_of(connection)
    context = context_of(connection)
    client = connection.scope.get("client")
    caller = caller_of(key_of(connection), client[0] if client else "unknown", limiter.settings)
    permit = RequestPermit(limiter, caller, context.headers)
    context.on_finish(permit.release)
    connection.scope["state"]["permit"] = permit
    await permit.acquire()
    connection.receive = permit.receiving(connection.receive)


def permit_of(connection: Connection) -> RequestPermit:
    """Return the permit of a request."""
    permit: RequestPermit = connection.scope["state"]["permit"]
    return permit
