"""One fetch per model in this process, however many ask for it; everyone sees its progress and its outcome.

A fetch belongs to the model, not to whoever asked first: it runs on a thread of its own, and goes on when they leave.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait

from engines.protocols import Progress
from engines.types import ModelFiles

_LOOK_S = 0.1
"""How often progress is looked at: often enough for eyes, and seldom enough to cost nothing."""

Work = Callable[["DownloadProgress"], ModelFiles]


class DownloadProgress:
    """Bytes done and bytes in all. One thread writes; those who wait look now and then."""

    def __init__(self) -> None:
        self.done_bytes = 0
        self.total_bytes = 0

    def expect(self, total_bytes: int) -> None:
        """Start counting towards `total_bytes`."""
        self.done_bytes, self.total_bytes = 0, total_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes that are here now; negative to take some back."""
        self.done_bytes += num_bytes


class SingleFlight:
    """One running fetch. `wait` may be called from any number of threads."""

    def __init__(self, work: Work, on_end: Callable[[], None]) -> None:
        self._tally = DownloadProgress()
        self._outcome: Future[ModelFiles] = Future()
        # A daemon: a download must not keep the process from ending, and what it leaves is never taken for whole.
        threading.Thread(target=self._run, args=(work, on_end), name="embedyard-fetch", daemon=True).start()

    def wait(self, on_progress: Progress) -> ModelFiles:
        """The outcome, reporting progress from the calling thread meanwhile, also when there is none.

        Raises:
            Exception: whatever the fetch raised.
        """
        while True:
            is_over = bool(wait([self._outcome], _LOOK_S).done)
            if self._tally.total_bytes:
                on_progress(self._tally.done_bytes, self._tally.total_bytes)
            if is_over:
                return self._outcome.result()

    def _run(self, work: Work, on_end: Callable[[], None]) -> None:
        try:
            files = work(self._tally)
        except BaseException as error:  # noqa: BLE001  # handed to every waiter, who would wait for ever otherwise
            on_end()  # before waiters wake: one who asks again must start anew
            self._outcome.set_exception(error)
        else:
            on_end()
            self._outcome.set_result(files)


class SingleFlights:
    """The running fetches, by what they bring."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, SingleFlight] = {}

    def join(self, key: Hashable, work: Work) -> SingleFlight:
        """The running fetch of `key`, or a new one doing `work`."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = SingleFlight(work, lambda: self._forget(key))
            return flight

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            self._flights.pop(key, None)
