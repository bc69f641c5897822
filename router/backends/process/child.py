"""Runs in a worker process: one host, and the worker's end of the socket. Exits when the parent closes the socket.

Started by `forkserver`, so torch is imported already and no thread and no CUDA context is inherited.
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
from router.backends.worker_config import WorkerConfig, start_host
from router.observability.logs import configure_logging

SharedBuffer = ctypes.Array[ctypes.c_char]

HEARTBEAT_S = 0.5
"""Interval of reports from a worker in which nothing happens."""
_ERROR_DELIVERY_S = 10.0


class WorkerConnection(asyncio.Protocol):
    """Receives requests and sends replies; each request runs in its own task."""

    def __init__(self) -> None:
        self._service: HostService | None = None
        self._decoder = FrameDecoder()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def num_tasks(self) -> int:
        """Number of requests that have not ended."""
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
        for frame in self._decoder.feed(data):
            self._handle(frame)

    async def serve(self, service: HostService) -> None:
        """Answer requests and stream reports until the parent closes the socket."""
        self._service = service
        reporting = asyncio.ensure_future(self._stream_reports(service))
        await self.ended.wait()
        reporting.cancel()

    def send_unasked(self, reply: HostReport | ErrorRecord) -> None:
        """Send a message that answers no request (number 0)."""
        self._write(0, reply)

    async def _stream_reports(self, service: HostService) -> None:
        after, is_open = 0, True
        while is_open:
            await self._writable.wait()  # a parent that does not read for hours must not fill this process's memory
            report = service.poll(after)
            self.send_unasked(report)
            after = report.events[-1].seq if report.events else after
            with suppress(TimeoutError):
                is_open = await asyncio.wait_for(service.host.event_arrived(after), HEARTBEAT_S)

    def _handle(self, frame: Frame) -> None:
        request = decode_request(frame.head)
        if isinstance(request, Cancel):
            task = self._tasks.get(request.number)
            if task is not None:
                task.cancel()
            return
        assert self._service is not None, "the parent sends no request before the first report"
        task = asyncio.get_running_loop().create_task(self._answer(frame.number, self._service, request))
        self._tasks[frame.number] = task
        task.add_done_callback(partial(self._end, frame.number))

    async def _answer(self, number: int, service: HostService, request: Request) -> None:
        self._write(number, await service.answer(request))

    def _end(self, number: int, task: asyncio.Task[None]) -> None:
        """Report a request's end. A callback: a task that is cancelled before it starts runs none of its code."""
        del self._tasks[number]
        if task.cancelled():
            self._write(number, Cancelled())
        elif (error := task.exception()) is not None:
            self._write(number, error_record_of(error if isinstance(error, Exception) else RuntimeError(repr(error))))

    def _write(self, number: int, reply: Reply) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(pack(Frame(number, *encode_reply(reply))))


def die_with_parent() -> None:
    """Make the kernel kill this process when the server is gone, even while it hangs or is stopped. Linux only.

    Elsewhere, and where the kernel refuses, the process exits when its socket is closed, as soon as its loop runs. Not
    PR_SET_PDEATHSIG: the parent process is the fork server, and that signal is sent when a *thread* of it ends.
    """
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    import fcntl  # late: not on Windows

    end = parent.sentinel  # a pipe on which nothing is ever sent, only closed
    with suppress(OSError):
        fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([end], timeout=0):
        os._exit(0)  # it had exited before


def run_child(sock: socket.socket, config: WorkerConfig, crash_note: SharedBuffer) -> None:
    """Run the worker: its `main`.

    Args:
        sock: the worker's end of the socket.
        crash_note: memory shared with the parent: the models that the host is running, read after a crash.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or a supervisor signals the whole group; the parent decides
    configure_logging(config.settings.log_format, config.settings.log_level)
    structlog.contextvars.bind_contextvars(host=config.host_id)
    uvloop.run(_main(sock, config, crash_note))


def fit_lines(lines: bytes, size: int) -> bytes:
    """Keep the last whole lines that fit: half a name could be another model's."""
    return lines if len(lines) <= size else lines[-size - 1 :].partition(b"\n")[2]


async def _main(sock: socket.socket, config: WorkerConfig, crash_note: SharedBuffer) -> None:
    _, channel = await asyncio.get_running_loop().create_unix_connection(WorkerConnection, sock=sock)

    def note(models: str) -> None:
        crash_note.value = fit_lines(models.encode(), len(crash_note) - 1)

    try:
        host = config.open(config, note)
        await start_host(host)
    except EngineError as error:
        channel.send_unasked(error_record_of(error))
        await asyncio.wait_for(channel.ended.wait(), _ERROR_DELIVERY_S)
    else:
        await channel.serve(HostService(host, config.generation))
    os._exit(0)  # at once: threads that hang on a device must not keep the process alive
