"""The parent's end of a worker's socket: many requests at once, and what the worker tells unasked.

Requests are written only while the socket takes them (`pause_writing`), so what a worker does not read waits in the
outbox, from where it can be withdrawn.
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
    """One worker.

    Attributes:
        hello: its first word, that it is ready; or why it is not.
        ended: set when the socket is closed: the worker is gone, or soon will be.

    Args:
        name: for messages.
        outbox: decides what is sent.
        on_bytes: called whenever something has come: the worker lives.
        on_seen: called with every word after the first.
        on_end: called when the socket is closed, before those who wait for answers are told.
    """

    def __init__(
        self,
        name: str,
        outbox: Outbox,
        on_bytes: Callable[[], None],
        on_seen: Callable[[HostReport], None],
        on_end: Callable[[], None],
    ) -> None:
        self._name = name
        self._outbox = outbox
        self._on_bytes = on_bytes
        self._on_seen = on_seen
        self._on_end = on_end
        self._is_writable = False
        self._cutter = FrameDecoder()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._last_number = 0
        self._transport: asyncio.Transport | None = None
        self.hello: asyncio.Future[HostReport] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such parent
        self._transport.set_write_buffer_limits(
            high=0
        )  # what the socket does not take at once shall wait in the outbox
        self._is_writable = True
        self._flush()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._on_bytes()
        for frame in self._cutter.feed(data):
            self._take(frame)
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
            self.hello.exception()  # nobody may be waiting for it

    async def ask(self, request: Request) -> Reply:
        """The worker's reply. Cancelling withdraws the request, or cancels what the worker does for it.

        Raises:
            EngineError: as the host raised it.
            HostLost: the worker ended first.
            NotSent: it ended before the request was sent.
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
        """Hang up: the worker ends by that. At once: one that does not read would hold back the end for ever."""
        if self._transport is not None:
            self._transport.abort()

    def _take(self, frame: Frame) -> None:
        reply = decode_reply(frame.head, frame.body)
        if frame.number:
            self._outbox.end(frame.number)
            self._deliver(frame.number, reply)
        elif isinstance(reply, HostReport) and self.hello.done():
            self._on_seen(reply)
        elif isinstance(reply, HostReport):
            self.hello.set_result(reply)
        elif isinstance(reply, ErrorRecord) and not self.hello.done():
            self.hello.set_exception(error_of(reply))

    def _deliver(self, number: int, reply: Reply) -> None:
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        if isinstance(reply, Cancelled):
            future.set_exception(HostLost(f"host {self._name} interrupted the request; ask again"))
        else:
            future.set_result(reply)

    def _flush(self) -> None:
        """Write what may be written now."""
        while self._is_writable and self._transport is not None and not self._transport.is_closing():
            popped = self._outbox.pop()
            if popped is None:
                return
            number, request = popped
            try:
                head = encode_request(request)
            except Exception as error:  # noqa: BLE001  # it is its caller's, whoever's turn it is to write
                self._outbox.end(number)
                self._fail(number, error)
                continue
            self._outbox.weigh(number, len(head))
            self._transport.write(pack(Frame(number, head, b""))[0])  # requests have no body

    def _fail(self, number: int, error: Exception) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_exception(error)

    def _lost(self, is_not_sent: bool = False) -> EngineError:
        cls = NotSent if is_not_sent else HostLost
        return cls(f"the worker process of host {self._name} ended before it answered; ask again")
