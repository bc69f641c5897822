"""Runs uvicorn: on a socket bound before anything is loaded, with a drain before shutdown."""

import asyncio
import contextvars
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
import uvicorn
from litestar import Litestar

from engines.collection import freeze
from router.server.connection import TimeoutHttpProtocol
from router.server.reloader import Reloader
from router.server.state import ServerState
from router.version import embedyard_version


class SighupHandler:
    """Handles SIGHUP. Created on the main thread before anything slow: until `follow`, the signal is ignored.

    A process that was started to ignore SIGHUP (`nohup`) outlives its terminal, and still reloads on the signal.
    """

    def __init__(self) -> None:
        self._number = getattr(signal, "SIGHUP", None)
        self._task: asyncio.Task[None] | None = None
        if self._number is not None:
            is_ignored = signal.getsignal(self._number) is signal.SIG_IGN
            self._exits_with_terminal = not is_ignored and _has_terminal()
            signal.signal(self._number, lambda *_: None)

    def follow(self, reload: Callable[[], Coroutine[Any, Any, None]], shut_down: Callable[[], None]) -> None:
        """Install the handler on the running loop: calls `shut_down` when the terminal was closed, else `reload`."""

        def on_signal() -> None:
            if self._exits_with_terminal and not _has_terminal():
                shut_down()
            else:
                self._task = asyncio.create_task(reload())

        if self._number is not None:
            asyncio.get_running_loop().add_signal_handler(self._number, on_signal)


def _has_terminal() -> bool:
    """Whether the process has a terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


_KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (usually 60 s): they close first, and never use a closed one."""

_AFTER_GRACE_S = 5
"""The backend fails what it cannot finish within the grace time; uvicorn cancels requests only after that."""

_FORCED_EXIT_MARGIN_S = 15.0
"""Beyond the grace time: for interrupted requests to be answered, threads to end, and the last bytes to be sent."""

_QUIET_S, _MAX_QUIET_CHECKS = 0.15, 10
_BACKLOG = 2048

EXIT_FORCED = 1
"""Exit code of a forced exit with unfinished requests."""

log = structlog.get_logger()


class DrainingServer(uvicorn.Server):
    """Shuts down gracefully at the first signal, and at once at the second.

    The listener stays open while the server drains: new requests get a 503, and `/ready` tells load balancers. uvicorn
    closes it only when every admitted request is answered, and waits until the last bytes are sent.
    """

    def __init__(
        self, config: uvicorn.Config, app: Litestar, sighup: SighupHandler, announce: Callable[[], None], address: str
    ) -> None:
        super().__init__(config)
        self._server_state: ServerState = app.state.server_state
        self._reloader: Reloader = app.state.reloader
        self._sighup = sighup
        self._announce = announce
        self._identity = {"version": embedyard_version(), "address": address}
        self._began_s = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shutdown_task: asyncio.Task[None] | None = None
        self._was_signalled = False

    def run_logged(self, sockets: list[socket.socket]) -> None:
        """Run, and log the beginning and the end."""
        settings = self._server_state.settings
        log.info("server.starting", **self._identity, backend=settings.backend or "auto", pid=os.getpid())
        self.run(sockets)
        log.info("server.stopped", **self._identity, seconds=round(time.monotonic() - self._began_s, 1))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            self._sighup.follow(self._reloader.reload_and_log, self._begin_shutdown)
            self._announce()
            self._log_ready()

    def _log_ready(self) -> None:
        state = self._server_state
        devices = [
            {"device": host.device, "budget_bytes": host.budget_bytes, "total_bytes": host.total_bytes}
            for host in state.backend.snapshots()
        ]
        seconds = round(time.monotonic() - self._began_s, 1)
        log.info("server.ready", **self._identity, devices=devices, models=len(state.registry.models), seconds=seconds)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Do nothing: the handlers are installed before the slow part of the start, and stay until exit."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. Three cases: 1. a second one: die of it;  2. not serving yet: stop;  3. drain, then stop."""
        if self._was_signalled:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)  # (1)
        self._was_signalled = True
        if self._loop is None:
            self.should_exit = True  # (2)
        else:
            self._loop.call_soon_threadsafe(self._begin_shutdown)  # (3)

    def _begin_shutdown(self) -> None:
        if self._shutdown_task is None:
            force_exit_after(self._server_state.settings.grace_seconds + _FORCED_EXIT_MARGIN_S)
            # a context of its own: a signal may arrive while a request runs, whose id would be on the lines that follow
            self._shutdown_task = asyncio.create_task(self._shut_down(), context=contextvars.Context())

    async def _shut_down(self) -> None:
        log.info("server.stopping", **self._identity, grace_seconds=self._server_state.settings.grace_seconds)
        try:
            await self._server_state.close()
            await self._wait_until_quiet()
        finally:
            self.should_exit = True

    async def _wait_until_quiet(self) -> None:
        """Wait until no more requests arrive: closing the listener resets the connections in its backlog."""
        for _ in range(_MAX_QUIET_CHECKS):
            before = self.server_state.total_requests
            await asyncio.sleep(_QUIET_S)
            if not self.server_state.tasks and self.server_state.total_requests == before:
                return


def force_exit_after(seconds: float) -> None:
    """Exit the process after so many seconds at the latest: a thread that hangs on a device would keep it alive."""

    def exit_now() -> None:
        log.error("server.forced_end", seconds=seconds)
        os._exit(EXIT_FORCED)

    timer = threading.Timer(seconds, exit_now)
    timer.daemon = True
    timer.start()


def listen(host: str, port: int) -> socket.socket:
    """Create the listening socket.

    Raises:
        OSError: the address is in use, or not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def run_server(app: Litestar, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return; a second signal kills. SIGHUP reloads the registry."""
    server_state: ServerState = app.state.server_state
    sighup = SighupHandler()
    config = uvicorn.Config(
        app,
        http=TimeoutHttpProtocol,
        loop="auto",  # uvloop, except on Windows
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # uvicorn trusts X-Forwarded-For of every loopback client by default
        proxy_headers=bool(server_state.settings.forwarded_allow_ips),
        forwarded_allow_ips=list(server_state.settings.forwarded_allow_ips),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(server_state.settings.grace_seconds) + _AFTER_GRACE_S,
    )
    host, port = listener.getsockname()[:2]
    server = DrainingServer(
        config, app, sighup, announce, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    freeze()
    server.run_logged([listener])
