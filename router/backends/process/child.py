"""What runs in a worker process: one host, and the worker's end of the socket. It ends when its parent hangs up.

Started by `forkserver`, so torch is imported already and no thread and no CUDA context has been taken over.
"""

import asyncio
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from typing import cast

import structlog
import uvloop

from engines.errors import EngineError
from engines.rpc.errors import ErrorRecord, error_record_of
from engines.rpc.messages import (
    Cancel,
    Cancelled,
    Frame,
    FrameDecoder,
    HostReport,
    Reply,
    Request,
    decode_request,
    encode_reply,
    pack,
)
from engines.rpc.service import HostService
from router.backends.worker_config import WorkerConfig
from router.observability.logs import configure_logging

SharedBuffer = ctypes.Array[ctypes.c_char]

HEARTBEAT_S = 0.5
"""A worker that has nothing to tell says so."""
_FAREWELL_S = 10.0


class WorkerConnection(asyncio.Protocol):
    """Requests in, replies out; each is a task of its own."""

    def __init__(self) -> None:
        self._service: HostService | None = None
        self._cutter = FrameDecoder()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def num_tasks(self) -> int:
        """Requests that have not ended."""
        return len(self._tasks)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such parent
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        for frame in self._cutter.feed(data):
            self._take(frame)

    async def serve(self, service: HostService) -> None:
        """Answer, and tell what happens as it happens, until the parent hangs up."""
        self._service = service
        telling = asyncio.ensure_future(self._tell(service))
        await self.ended.wait()
        telling.cancel()

    def tell(self, reply: HostReport | ErrorRecord) -> None:
        """Say something that nobody asked for."""
        self._write(0, reply)

    async def _tell(self, service: HostService) -> None:
        after, is_open = 0, True
        while is_open:
            await self._writable.wait()  # a parent that does not read for hours shall not fill this process
            seen = service.poll(after)
            self.tell(seen)
            after = seen.events[-1].seq if seen.events else after
            with suppress(TimeoutError):
                is_open = await asyncio.wait_for(service.host.event_arrived(after), HEARTBEAT_S)

    def _take(self, frame: Frame) -> None:
        request = decode_request(frame.head)
        if isinstance(request, Cancel):
            task = self._tasks.get(request.number)
            if task is not None:
                task.cancel()
            return
        assert self._service is not None, "the parent asks nothing before it has heard that the host is ready"
        task = asyncio.get_running_loop().create_task(self._answer(frame.number, self._service, request))
        self._tasks[frame.number] = task
        task.add_done_callback(partial(self._end, frame.number))

    async def _answer(self, number: int, service: HostService, request: Request) -> None:
        self._write(number, await service.answer(request))

    def _end(self, number: int, task: asyncio.Task[None]) -> None:
        """Not in the task itself: one that is cancelled before it begins runs none of its code."""
        del self._tasks[number]
        if task.cancelled():
            self._write(number, Cancelled())
        elif (error := task.exception()) is not None:
            self._write(number, error_record_of(error if isinstance(error, Exception) else RuntimeError(repr(error))))

    def _write(self, number: int, reply: Reply) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(pack(Frame(number, *encode_reply(reply))))


def die_with_parent() -> None:
    """Let the kernel kill this process when the server is gone, even while it hangs, or is stopped. Linux only.

    Elsewhere, and where the kernel refuses, it ends by itself when its socket is closed, as soon as its loop runs. Not
    PR_SET_PDEATHSIG: the parent by descent is the fork server, and that signal comes when a *thread* of it ends.
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    import fcntl  # late: not on Windows

    end = parent.sentinel  # a pipe with nothing to read but its end
    with suppress(OSError):
        fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([end], timeout=0):
        os._exit(0)  # it had gone before


def run_child(sock: socket.socket, birth: WorkerConfig, box: SharedBuffer) -> None:
    """The worker's `main`.

    Args:
        sock: its end.
        box: shared with the parent: what the host is running, for the case that it dies of it.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or a supervisor tells the whole group; the parent decides
    configure_logging(birth.settings.log_format, birth.settings.log_level)
    structlog.contextvars.bind_contextvars(host=birth.host_id)
    uvloop.run(_main(sock, birth, box))


def clipped(lines: bytes, size: int) -> bytes:
    """The last lines that fit, whole: half a name would be another model's."""
    return lines if len(lines) <= size else lines[-size - 1 :].partition(b"\n")[2]


async def _main(sock: socket.socket, birth: WorkerConfig, box: SharedBuffer) -> None:
    _, channel = await asyncio.get_running_loop().create_unix_connection(WorkerConnection, sock=sock)

    def note(models: str) -> None:
        box.value = clipped(models.encode(), len(box) - 1)

    try:
        host = birth.open(birth, note)
        await host.start()
    except EngineError as error:
        channel.tell(error_record_of(error))
        await asyncio.wait_for(channel.ended.wait(), _FAREWELL_S)
    else:
        await channel.serve(HostService(host, birth.generation))
    os._exit(0)  # at once: threads that hang on a device must not keep the process
