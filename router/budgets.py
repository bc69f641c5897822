"""Requests and tokens that one caller may have in a window: requests are taken before the work, tokens after it.

Tokens are known only when the work is done, so a request may take more than is left. What is too much is paid for
in time: the caller is refused until its average is back at the limit.
"""

from msgspec import Struct

from router.limit_store import Bucket, LimitStore, Room

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


class Account(Struct):
    """What this process alone remembers of a caller's tokens, beside the storage.

    `loose_tokens`: used, and not yet a whole unit. `pays_until`: when the average is back at the limit.
    """

    loose_tokens: int = 0
    pays_until: float = 0.0


class TokenBudget:
    """Tokens of all callers, each known by a name."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store
        self._accounts: dict[str, Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    async def look(self, name: str, limit: Limit) -> Balance:
        """What is left. Whoever has nothing left has again something after `resets_in_s`.

        Raises:
            StoreDown.
        """
        bucket, unit = _in_units(name, limit)
        return self._balance(name, limit, unit, await self._store.room(bucket))

    async def charge(self, name: str, limit: Limit, tokens: int) -> Balance:
        """Take tokens that were used, also more than are left; and what is left then.

        Raises:
            StoreDown: nothing was taken.
        """
        bucket, unit = _in_units(name, limit)
        account = self._account(name)
        units, account.loose_tokens = divmod(account.loose_tokens + tokens, unit)
        room, excess = await self._take(bucket, units)
        if excess:
            begin = max(account.pays_until, self._store.clock() + room.grows_in_s)
            account.pays_until = begin + excess / bucket.amount * limit.window_s
        return self._balance(name, limit, unit, room)

    async def _take(self, bucket: Bucket, units: int) -> tuple[Room, int]:
        """Take what there is of so many units; what is left in the bucket then, and how many could not be taken."""
        room = await self._store.room(bucket)
        for _ in range(_MAX_TRIES):  # another server may be faster between a look and a hit
            taken = min(units, room.left)
            if not taken or await self._store.hit(bucket, taken):
                grows_in_s = room.grows_in_s if room.left < bucket.amount else float(bucket.window_s)
                return Room(room.left - taken, grows_in_s), units - taken
            room = await self._store.room(bucket)
        return room, units

    def _balance(self, name: str, limit: Limit, unit: int, room: Room) -> Balance:
        account = self._accounts.get(name, Account())
        debt_s = account.pays_until - self._store.clock()
        if debt_s > 0.0:
            return Balance(limit.amount, 0, max(debt_s, 0.0 if room.left else room.grows_in_s))
        if not room.left:
            return Balance(limit.amount, 0, room.grows_in_s)
        used = (limit.amount // unit - room.left) * unit + account.loose_tokens
        return Balance(limit.amount, limit.amount - used, room.grows_in_s)

    def _account(self, name: str) -> Account:
        if len(self._accounts) >= _MAX_ACCOUNTS:  # addresses come and go
            now = self._store.clock()
            self._accounts = {name: account for name, account in self._accounts.items() if account.pays_until > now}
        return self._accounts.setdefault(name, Account())


def _in_units(name: str, limit: Limit) -> tuple[Bucket, int]:
    """The bucket, and how many tokens are one of its units. Rounded down: never more than the limit."""
    unit = -(-limit.amount // _MAX_UNITS)
    return Bucket(f"tokens/{name}/{unit}", limit.amount // unit, limit.window_s), unit
