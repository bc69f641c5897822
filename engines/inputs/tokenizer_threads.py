"""Tokenises requests on threads: small ones in one call, large ones in steps that take turns with other requests."""

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from engines.inputs.token_ids import PIECE_CHARS, Step, TokenizedRequest

_TRIM_AFTER_S = 2.0

Found = TypeVar("Found")


class Reading(Protocol):
    """A request to tokenise."""

    num_chars: int

    def plan_steps(self) -> Sequence[Step]:
        """Returns the steps; is itself the first step."""

    def run_all(self) -> TokenizedRequest:
        """Runs all steps and returns the result."""

    def result(self) -> TokenizedRequest:
        """Returns the result; called when all steps have run."""


class TokenizerThreads:
    """Tokenises requests off the event loop.

    A large request runs at most one step on each thread; its other steps queue behind those of other requests and are
    dropped when it is cancelled. Small requests have their own threads, so they never wait for a step of a large one.

    Args:
        num_threads: threads for large requests, and as many for small ones; each starts when first needed.
    """

    def __init__(self, num_threads: int) -> None:
        # The library's own threads finish all texts of a call before they start another call: a call of two short
        # texts, on the event loop, waited for 2,048 long ones.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._num_threads = num_threads
        self._small = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._large = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize-large")
        self._num_heavy = 0
        self._num_ended = 0

    async def run(self, reading: Reading) -> TokenizedRequest:
        """Runs all steps of a request. Cancelling drops the steps that have not started.

        Raises:
            InvalidRequest: as the steps do; of several errors, the one of the earliest step.
        """
        loop = asyncio.get_running_loop()
        if reading.num_chars <= PIECE_CHARS:
            return await loop.run_in_executor(self._small, reading.run_all)
        waiting = deque(enumerate(await loop.run_in_executor(self._large, reading.plan_steps)))
        failures: dict[int, Exception] = {}
        workers = [self._run_waiting(waiting, failures) for _ in range(min(self._num_threads, len(waiting)))]
        await asyncio.gather(*workers)
        if failures:
            raise failures[min(failures)]
        return reading.result()

    async def call(self, work: Callable[[], Found]) -> Found:
        """Runs one function on a thread for large requests."""
        return await asyncio.get_running_loop().run_in_executor(self._large, work)

    async def _run_waiting(self, waiting: deque[tuple[int, Step]], failures: dict[int, Exception]) -> None:
        """Runs steps one after the other until none is left or one fails."""
        loop = asyncio.get_running_loop()
        while waiting and not failures:
            number, step = waiting.popleft()
            try:
                next_steps = await loop.run_in_executor(self._large, step)
            except Exception as error:  # noqa: BLE001  # re-raised when all workers have ended
                failures[number] = error
            else:
                waiting.extend((number, next_step) for next_step in next_steps)

    @contextmanager
    def trim_heap_after(self) -> Iterator[None]:
        """Encloses a request that takes much memory: after the last of them, freed memory returns to the system.

        The C library keeps freed memory: 87 MB after ten requests of 2,048 texts of 500 words.
        """
        self._num_heavy += 1
        try:
            yield
        finally:
            self._num_heavy -= 1
            self._num_ended += 1
            asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim_if_quiet, self._num_ended)

    def _trim_if_quiet(self, num_ended: int) -> None:
        if num_ended == self._num_ended and not self._num_heavy:
            with suppress(RuntimeError):  # the threads were shut down with the server
                self._large.submit(_trim_heap)

    def close(self) -> None:
        """Stops accepting work; does not wait for running steps."""
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
