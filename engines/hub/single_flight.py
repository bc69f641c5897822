"""Runs one fetch per model in this process, however many callers request it; all share its progress and its outcome.

A fetch belongs to the model, not to its first caller: it runs on its own thread and continues when callers cancel.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait

from engines.protocols import Progress
from engines.types import ModelFiles

_POLL_S = 0.1
"""Interval of progress reports: smooth for people who watch, at negligible cost."""

Work = Callable[["DownloadProgress"], ModelFiles]


class DownloadProgress:
    """Counts bytes done and in total. One thread writes; waiting threads poll."""

    def __init__(self) -> None:
        self.done_bytes = 0
        self.total_bytes = 0

    def expect(self, total_bytes: int) -> None:
        """Restarts the count with a new total."""
        self.done_bytes, self.total_bytes = 0, total_bytes

    def add(self, num_bytes: int) -> None:
        """Counts bytes that arrived; negative to subtract bytes that turned out unusable."""
        self.done_bytes += num_bytes


class SingleFlight:
    """Runs one fetch. Any number of threads may call `wait`."""

    def __init__(self, work: Work, on_end: Callable[[], None]) -> None:
        self._progress = DownloadProgress()
        self._outcome: Future[ModelFiles] = Future()
        # Daemon: a download must not keep the process from exiting, and a partial one is never taken for complete.
        threading.Thread(target=self._run, args=(work, on_end), name="embedyard-fetch", daemon=True).start()

    def wait(self, on_progress: Progress) -> ModelFiles:
        """Returns the outcome; until then reports progress from the calling thread, also when it stands still.

        Raises:
            Exception: whatever the fetch raised.
        """
        while True:
            is_over = bool(wait([self._outcome], _POLL_S).done)
            if self._progress.total_bytes:
                on_progress(self._progress.done_bytes, self._progress.total_bytes)
            if is_over:
                return self._outcome.result()

    def _run(self, work: Work, on_end: Callable[[], None]) -> None:
        try:
            files = work(self._progress)
        except BaseException as error:  # noqa: BLE001  # re-raised in every waiter, which would otherwise wait for ever
            on_end()  # before waiters wake: a waiter that retries must start a new fetch
            self._outcome.set_exception(error)
        else:
            on_end()
            self._outcome.set_result(files)


class SingleFlights:
    """Holds the running fetches by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, SingleFlight] = {}

    def join(self, key: Hashable, work: Work) -> SingleFlight:
        """Returns the running fetch of `key`, or starts one that does `work`."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = SingleFlight(work, lambda: self._remove(key))
            return flight

    def _remove(self, key: Hashable) -> None:
        with self._lock:
            self._flights.pop(key, None)
