"""uvicorn as this server runs it: one socket, bound before anything is loaded, and a drain before the end."""

import asyncio
import gc
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
import uvicorn
from litestar import Litestar

from router.server.connection import TimeoutHttpProtocol
from router.server.reloader import Reloader
from router.server.state import ServerState


class SighupHandler:
    """Made on the main thread before anything slow begins: until `follow`, the signal is swallowed and not deadly.

    A process that was told to ignore hang-ups (`nohup`) outlives its terminal, and still reloads.
    """

    def __init__(self) -> None:
        self._number = getattr(signal, "SIGHUP", None)
        self._task: asyncio.Task[None] | None = None
        if self._number is not None:
            is_ignored = signal.getsignal(self._number) is signal.SIG_IGN
            self._ends_with_terminal = not is_ignored and _has_terminal()
            signal.signal(self._number, lambda *_: None)

    def follow(self, reload: Callable[[], Coroutine[Any, Any, None]], end: Callable[[], None]) -> None:
        """Call one of the two at each signal, from now on, on the running loop."""

        def on_signal() -> None:
            if self._ends_with_terminal and not _has_terminal():
                end()
            else:
                self._task = asyncio.create_task(reload())

        if self._number is not None:
            asyncio.get_running_loop().add_signal_handler(self._number, on_signal)


def _has_terminal() -> bool:
    """Whether the process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


_KEEP_ALIVE_S = 75
"""Longer than load balancers keep connections (60 s as a rule), so that they close them and never meet a closed one."""


_AFTER_GRACE_S = 5
"""The backend answers what it cannot finish within the grace time; uvicorn cancels only after that."""


_PATIENCE_S = 15.0
"""Beyond the grace time: for those who are interrupted then, for threads to end, and for the last bytes."""


_LOOK_S, _MAX_LOOKS = 0.15, 10


_BACKLOG = 2048


FORCED = 1
"""The exit code of a server that had to leave with work undone."""


log = structlog.get_logger()


class DrainingServer(uvicorn.Server):
    """Goes out in order at the first signal, and at once at the second.

    The listener stays open while the yard drains: who comes then is told so by a 503, and `/ready` says it to load
    balancers. uvicorn closes it only when everything admitted has its answer, and waits for the last bytes to leave.
    """

    def __init__(
        self, config: uvicorn.Config, app: Litestar, hangups: SighupHandler, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._server_state: ServerState = app.state.server_state
        self._reloader: Reloader = app.state.reloader
        self._hangups = hangups
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._was_told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            self._hangups.follow(self._reloader.reload_and_log, self._begin_end)
            self._announce()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing to capture: the handlers were set before the slow part of the start, and stay to the very end."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Three cases: 1. told before: die of this signal, now;  2. not serving yet: stop;  3. drain, then stop."""
        if self._was_told:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)  # (1)
        self._was_told = True
        if self._loop is None:
            self.should_exit = True  # (2)
        else:
            self._loop.call_soon_threadsafe(self._begin_end)  # (3)

    def _begin_end(self) -> None:
        if self._ending is None:
            end_latest(self._server_state.settings.grace_seconds + _PATIENCE_S)
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        try:
            await self._server_state.close()
            await self._until_quiet()
        finally:
            self.should_exit = True

    async def _until_quiet(self) -> None:
        """Whoever was on the way is refused in words: a listener that closes cuts off what waits in its backlog."""
        for _ in range(_MAX_LOOKS):
            before = self.server_state.total_requests
            await asyncio.sleep(_LOOK_S)
            if not self.server_state.tasks and self.server_state.total_requests == before:
                return


def end_latest(seconds: float) -> None:
    """See to it that the process is gone by then: a thread that hangs on a device would keep it for ever."""

    def end() -> None:
        log.error("server.forced_end", seconds=seconds)
        os._exit(FORCED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def listen(host: str, port: int) -> socket.socket:
    """The server's socket.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def run_until_told_to_stop(app: Litestar, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return; a second one ends the process. SIGHUP reloads the registry."""
    server_state: ServerState = app.state.server_state
    hangups = SighupHandler()
    config = uvicorn.Config(
        app,
        http=TimeoutHttpProtocol,
        loop="auto",  # uvloop, except on Windows
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn believes X-Forwarded-For of every loopback client unless told not to.
        proxy_headers=bool(server_state.settings.forwarded_allow_ips),
        forwarded_allow_ips=list(server_state.settings.forwarded_allow_ips),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(server_state.settings.grace_seconds) + _AFTER_GRACE_S,
    )
    server = DrainingServer(config, app, hangups, announce)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    _freeze()
    server.run([listener])


def _freeze() -> None:
    """Take what is there now, mostly libraries, out of the garbage collector's sight.

    Each unload of a model ends with a full collection; over torch and transformers (400,000 objects) it holds the
    interpreter lock for 0.3 s, in which no request is answered.
    """
    gc.collect()
    gc.freeze()
