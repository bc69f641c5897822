"""Moving windows and counters in this process's memory, behind the interface of the `limits` package.

The package's own memory storage keeps one object for every unit of a cost, a million a minute where tokens are
counted, and hands every key to a thread when it cleans up. This one keeps one pair for every hit, and asks one clock.
"""

import time
from collections import deque
from collections.abc import Callable

from limits.aio.storage import MemoryStorage
from msgspec import Struct, field


class Window(Struct):
    """The hits of one key: when, and at what cost; the oldest first."""

    hits: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0
    expires_at: float = 0.0

    def forget(self, before: float) -> None:
        """Drop hits older than that."""
        while self.hits and self.hits[0][0] < before:
            self.used -= self.hits.popleft()[1]


class Number(Struct):
    """A counter."""

    value: int = 0
    expires_at: float = 0.0


class MovingWindows(MemoryStorage):
    """A hit counts until it is older than the window: two hits exactly one window apart are in one window.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, Window] = {}
        self._numbers: dict[str, Number] = {}
        self._sweep_at = 0.0

    def __len__(self) -> int:
        return len(self._windows) + len(self._numbers)

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to a counter; one that was 0 lives for `expiry` seconds from now, as in Redis."""
        now = self._clock()
        self._sweep(now, expiry)
        number = self._numbers.get(key)
        if number is None or number.expires_at < now:
            number = self._numbers[key] = Number()
        if not number.value:
            number.expires_at = now + expiry
        number.value += amount
        return number.value

    async def get(self, key: str) -> int:
        """What a counter is; 0 without one."""
        number = self._numbers.get(key)
        return 0 if number is None or number.expires_at < self._clock() else number.value

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count a hit of this cost, if the window has room for all of it."""
        now = self._clock()
        self._sweep(now, expiry)
        window = self._windows.setdefault(key, Window())
        window.forget(now - expiry)
        if window.used + amount > limit:
            return False
        window.hits.append((now, amount))
        window.used += amount
        window.expires_at = now + expiry
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest hit was (now, if there is none), and the cost of all hits; never above `limit`."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None:
            return now, 0
        window.forget(now - expiry)
        return window.hits[0][0] if window.hits else now, min(window.used, limit)

    async def clear(self, key: str) -> None:
        """Forget the hits of a key."""
        self._windows.pop(key, None)
        self._numbers.pop(key, None)
        await super().clear(key)

    async def reset(self) -> int | None:
        """Forget everything."""
        count = len(self)
        self._windows.clear()
        self._numbers.clear()
        return count + (await super().reset() or 0)

    def _sweep(self, now: float, expiry: float) -> None:
        """Once a window: drop the keys that nobody has used for one, or addresses would pile up."""
        if now < self._sweep_at:
            return
        self._sweep_at = now + expiry
        self._windows = {key: window for key, window in self._windows.items() if window.expires_at >= now}
        self._numbers = {key: number for key, number in self._numbers.items() if number.expires_at >= now}
