"""The parent's end of a worker's socket: concurrent requests, and the worker's own reports.

Requests are written only while the socket accepts them (`pause_writing`), so what a worker does not read stays in the
outbox, where it can be withdrawn.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from engines.errors import EngineError, HostLost
from engines.rpc.errors import ErrorRecord, error_of
from engines.rpc.messages import (
    Cancelled,
    Frame,
    FrameDecoder,
    HostReport,
    Reply,
    Request,
    decode_reply,
    encode_request,
    pack,
)
from router.backends.fleet import NotSent
from router.backends.process.outbox import Outbox


class ParentConnection(asyncio.Protocol):
    """Multiplexes requests over the socket of one worker.

    Attributes:
        hello: the first report, which says that the host is ready; or the error that prevented it.
        ended: set when the socket is closed: the worker has exited, or soon will.

    Args:
        name: host id, for messages.
        outbox: decides what is sent.
        on_bytes: called whenever data arrives: the worker is alive.
        on_report: called with every report after the first.
        on_end: called when the socket is closed, before pending requests fail.
    """

    def __init__(
        self,
        name: str,
        outbox: Outbox,
        on_bytes: Callable[[], None],
        on_report: Callable[[HostReport], None],
        on_end: Callable[[], None],
    ) -> None:
        self._name = name
        self._outbox = outbox
        self._on_bytes = on_bytes
        self._on_report = on_report
        self._on_end = on_end
        self._is_writable = False
        self._decoder = FrameDecoder()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._last_number = 0
        self._transport: asyncio.Transport | None = None
        self.hello: asyncio.Future[HostReport] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such parent
        self._transport.set_write_buffer_limits(high=0)  # what the socket does not accept at once stays in the outbox
        self._is_writable = True
        self._flush()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._on_bytes()
        for frame in self._decoder.feed(data):
            self._handle(frame)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_writable = False
        self.ended.set()
        self._on_end()
        for number, future in self._waiting.items():
            if not future.done():
                future.set_exception(self._lost(self._outbox.is_waiting(number)))
        if not self.hello.done():
            self.hello.set_exception(self._lost())
            self.hello.exception()  # marks it as retrieved: there may be no waiter

    async def ask(self, request: Request) -> Reply:
        """Send a request and return the reply. Cancelling withdraws it, or cancels its task in the worker.

        Raises:
            EngineError: raised by the host.
            HostLost: the worker ended before it replied.
            NotSent: the worker ended before the request was sent.
        """
        if self.ended.is_set():
            raise self._lost()
        self._last_number += 1
        number = self._last_number
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._outbox.put(number, request)
        self._flush()
        try:
            reply = await future
        except asyncio.CancelledError:
            self._outbox.withdraw(number)
            self._flush()
            raise
        finally:
            del self._waiting[number]
        if isinstance(reply, ErrorRecord):
            raise error_of(reply)
        return reply

    def close(self) -> None:
        """Abort the connection, which ends the worker. A graceful close would hang on a worker that does not read."""
        if self._transport is not None:
            self._transport.abort()

    def _handle(self, frame: Frame) -> None:
        reply = decode_reply(frame.head, frame.body)
        if frame.number:
            self._outbox.end(frame.number)
            self._deliver(frame.number, reply)
        elif isinstance(reply, HostReport) and self.hello.done():
            self._on_report(reply)
        elif isinstance(reply, HostReport):
            self.hello.set_result(reply)
        elif isinstance(reply, ErrorRecord) and not self.hello.done():
            self.hello.set_exception(error_of(reply))

    def _deliver(self, number: int, reply: Reply) -> None:
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        if isinstance(reply, Cancelled):
            future.set_exception(HostLost(f"host {self._name} interrupted the request; retry it"))
        else:
            future.set_result(reply)

    def _flush(self) -> None:
        """Write requests while the socket accepts them."""
        while self._is_writable and self._transport is not None and not self._transport.is_closing():
            popped = self._outbox.pop()
            if popped is None:
                return
            number, request = popped
            try:
                head = encode_request(request)
            except Exception as error:  # noqa: BLE001  # belongs to the request's caller, not to the task that happens to write
                self._outbox.end(number)
                self._fail(number, error)
                continue
            self._outbox.record_size(number, len(head))
            self._transport.write(pack(Frame(number, head, b""))[0])  # requests have no body

    def _fail(self, number: int, error: Exception) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_exception(error)

    def _lost(self, is_not_sent: bool = False) -> EngineError:
        cls = NotSent if is_not_sent else HostLost
        return cls(f"the worker process of host {self._name} ended before it replied; retry the request")
