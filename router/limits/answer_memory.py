"""`AnswerMemory`: limits the bytes of large answers that exist at once.

The answer of one request is bounded, but a client that reads slowly keeps it in memory, and many clients may. A
request for an answer that may be large waits, before its forward pass, until the memory is free.
"""

import asyncio
from collections import Counter

from msgspec import Struct

from engines.types import MAX_ANSWER_BYTES, format_bytes
from router.errors import TooManyRequests

_MAX_BYTES = 4 * MAX_ANSWER_BYTES


class _Waiting(Struct, eq=False):
    caller: str
    num_bytes: int
    turn: asyncio.Future[None]


class AnswerMemory:
    """Gives memory in the order of the requests. One caller may have half of it, and others pass those who have.

    Args:
        max_wait_s: the longest wait of a request.
        max_bytes: of all answers; a request for more than half of it is given half.

    Attributes:
        held_bytes: given and not released.
    """

    def __init__(self, max_wait_s: float, max_bytes: int = _MAX_BYTES) -> None:
        self._max_wait_s = max_wait_s
        self._max_bytes = max_bytes
        self._of_callers: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self.held_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Return the number of requests that wait."""
        return len(self._waiting)

    async def hold(self, caller: str, num_bytes: int) -> None:
        """Wait until the memory is free, and take it until `release`.

        Raises:
            TooManyRequests: that took too long; nothing was taken.
        """
        turn = asyncio.get_running_loop().create_future()
        one = _Waiting(caller, min(num_bytes, self._max_bytes // 2), turn)
        self._waiting.append(one)
        self._admit()
        if turn.done():
            return
        try:
            async with asyncio.timeout(self._max_wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(caller, num_bytes)  # the turn came in the same round as the cancellation
            elif one in self._waiting:
                self._waiting.remove(one)
                self._admit()
            if isinstance(error, TimeoutError):
                raise TooManyRequests(
                    f"Memory for large answers is full: {format_bytes(self.held_bytes)} of "
                    f"{format_bytes(self._max_bytes)} are held, and too few were sent within {self._max_wait_s:g} s; "
                    "send fewer or shorter inputs per request, or retry"
                ) from None
            raise

    def release(self, caller: str, num_bytes: int) -> None:
        """Give back what `hold` has taken: the answer was sent, or there is none."""
        self._take(caller, -min(num_bytes, self._max_bytes // 2))
        self._admit()

    def _admit(self) -> None:
        for one in list(self._waiting):
            if self.held_bytes + one.num_bytes > self._max_bytes:
                return
            if self._of_callers[one.caller] + one.num_bytes > self._max_bytes // 2:
                continue
            self._waiting.remove(one)
            if not one.turn.done():  # else its request was cancelled, and has not run since
                self._take(one.caller, one.num_bytes)
                one.turn.set_result(None)

    def _take(self, caller: str, num_bytes: int) -> None:
        self.held_bytes += num_bytes
        self._of_callers[caller] += num_bytes
        if not self._of_callers[caller]:
            del self._of_callers[caller]
