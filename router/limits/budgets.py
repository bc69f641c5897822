"""Budgets of requests and tokens per caller and window.

The tokens of a request are known only when it ends, so an estimate is reserved first and then replaced by the actual
use. Use beyond the estimate is a debt: it counts like any use, but for one window longer, up to one window's tokens.
All of it is kept in the storage: it survives restarts, and several servers share it.
"""

from msgspec import Struct, structs

from router.limits.store import Bucket, BudgetRoom, Counter, LimitStore

_MAX_UNITS = 8192
"""Storages of the `limits` package keep one entry per unit of cost. Large token budgets are counted in units of several
tokens, so that a request costs Redis thousands of entries at most, not a million."""
_MAX_TRIES = 8
_MAX_ACCOUNTS = 10_000


class Limit(Struct, frozen=True):
    """At most `amount` per window of `window_s` seconds."""

    amount: int
    window_s: int


class Balance(Struct, frozen=True):
    """What is left of a limit. `resets_in_s`: seconds until the oldest use expires, 0 without use."""

    limit: int
    left: int
    resets_in_s: float


class RequestBudget:
    """Counts requests per caller name."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store

    async def acquire(self, name: str, limit: Limit) -> tuple[bool, Balance]:
        """Count one request if the limit allows it; returns whether it did, and the balance.

        Raises:
            StoreDown.
        """
        bucket = Bucket(f"requests/{name}", limit.amount, limit.window_s)
        is_taken = await self._store.hit(bucket)
        room = await self._store.room(bucket)
        return is_taken, Balance(limit.amount, room.left, room.grows_in_s)


class Reservation(Struct, frozen=True):
    """Tokens reserved for one running request. Expires after one to two windows, in case the server dies.

    `slice`: number of the window whose counter it is in.
    """

    name: str
    limit: Limit
    tokens: int
    slice: int

    @property
    def counter(self) -> Counter:
        return _counter(self.name, self.limit, self.slice)


class TokenBudget:
    """Counts tokens per caller name."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store
        self._remainders: dict[str, int] = {}
        """Used tokens by caller that do not make a whole unit yet; the only state that is local to this process."""

    def __len__(self) -> int:
        return len(self._remainders)

    async def balance_of(self, name: str, limit: Limit) -> Balance:
        """Return the balance, ignoring reservations of running requests. At 0, some is left again after `resets_in_s`.

        Raises:
            StoreDown.
        """
        account = _Account(name, limit)
        used, owed = await self._store.rooms(account.used, account.owed)
        return account.balance(used, owed, self._remainders.get(name, 0))

    async def reserve(self, name: str, limit: Limit, tokens: int) -> tuple[Reservation | None, Balance]:
        """Reserve tokens if the limit allows it; returns the reservation or None, and what was left before it.

        Reserves first and checks then: of concurrent requests each sees the earlier ones, on every server.

        Raises:
            StoreDown.
        """
        number = int(self._store.clock() // limit.window_s)
        reservation = Reservation(name, limit, tokens, number)
        others = await self._store.add(reservation.counter, tokens) - tokens
        is_reserved = False
        try:
            others += max(0, await self._store.count(_counter(name, limit, number - 1)))
            balance = await self.balance_of(name, limit)
            balance = structs.replace(balance, left=max(0, balance.left - max(0, others)))
            remainder = self._remainders.get(
                name, 0
            )  # not counted, else a request for a whole window's tokens would never fit
            is_reserved = bool(balance.left) and tokens <= balance.left + remainder
        finally:
            if not is_reserved:
                await self.release(reservation)
        return reservation if is_reserved else None, balance

    async def release(self, reservation: Reservation) -> int:
        """Give back a reservation; returns the tokens that other requests have reserved in its window.

        Raises:
            StoreDown: the reservation expires by itself.
        """
        if self._store.clock() >= (reservation.slice + 2) * reservation.limit.window_s:
            return 0  # its counter has expired, and would be recreated below 0
        return max(0, await self._store.add(reservation.counter, -reservation.tokens))

    async def charge(self, name: str, limit: Limit, tokens: int) -> Balance:
        """Count used tokens, even beyond the limit; returns the balance.

        Raises:
            StoreDown: nothing was counted.
        """
        account = _Account(name, limit)
        units, remainder = divmod(self._remainders.pop(name, 0) + tokens, account.unit)
        self._store_remainder(name, remainder)
        if units and not await self._store.hit(account.used, units):
            excess = await self._take_up_to(account.used, units)
            await self._take_up_to(account.owed, excess)  # what exceeds the debt's bucket is dropped
        return account.balance(*await self._store.rooms(account.used, account.owed), remainder)

    async def settle(self, reservation: Reservation, tokens: int) -> Balance:
        """Replace a reservation by the actual use. Counts before it releases, so that no request fits in between.

        Raises:
            StoreDown.
        """
        balance = await self.charge(reservation.name, reservation.limit, tokens)
        others = await self.release(reservation)
        return structs.replace(balance, left=max(0, balance.left - others))

    async def _take_up_to(self, bucket: Bucket, units: int) -> int:
        """Take up to so many units; returns how many could not be taken."""
        for _ in range(_MAX_TRIES):  # another server may take some between the read and the hit
            taken = min(units, (await self._store.room(bucket)).left)
            if not taken or await self._store.hit(bucket, taken):
                return units - taken
        return units

    def _store_remainder(self, name: str, tokens: int) -> None:
        if tokens:
            self._remainders[name] = tokens
        if len(self._remainders) > _MAX_ACCOUNTS:  # addresses come and go; dropping one loses less than a unit
            del self._remainders[next(iter(self._remainders))]


class _Account:
    """The two buckets of a caller. For large limits both count in units of several tokens.

    Attributes:
        used: use within one window.
        owed: use beyond the limit, within two windows: it counts in the window of its use, which is full anyway, and
            in the next one.
    """

    def __init__(self, name: str, limit: Limit) -> None:
        self._limit = limit
        self.unit = -(-limit.amount // _MAX_UNITS)
        self._units = limit.amount // self.unit  # rounded down: never more than the limit
        self.used = Bucket(f"tokens/{name}/{self.unit}", self._units, limit.window_s)
        self.owed = Bucket(f"debt/{name}/{self.unit}", self._units, 2 * limit.window_s)

    def balance(self, used: BudgetRoom, owed: BudgetRoom, remainder_tokens: int) -> Balance:
        """Compute the balance from both buckets. Three cases: 1. the debt alone fills a window. 2. there was use in
        this one. 3. there is a debt, or nothing.
        """
        amount = self._limit.amount
        if not owed.left:
            return Balance(amount, 0, owed.grows_in_s)  # (1)
        resets_in_s = used.grows_in_s if used.left < self._units else owed.grows_in_s  # (2), (3)
        taken = 2 * self._units - used.left - owed.left
        if taken >= self._units:
            return Balance(amount, 0, resets_in_s)
        return Balance(amount, max(0, amount - taken * self.unit - remainder_tokens), resets_in_s)


def _counter(name: str, limit: Limit, number: int) -> Counter:
    """Return the counter of reservations in window `number`; it expires at the end of the next window."""
    return Counter(f"reserved/{name}/{limit.window_s}/{number}", 2 * limit.window_s + 1)
