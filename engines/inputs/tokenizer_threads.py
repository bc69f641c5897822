"""The threads on which requests are tokenised: small ones at once, large ones in steps that take turns."""

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

from engines.inputs.token_ids import PIECE_CHARS, Step, TokenizedRequest

_TRIM_AFTER_S = 2.0


class Reading(Protocol):
    """A request on its way to ids."""

    num_chars: int

    def begin(self) -> Sequence[Step]:
        """The first step."""

    def now(self) -> TokenizedRequest:
        """All steps and their result."""

    def result(self) -> TokenizedRequest:
        """The result, when all steps have run."""


class TokenizerThreads:
    """Tokenises requests off the event loop.

    A large request has at most one step on each thread; what is left of it queues again behind others' steps, and is
    dropped when its caller leaves. A small one has threads of its own: it waits for no step of a large one.

    Args:
        num_threads: for large requests, and as many for small ones; each is started when first needed.
    """

    def __init__(self, num_threads: int) -> None:
        # The library's own threads take a whole call's texts before they look at another call: a call of two short
        # texts, on the event loop, waited for 2,048 long ones.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._num_threads = num_threads
        self._small = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._large = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize-large")
        self._num_heavy = 0
        self._num_ended = 0

    async def run(self, reading: Reading) -> TokenizedRequest:
        """Run all steps of a request. Cancelling drops those that have not begun.

        Raises:
            InvalidRequest: as the steps do; of several refusals, the one of the earliest step.
        """
        loop = asyncio.get_running_loop()
        if reading.num_chars <= PIECE_CHARS:
            return await loop.run_in_executor(self._small, reading.now)
        waiting = deque(enumerate(await loop.run_in_executor(self._large, reading.begin)))
        failures: dict[int, Exception] = {}
        lanes = [self._run_waiting(waiting, failures) for _ in range(min(self._num_threads, len(waiting)))]
        await asyncio.gather(*lanes)
        if failures:
            raise failures[min(failures)]
        return reading.result()

    async def _run_waiting(self, waiting: deque[tuple[int, Step]], failures: dict[int, Exception]) -> None:
        """Run steps one after the other, until none is left or one fails."""
        loop = asyncio.get_running_loop()
        while waiting and not failures:
            number, step = waiting.popleft()
            try:
                further = await loop.run_in_executor(self._large, step)
            except Exception as error:  # noqa: BLE001  # it is raised again where all lanes have ended
                failures[number] = error
            else:
                waiting.extend((number, later) for later in further)

    @contextmanager
    def heavy(self) -> Iterator[None]:
        """Around a request that takes much memory: when the last of them has gone, it is given back to the system.

        The C library keeps what was freed: 87 MB after ten requests of 2,048 texts of 500 words.
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
            with suppress(RuntimeError):  # the threads have ended, and with them the server
                self._large.submit(_trim_heap)

    def close(self) -> None:
        """Take no more work; what runs is not waited for."""
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
