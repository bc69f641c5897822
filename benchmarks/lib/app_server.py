"""Serves an app with uvicorn on a free port: real sockets, as in-process clients hide disconnects and buffering."""

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from litestar import Litestar

from router.server.connection import TimeoutHttpProtocol


class QuietServer(uvicorn.Server):
    """A uvicorn server without signal handlers."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    @property
    def url(self) -> str:
        port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"


def _server(app: Litestar) -> QuietServer:
    return QuietServer(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, http=TimeoutHttpProtocol, loop="asyncio", lifespan="on", ws="none",
            log_config=None, access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip


@asynccontextmanager
async def serving(app: Litestar) -> AsyncIterator[str]:
    """Serve the app on this event loop, so that the test can observe and await it; yields the URL."""
    server = _server(app)
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has a flag, and no event
        await asyncio.sleep(0.002)
    if task.done():
        task.result()
    try:
        yield server.url
    finally:
        server.should_exit = True
        await task


@contextmanager
def serving_in_thread(app: Litestar) -> Iterator[str]:
    """Serve the app on its own thread, for blocking clients, and for one server in many tests; yields the URL."""
    server = _server(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.002)
    try:
        yield server.url
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
