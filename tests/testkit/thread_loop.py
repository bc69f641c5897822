"""An event loop that runs all the time, as a server's does, and not only inside tests.

Serve's client gives up for good when the controller tells it something while its loop does not run.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class ThreadLoop:
    """A loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the work there, and wait for it; it is cancelled when this thread is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


LOOP = ThreadLoop()
