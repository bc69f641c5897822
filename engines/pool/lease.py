"""Waiting calls and leases of the pool, as futures and tasks of one event loop."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from engines.errors import EngineError
from engines.pool.messages import LeaseCancelled, LeaseReleased, LeaseRequested, PoolEvent
from engines.protocols import Engine


class Callers:
    """Holds the future of every waiting call by `waiter_id`, and all leases."""

    def __init__(self) -> None:
        self._futures: dict[int, asyncio.Future[Engine | None]] = {}
        self.leases: set[Lease] = set()
        self._last_id = 0

    def register(self) -> tuple[int, asyncio.Future[Engine | None]]:
        """Creates a waiter id and the future that receives its outcome."""
        self._last_id += 1
        future: asyncio.Future[Engine | None] = asyncio.get_running_loop().create_future()
        self._futures[self._last_id] = future
        return self._last_id, future

    def resolve(self, waiter_id: int, outcome: Engine | EngineError | None) -> None:
        """Sets the outcome of a waiter.

        Does nothing if its future is done: a call cancelled in this tick releases its own lease.
        """
        future = self._futures.get(waiter_id)
        if future is None or future.done():
            return
        if isinstance(outcome, EngineError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def unregister(self, waiter_id: int) -> None:
        del self._futures[waiter_id]

    def interrupt_all(self, make_error: Callable[[], EngineError]) -> None:
        """Interrupts all leases and fails all waiters, each with its own error object."""
        for lease in self.leases:
            lease.interrupt(make_error())
        for waiter_id in self._futures:
            self.resolve(waiter_id, make_error())


class Lease:
    """Async context manager that enters with the call's engine, ready, and keeps it in memory inside the block.

    Enters without suspending if the model is ready. The lease is always released, wherever the caller is cancelled,
    even if it was granted in the same tick. A class and not a generator, as it is on the path of every request.
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
        waiter_id, future = self._callers.register()
        try:
            self._step(self._acquire(waiter_id))
            engine = await future
        except BaseException:
            self._step(LeaseCancelled(waiter_id))
            raise
        finally:
            self._callers.unregister(waiter_id)
        assert engine is not None, "a granted lease has an engine"
        self._waiter_id, self._task = waiter_id, asyncio.current_task()
        self._callers.leases.add(self)
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._callers.leases.discard(self)
        self._step(LeaseReleased(self._waiter_id))
        if kind is asyncio.CancelledError and self._interruption is not None and self._is_sole_cancellation():
            raise self._interruption from None

    def interrupt(self, error: EngineError) -> None:
        """Cancels the block; its caller gets the error."""
        if self._task is not None and self._interruption is None:
            self._interruption, self._cancels_before = error, self._task.cancelling()
            self._task.cancel()

    def _is_sole_cancellation(self) -> bool:
        """Tells whether only `interrupt` cancelled the task, and not its owner too."""
        return self._task is not None and self._task.uncancel() <= self._cancels_before
