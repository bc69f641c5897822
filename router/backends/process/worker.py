"""`Worker`: supervises one worker process: forks it, watches it, and restarts it after a crash.

The process comes from multiprocessing's `forkserver`, which has imported torch once: a child takes 0.02 s and 21 MB of
its own, where a fresh interpreter takes 6 s and 268 MB. The server process imports no torch and makes no CUDA call.
"""

import asyncio
import atexit
import ctypes
import itertools
import multiprocessing
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import structlog
from msgspec import Struct, structs

from engines.errors import EngineError, HostLost
from engines.pause_detector import PauseDetector
from engines.rpc.messages import Drain, HostReport, Poll, Reload, Reply, Request
from router.backends.process.child import HEARTBEAT_S, SharedBuffer, run_child
from router.backends.process.link import ParentConnection
from router.backends.process.outbox import Outbox
from router.backends.worker_config import WorkerConfig

log = structlog.get_logger()

_CRASH_NOTE_BYTES = 4096
_START_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 5.0
_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_SPARE_CALLS = 16
"""Beyond the calls that the server admits: for abandoned ones that are about to end."""
_FORK_ERRORS = (OSError, EOFError)
"""The fork server has died, too, or cannot fork; it is restarted at the next attempt."""
_MAX_SILENCE_S = 60.0
"""Far longer than any load holds a worker's interpreter lock: a worker that is silent for so long hangs."""

_processes: set[ForkServerProcess] = set()


@atexit.register
def kill_workers() -> None:
    """Kill all workers at exit. multiprocessing's own exit handler, which runs next, would join them, and never return
    for one that hangs. On Linux the kernel does this for servers that are killed (`child.die_with_parent`)."""
    for process in _processes:
        process.kill()


PRELOADED = ("engines.machine", "router.backends.process.child")


class WorkerCallbacks(Struct, frozen=True):
    """Callbacks of a worker.

    `on_report`: with every report. `on_crash`: the socket closed unexpectedly; with the models that the worker had
    noted as running, one a line. `on_exit`: the process has exited; with the signal or exit code, empty when it was
    stopped. `on_restart`: the next process is ready.
    """

    on_report: Callable[[HostReport], None]
    on_crash: Callable[[str], None]
    on_exit: Callable[[str], None]
    on_restart: Callable[[], None]


def prepare_forkserver(modules: Sequence[str] = PRELOADED) -> None:
    """Set the modules that the fork server imports; without effect once the first child was forked."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


class Worker:
    """Owns one worker process and the connection to it.

    Attributes:
        config: passed to the next process.
        fault: why the process cannot be restarted; empty while it is up, or starting.
    """

    def __init__(self, config: WorkerConfig, callbacks: WorkerCallbacks) -> None:
        self.config = config
        self.fault = ""
        self._callbacks = callbacks
        self._link: ParentConnection | None = None
        self._process: ForkServerProcess | None = None
        self._crash_note: SharedBuffer | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._up = asyncio.Event()
        self._closing = asyncio.Event()
        self._last_bytes_at_s = 0.0
        self._pauses = PauseDetector()
        self._restarts: list[asyncio.Future[None]] = []
        self._early_reports: list[HostReport] = []

    @property
    def pid(self) -> int | None:
        """Process id of the running process."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Fork, wait until the host is ready, and supervise the process from then on.

        Raises:
            EngineError: the host cannot be created.
        """
        await self._fork()
        self._supervisor = asyncio.create_task(self._supervise())

    async def ask(self, request: Request) -> Reply:
        """See `ParentConnection.ask`; raises HostLost while the process restarts."""
        if self._link is None or not self._up.is_set():
            raise HostLost(f"the worker process of host {self.config.host_id} is restarting; retry the request")
        return await self._link.ask(request)

    async def restart(self, grace_s: float) -> None:
        """Drain, stop and fork again; returns when the host is ready.

        Raises:
            HostLost: the server is shutting down.
        """
        if self._supervisor is None or self._supervisor.done():
            raise self._not_restarted_error()
        restarted = asyncio.get_running_loop().create_future()
        self._restarts.append(restarted)
        link = self._link
        if link is not None and not link.ended.is_set():  # else the next process is starting already
            self._is_stopping = True
            await self._drain(grace_s)
            link.close()
        await restarted

    async def aclose(self, grace_s: float) -> None:
        """Drain and stop the process, and do not restart it."""
        self._closing.set()
        self._is_stopping = True
        await self._drain(grace_s)
        if self._link is not None:
            self._link.close()
        if self._supervisor is not None:
            await self._supervisor
        await self._reap()

    def kill(self) -> None:
        """Kill the process, because it hangs."""
        if self._process is not None:
            self._process.kill()

    def check(self) -> None:
        """Kill the process when it has been silent for so long that it must hang; its calls then go to other hosts.

        Called about every second. Data that arrived while this process was suspended has not been read yet, so silence
        counts from the end of that pause.
        """
        now_s = asyncio.get_running_loop().time()
        silent_s = min(now_s - self._last_bytes_at_s, self._pauses.seconds_since_pause(now_s))
        if self._up.is_set() and silent_s > _MAX_SILENCE_S + HEARTBEAT_S:
            log.error("worker.hangs", host=self.config.host_id, silent_s=round(silent_s, 1))
            self._last_bytes_at_s = now_s
            self.kill()

    # ---- one process ----

    async def _fork(self) -> None:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = socket.socketpair()
        self._crash_note = context.RawArray(ctypes.c_char, _CRASH_NOTE_BYTES)
        process = context.Process(target=run_child, args=(theirs, self.config, self._crash_note), daemon=True)
        try:
            with theirs:
                await asyncio.to_thread(process.start)
        except _FORK_ERRORS:
            ours.close()
            raise
        self._process = process
        _processes.add(process)
        self._early_reports = []
        loop = asyncio.get_running_loop()
        outbox = Outbox(self.config.settings.max_concurrent_requests + _SPARE_CALLS)
        _, self._link = await loop.create_unix_connection(
            lambda: ParentConnection(self.config.host_id, outbox, self._on_bytes, self._on_told, self._on_disconnect),
            sock=ours,
        )
        if self._closing.is_set():
            self._link.close()
        try:
            reports = await asyncio.wait_for(self._wait_ready(self._link), _START_TIMEOUT_S)
            for report in reports:
                self._on_report(report)
        except (EngineError, TimeoutError):
            self._link.close()
            await self._reap()
            raise
        self._up.set()

    async def _wait_ready(self, link: ParentConnection) -> list[HostReport]:
        """Wait for the first report, and send a registry that was read since the worker was forked.

        Returns all reports of the start in their order; the last one shows the worker with the present registry.
        """
        report = first = await link.hello
        while report.generation < self.config.generation:
            config = self.config
            reload = Reload(
                specs=config.specs,
                budget=config.budget,
                host_budget=config.host_budget,
                generation=config.generation,
            )
            await link.ask(reload)
            reply = await link.ask(Poll())
            assert isinstance(reply, HostReport), "the reply to a Poll is a HostReport"
            report = reply
        return [first, *self._early_reports, report] if report is not first else [first, *self._early_reports]

    def _on_told(self, report: HostReport) -> None:
        """Take a report that was not asked for. Before the worker is up it is kept: the host would open too early."""
        if self._up.is_set():
            self._on_report(report)
        else:
            self._early_reports.append(report)

    def _on_bytes(self) -> None:
        self._last_bytes_at_s = asyncio.get_running_loop().time()

    def _on_report(self, report: HostReport) -> None:
        if report.fault:  # calls that look for a host now must not go there
            report = structs.replace(report, snapshot=structs.replace(report.snapshot, is_draining=True))
        self._callbacks.on_report(report)
        if report.fault:
            log.error("worker.fault", host=self.config.host_id, fault=report.fault)
            self.kill()

    def _on_disconnect(self) -> None:
        """Record a crash. Runs before pending requests fail: their retries must avoid this host and crashing models."""
        if self._up.is_set() and not self._is_stopping and self._crash_note is not None:
            self._callbacks.on_crash(self._crash_note.value.decode(errors="ignore"))
        self._up.clear()

    async def _supervise(self) -> None:
        """Restart the process whenever it exits; one that comes up during shutdown is stopped at once."""
        while self._link is not None:
            await self._link.ended.wait()
            was_stopping, self._is_stopping = self._is_stopping, self._closing.is_set()
            await self._reap()
            self._callbacks.on_exit("" if was_stopping else self._exit_cause())
            if not await self._fork_until_up():
                break
            self._callbacks.on_restart()
            self._resolve_restarts(None)
            if self._closing.is_set():
                self._link.close()
        self._resolve_restarts(self._not_restarted_error())

    def _not_restarted_error(self) -> HostLost:
        return HostLost(f"the server shut down before host {self.config.host_id} had restarted")

    def _resolve_restarts(self, error: EngineError | None) -> None:
        """Resolve the futures of callers that wait for a restart."""
        restarted, self._restarts = self._restarts, []
        for future in restarted:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

    def _exit_cause(self) -> str:
        code = self._process.exitcode if self._process is not None else None
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        log.error("worker.died", host=self.config.host_id, ended_by=cause)
        return cause

    async def _fork_until_up(self) -> bool:
        """Fork until it succeeds, with backoff; `fault` has the error meanwhile. Returns False on shutdown."""
        for attempt in itertools.count():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            if self._closing.is_set():
                break
            try:
                await self._fork()
            except (EngineError, TimeoutError, *_FORK_ERRORS) as error:
                self.fault = f"the worker process of host {self.config.host_id} cannot be started: {error}"
                log.error("worker.not_started", host=self.config.host_id, reason=str(error))
            else:
                self.fault = ""
                return True
        return False

    async def _drain(self, grace_s: float) -> None:
        """Ask the worker to finish its calls; kill it when it does not answer in time."""
        if self._link is None or self._link.ended.is_set():
            return
        try:
            await asyncio.wait_for(self._link.ask(Drain(grace_s=grace_s)), grace_s + _EXIT_TIMEOUT_S)
        except (EngineError, TimeoutError) as error:
            log.warning("worker.not_drained", host=self.config.host_id, reason=str(error) or "no answer")
            self.kill()

    async def _reap(self) -> None:
        """Join the process; kill it when it does not exit in time."""
        process = self._process
        if process is None:
            return
        await asyncio.to_thread(process.join, _EXIT_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join, _EXIT_TIMEOUT_S)
        _processes.discard(process)
