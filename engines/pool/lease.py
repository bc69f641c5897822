"""Who waits on the pool and who holds a lease, as futures and tasks of one event loop."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from engines.errors import EngineError
from engines.pool.messages import LeaseCancelled, LeaseReleased, LeaseRequested, PoolEvent
from engines.protocols import Engine


class Callers:
    """Every caller is known by a number: first as a waiter, then as the holder of a lease."""

    def __init__(self) -> None:
        self._futures: dict[int, asyncio.Future[Engine | None]] = {}
        self.leases: set[Lease] = set()
        self._last_id = 0

    def admit(self) -> tuple[int, asyncio.Future[Engine | None]]:
        """A new number, and the future that its answer will come through."""
        self._last_id += 1
        future: asyncio.Future[Engine | None] = asyncio.get_running_loop().create_future()
        self._futures[self._last_id] = future
        return self._last_id, future

    def answer(self, waiter_id: int, outcome: Engine | EngineError | None) -> None:
        """A caller cancelled in this tick has a dead future by now; its own handler gives everything back."""
        future = self._futures.get(waiter_id)
        if future is None or future.done():
            return
        if isinstance(outcome, EngineError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def forget(self, waiter_id: int) -> None:
        del self._futures[waiter_id]

    def interrupt(self, make_error: Callable[[], EngineError]) -> None:
        """End every lease's block, and every wait for one; each caller gets an error of its own."""
        for lease in self.leases:
            lease.interrupt(make_error())
        for waiter_id in self._futures:
            self.answer(waiter_id, make_error())


class Lease:
    """`async with`: the call's model, ready, and not to be freed inside the block.

    Granted without a suspension when the model is ready. Whatever happens, and wherever the caller is cancelled, the
    lease goes back: also one granted in the very tick in which the caller was cancelled. A class and not a generator:
    it is on the path of every request.
    """

    def __init__(
        self, step: Callable[[PoolEvent], None], callers: Callers, acquire: Callable[[int], LeaseRequested]
    ) -> None:
        self._step = step
        self._callers = callers
        self._acquire = acquire
        self._waiter_id = 0
        self._task: asyncio.Task[object] | None = None
        self._cancels_before = 0
        self._interruption: EngineError | None = None

    async def __aenter__(self) -> Engine:
        waiter_id, future = self._callers.admit()
        try:
            self._step(self._acquire(waiter_id))
            engine = await future
        except BaseException:
            self._step(LeaseCancelled(waiter_id))
            raise
        finally:
            self._callers.forget(waiter_id)
        assert engine is not None, "a grant comes with an engine"
        self._waiter_id, self._task = waiter_id, asyncio.current_task()
        self._callers.leases.add(self)
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._callers.leases.discard(self)
        self._step(LeaseReleased(self._waiter_id))
        if kind is asyncio.CancelledError and self._interruption is not None and self._was_alone():
            raise self._interruption from None

    def interrupt(self, error: EngineError) -> None:
        """Cancel what the block awaits; its caller gets the error."""
        if self._task is not None and self._interruption is None:
            self._interruption, self._cancels_before = error, self._task.cancelling()
            self._task.cancel()

    def _was_alone(self) -> bool:
        """Whether the cancellation was `interrupt`'s alone, and not its owner's as well."""
        return self._task is not None and self._task.uncancel() <= self._cancels_before
