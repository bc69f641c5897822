"""The threads of a host: for the disk, the hub, downloads and loads. Nothing that blocks runs on the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Result = TypeVar("Result")

LOAD_LOCK = threading.Lock()
"""One load at a time in a process, whatever the host: of 100 loads on four threads 88 failed and 4 were silently wrong.

Unloads take it too, so that none of them blurs what a load measures.
"""

_NUM_ASKERS = 16
"""Questions are small, and a hub that is silent holds each of them for most of a minute."""


class Workers(Protocol):
    """Where blocking work is done."""

    async def look(self, work: Callable[[], Result]) -> Result:
        """Short work on disk: never behind a download, or a hub that does not answer."""

    async def ask(self, work: Callable[[], Result]) -> Result:
        """A question to the hub."""

    async def fetch(self, work: Callable[[], Result]) -> Result:
        """A download, beside others."""

    async def load(self, work: Callable[[], Result]) -> Result:
        """Run after the loads, unloads and readings asked for before."""

    def close(self) -> None:
        """Take no more work; what runs is not waited for."""


class Threads:
    """Real threads, started when first needed."""

    def __init__(self, name: str, num_fetchers: int = 4, load_lock: threading.Lock = LOAD_LOCK) -> None:
        self._lookers = ThreadPoolExecutor(4, thread_name_prefix=f"look-{name}")
        self._askers = ThreadPoolExecutor(_NUM_ASKERS, thread_name_prefix=f"ask-{name}")
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix=f"fetch-{name}")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix=f"load-{name}")
        self._load_lock = load_lock

    async def look(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._lookers, work)

    async def ask(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._askers, work)

    async def fetch(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, work)

    async def load(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._loader, self._locked, work)

    def _locked(self, work: Callable[[], Result]) -> Result:
        with self._load_lock:
            return work()

    def close(self) -> None:
        for threads in (self._lookers, self._askers, self._fetchers, self._loader):
            threads.shutdown(wait=False, cancel_futures=True)
