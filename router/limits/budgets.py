"""Requests and tokens that one caller may have in a window.

How many tokens a request takes is known when its work is done, so an estimate is reserved before, and exchanged for
what was used. What an estimate fell short of is a debt: it counts like any use, but for one window longer, and is one
window's tokens at most. All of it is kept in the storage: it outlives a restart, and several servers count together.
"""

from msgspec import Struct, structs

from router.limits.store import Bucket, Counter, LimitStore, Room

_MAX_UNITS = 8192
"""Storages of the `limits` package keep one entry for every unit of a cost. Large token budgets are counted in units
of several tokens, so that a request costs Redis thousands of entries at most, not a million."""
_MAX_TRIES = 8
_MAX_ACCOUNTS = 10_000


class Limit(Struct, frozen=True):
    """So many in so many seconds."""

    amount: int
    window_s: int


class Balance(Struct, frozen=True):
    """What a limit has left. `resets_in_s`: until the oldest use no longer counts, 0 when there is none."""

    limit: int
    left: int
    resets_in_s: float


class RequestBudget:
    """Requests of all callers, each known by a name."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store

    async def take(self, name: str, limit: Limit) -> tuple[bool, Balance]:
        """Take one request, if there is one left; and what is left then.

        Raises:
            StoreDown.
        """
        bucket = Bucket(f"requests/{name}", limit.amount, limit.window_s)
        is_taken = await self._store.hit(bucket)
        room = await self._store.room(bucket)
        return is_taken, Balance(limit.amount, room.left, room.grows_in_s)


class Reservation(Struct, frozen=True):
    """Tokens set aside for one running request. It lapses by itself after one to two windows, should its server die.

    `slice`: the window's number, in whose counter it stands.
    """

    name: str
    limit: Limit
    tokens: int
    slice: int

    @property
    def counter(self) -> Counter:
        return _counter(self.name, self.limit, self.slice)


class TokenBudget:
    """Tokens of all callers, each known by a name."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store
        self._loose: dict[str, int] = {}
        """Tokens by caller that were used and are not yet a whole unit; the one thing that this process alone knows."""

    def __len__(self) -> int:
        return len(self._loose)

    async def look(self, name: str, limit: Limit) -> Balance:
        """What is left, requests that still run left aside. Who has nothing left has something after `resets_in_s`.

        Raises:
            StoreDown.
        """
        account = _Account(name, limit)
        used, owed = await self._store.rooms(account.used, account.owed)
        return account.balance(used, owed, self._loose.get(name, 0))

    async def reserve(self, name: str, limit: Limit, tokens: int) -> tuple[Reservation | None, Balance]:
        """Set tokens aside, if there are so many; and what is left for this request and later ones.

        Reserved first and checked then: of requests side by side each sees those before it, on whichever server.

        Raises:
            StoreDown.
        """
        number = int(self._store.clock() // limit.window_s)
        reservation = Reservation(name, limit, tokens, number)
        others = await self._store.add(reservation.counter, tokens) - tokens
        is_kept = False
        try:
            others += max(0, await self._store.count(_counter(name, limit, number - 1)))
            balance = await self.look(name, limit)
            balance = structs.replace(balance, left=max(0, balance.left - max(0, others)))
            loose = self._loose.get(name, 0)  # left aside, or a request of all that a window admits would never fit
            is_kept = bool(balance.left) and tokens <= balance.left + loose
        finally:
            if not is_kept:
                await self.release(reservation)
        return reservation if is_kept else None, balance

    async def release(self, reservation: Reservation) -> int:
        """Give back what was set aside; the tokens that other requests of its window have set aside.

        Raises:
            StoreDown: it will lapse.
        """
        if self._store.clock() >= (reservation.slice + 2) * reservation.limit.window_s:
            return 0  # its counter is gone, and would come back below 0
        return max(0, await self._store.add(reservation.counter, -reservation.tokens))

    async def charge(self, name: str, limit: Limit, tokens: int) -> Balance:
        """Take tokens that were used, also more than are left; and what is left then.

        Raises:
            StoreDown: nothing was taken.
        """
        account = _Account(name, limit)
        units, loose = divmod(self._loose.pop(name, 0) + tokens, account.unit)
        self._note_loose(name, loose)
        if units and not await self._store.hit(account.used, units):
            excess = await self._take(account.used, units)
            await self._take(account.owed, excess)  # what does not fit is forgiven
        return account.balance(*await self._store.rooms(account.used, account.owed), loose)

    async def settle(self, reservation: Reservation, tokens: int) -> Balance:
        """Exchange a reservation for what was used; taken before it is given back, so that nobody slips between.

        Raises:
            StoreDown.
        """
        balance = await self.charge(reservation.name, reservation.limit, tokens)
        others = await self.release(reservation)
        return structs.replace(balance, left=max(0, balance.left - others))

    async def _take(self, bucket: Bucket, units: int) -> int:
        """Take what there is of so many units; how many could not be taken."""
        for _ in range(_MAX_TRIES):  # another server may be faster between a look and a hit
            taken = min(units, (await self._store.room(bucket)).left)
            if not taken or await self._store.hit(bucket, taken):
                return units - taken
        return units

    def _note_loose(self, name: str, tokens: int) -> None:
        if tokens:
            self._loose[name] = tokens
        if len(self._loose) > _MAX_ACCOUNTS:  # addresses come and go; one of them is forgiven less than a unit
            del self._loose[next(iter(self._loose))]


class _Account:
    """The two buckets of a caller. Both count in units of several tokens where a limit is large.

    Attributes:
        used: what was used within one window.
        owed: what was used beyond the limit, within two: it counts in the window in which it was used, which is full
            anyway, and in the next.
    """

    def __init__(self, name: str, limit: Limit) -> None:
        self._limit = limit
        self.unit = -(-limit.amount // _MAX_UNITS)
        self._units = limit.amount // self.unit  # rounded down: never more than the limit
        self.used = Bucket(f"tokens/{name}/{self.unit}", self._units, limit.window_s)
        self.owed = Bucket(f"debt/{name}/{self.unit}", self._units, 2 * limit.window_s)

    def balance(self, used: Room, owed: Room, loose_tokens: int) -> Balance:
        """What the rooms of both leave. Three cases: 1. the debt alone fills a window. 2. something was used in this
        one. 3. there is a debt, or nothing.
        """
        amount = self._limit.amount
        if not owed.left:
            return Balance(amount, 0, owed.grows_in_s)  # (1)
        resets_in_s = used.grows_in_s if used.left < self._units else owed.grows_in_s  # (2), (3)
        taken = 2 * self._units - used.left - owed.left
        if taken >= self._units:
            return Balance(amount, 0, resets_in_s)
        return Balance(amount, max(0, amount - taken * self.unit - loose_tokens), resets_in_s)


def _counter(name: str, limit: Limit, number: int) -> Counter:
    """Of what is reserved in the window of that number; it lives until the end of the next."""
    return Counter(f"reserved/{name}/{limit.window_s}/{number}", 2 * limit.window_s + 1)
