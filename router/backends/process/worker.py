"""One worker's life: forked, watched, and forked anew when it has died. Knows nothing of other workers.

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
from msgspec import Struct

from engines.errors import EngineError, HostLost
from engines.pause_detector import PauseDetector
from engines.rpc.messages import Drain, HostReport, Poll, Reload, Reply, Request
from router.backends.process.child import HEARTBEAT_S, SharedBuffer, run_child
from router.backends.process.link import ParentConnection
from router.backends.process.outbox import Outbox
from router.backends.worker_config import WorkerConfig

log = structlog.get_logger()

_BOX_BYTES = 4096
_HELLO_S = 120.0
_END_S = 5.0
_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_MORE_CALLS = 16
"""Beyond the calls that the server lets in: room for abandoned ones that end in a moment."""
_NOT_FORKED = (OSError, EOFError)
"""The fork server has died, too, or cannot fork; it is started anew at the next attempt."""
_MAX_SILENCE_S = 60.0
"""Far longer than any load holds a worker's interpreter: one that is silent for so long hangs."""

_living: set[ForkServerProcess] = set()


@atexit.register
def kill_workers() -> None:
    """Nobody drains them any more. multiprocessing, whose turn is next, would wait for them, and for ever for one that
    hangs. On Linux the kernel does it for servers that do not come to this (`child.die_with_parent`)."""
    for process in _living:
        process.kill()


PRELOADED = ("engines.machine", "router.backends.process.child")


class WorkerCallbacks(Struct, frozen=True):
    """Who hears of a worker.

    `seen`: every word. `died`: it answers no more, unasked; with the models that it had noted to run, one a line.
    `ended`: the process is gone, and by what; empty when it was told to. `back`: its next life has begun.
    """

    on_report: Callable[[HostReport], None]
    on_crash: Callable[[str], None]
    on_exit: Callable[[str], None]
    on_restart: Callable[[], None]


def prepare_forkserver(modules: Sequence[str] = PRELOADED) -> None:
    """Say what children find imported; without effect once the first was forked."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


class Worker:
    """One child process and what is known of it.

    Attributes:
        birth: what its next life is told.
        fault: why it cannot be brought back, empty as long as it is up or will soon be.
    """

    def __init__(self, birth: WorkerConfig, ears: WorkerCallbacks) -> None:
        self.birth = birth
        self.fault = ""
        self._ears = ears
        self._link: ParentConnection | None = None
        self._process: ForkServerProcess | None = None
        self._box: SharedBuffer | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_wanted_dead = False
        self._up = asyncio.Event()
        self._closing = asyncio.Event()
        self._heard_at_s = 0.0
        self._awake = PauseDetector()
        self._reborn: list[asyncio.Future[None]] = []

    @property
    def pid(self) -> int | None:
        """Of the living process."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Fork, and wait until the host is ready; from then on it is kept alive.

        Raises:
            EngineError: the host cannot be made.
        """
        await self._fork()
        self._keeper = asyncio.create_task(self._supervise())

    async def ask(self, request: Request) -> Reply:
        """See `ParentConnection.ask`; between two lives nobody answers."""
        if self._link is None or not self._up.is_set():
            raise HostLost(f"the worker process of host {self.birth.host_id} is being started anew; ask again")
        return await self._link.ask(request)

    async def restart(self, grace_s: float) -> None:
        """Drain, end, fork anew; returns when the host is ready again.

        Raises:
            HostLost: the server ends.
        """
        if self._keeper is None or self._keeper.done():
            raise self._not_back()
        reborn = asyncio.get_running_loop().create_future()
        self._reborn.append(reborn)
        life = self._link
        if life is not None and not life.ended.is_set():  # else its next life has begun to come, and shall last
            self._is_wanted_dead = True
            await self._drain(grace_s)
            life.close()
        await reborn

    async def aclose(self, grace_s: float) -> None:
        """Drain and end, for good."""
        self._closing.set()
        self._is_wanted_dead = True
        await self._drain(grace_s)
        if self._link is not None:
            self._link.close()
        if self._keeper is not None:
            await self._keeper
        await self._reap()

    def kill(self) -> None:
        """End the process at once, because it hangs."""
        if self._process is not None:
            self._process.kill()

    def check(self) -> None:
        """Kill it when it has been silent for so long that it must hang; its calls go to others then.

        Called every second or so. What it said while this process stood still was not heard yet, so it has said nothing
        only since this process runs again.
        """
        now_s = asyncio.get_running_loop().time()
        silent_s = min(now_s - self._heard_at_s, self._awake.seconds_since_pause(now_s))
        if self._up.is_set() and silent_s > _MAX_SILENCE_S + HEARTBEAT_S:
            log.error("worker.hangs", host=self.birth.host_id, silent_s=round(silent_s, 1))
            self._heard_at_s = now_s
            self.kill()

    # ---- one life ----

    async def _fork(self) -> None:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = socket.socketpair()
        self._box = context.RawArray(ctypes.c_char, _BOX_BYTES)
        process = context.Process(target=run_child, args=(theirs, self.birth, self._box), daemon=True)
        try:
            with theirs:
                await asyncio.to_thread(process.start)
        except _NOT_FORKED:
            ours.close()
            raise
        self._process = process
        _living.add(process)
        loop = asyncio.get_running_loop()
        outbox = Outbox(self.birth.settings.max_concurrent_requests + _MORE_CALLS)
        _, self._link = await loop.create_unix_connection(
            lambda: ParentConnection(self.birth.host_id, outbox, self._sign_of_life, self._on_report, self._hang_up),
            sock=ours,
        )
        if self._closing.is_set():
            self._link.close()
        try:
            self._on_report(await asyncio.wait_for(self._greet(self._link), _HELLO_S))
        except (EngineError, TimeoutError):
            self._link.close()
            await self._reap()
            raise
        self._up.set()

    async def _greet(self, link: ParentConnection) -> HostReport:
        """Wait for the first word, and tell of a registry that was read since the worker was forked."""
        seen = await link.hello
        while seen.generation < self.birth.generation:
            config = self.birth
            await link.ask(Reload(specs=config.specs, budget=config.budget, generation=config.generation))
            reply = await link.ask(Poll())
            assert isinstance(reply, HostReport), "a look is answered with what is seen"
            seen = reply
        return seen

    def _sign_of_life(self) -> None:
        self._heard_at_s = asyncio.get_running_loop().time()

    def _on_report(self, seen: HostReport) -> None:
        self._ears.on_report(seen)
        if seen.fault:
            log.error("worker.fault", host=self.birth.host_id, fault=seen.fault)
            self.kill()

    def _hang_up(self) -> None:
        """Heard before those who wait are told: they must not be sent here again, nor a model that kills to others."""
        if self._up.is_set() and not self._is_wanted_dead and self._box is not None:
            self._ears.on_crash(self._box.value.decode(errors="ignore"))
        self._up.clear()

    async def _supervise(self) -> None:
        """Wait for the end of each life, and begin the next; a life that begins while all shall end, ends at once."""
        while self._link is not None:
            await self._link.ended.wait()
            was_wanted, self._is_wanted_dead = self._is_wanted_dead, self._closing.is_set()
            await self._reap()
            self._ears.on_exit("" if was_wanted else self._cause_of_death())
            if not await self._revive():
                break
            self._ears.on_restart()
            self._settle_reborn(None)
            if self._closing.is_set():
                self._link.close()
        self._settle_reborn(self._not_back())

    def _not_back(self) -> HostLost:
        return HostLost(f"the server ended before host {self.birth.host_id} was back")

    def _settle_reborn(self, error: EngineError | None) -> None:
        """Tell those who wait for the next life."""
        reborn, self._reborn = self._reborn, []
        for future in reborn:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

    def _cause_of_death(self) -> str:
        code = self._process.exitcode if self._process is not None else None
        cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        log.error("worker.died", host=self.birth.host_id, ended_by=cause)
        return cause

    async def _revive(self) -> bool:
        """Fork until it works, with pauses that grow; meanwhile the fault says what is wrong. False: it shall end."""
        for attempt in itertools.count():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            if self._closing.is_set():
                break
            try:
                await self._fork()
            except (EngineError, TimeoutError, *_NOT_FORKED) as error:
                self.fault = f"the worker process of host {self.birth.host_id} cannot be started: {error}"
                log.error("worker.not_started", host=self.birth.host_id, reason=str(error))
            else:
                self.fault = ""
                return True
        return False

    async def _drain(self, grace_s: float) -> None:
        """A worker that does not answer in time hangs, and is not waited for any longer."""
        if self._link is None or self._link.ended.is_set():
            return
        try:
            await asyncio.wait_for(self._link.ask(Drain(grace_s=grace_s)), grace_s + _END_S)
        except (EngineError, TimeoutError) as error:
            log.warning("worker.not_drained", host=self.birth.host_id, reason=str(error) or "no answer")
            self.kill()

    async def _reap(self) -> None:
        """The process is gone afterwards, by itself or not."""
        process = self._process
        if process is None:
            return
        await asyncio.to_thread(process.join, _END_S)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join, _END_S)
        _living.discard(process)
