"""The parent's end of a worker's socket: many requests at once, and what the worker tells unasked."""

import asyncio
from collections.abc import Callable
from typing import cast

from engines.errors import EngineError, HostLost
from engines.failures import Failure, error_of
from engines.wire import Cancel, Cutter, Frame, Reply, Request, Seen, decode_reply, encode_request, pack


class Link(asyncio.Protocol):
    """One worker.

    Attributes:
        hello: its first word, that it is ready; or why it is not.
        ended: set when the socket is closed: the worker is gone, or soon will be.

    Args:
        name: for messages.
        on_seen: called with every word after the first.
        on_end: called when the socket is closed, before those who wait for answers are told.
    """

    def __init__(self, name: str, on_seen: Callable[[Seen], None], on_end: Callable[[], None]) -> None:
        self._name = name
        self._on_seen = on_seen
        self._on_end = on_end
        self._cutter = Cutter()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._last_number = 0
        self._transport: asyncio.Transport | None = None
        self.hello: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such parent

    def data_received(self, data: bytes) -> None:
        for frame in self._cutter.feed(data):
            self._take(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self._on_end()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost())
        if not self.hello.done():
            self.hello.set_exception(self._lost())
            self.hello.exception()  # nobody may be waiting for it

    async def ask(self, request: Request) -> Reply:
        """The worker's reply. Cancelling cancels what the worker does for it.

        Raises:
            EngineError: as the host raised it.
            HostLost: the worker ended first.
        """
        if self.ended.is_set():
            raise self._lost()
        self._last_number += 1
        number = self._last_number
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._write(number, request)
        try:
            reply = await future
        except asyncio.CancelledError:
            self._write(0, Cancel(number=number))
            raise
        finally:
            del self._waiting[number]
        if isinstance(reply, Failure):
            raise error_of(reply)
        return reply

    def close(self) -> None:
        """Hang up: the worker ends by that."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, frame: Frame) -> None:
        reply = decode_reply(frame.head, frame.body)
        if frame.number:
            future = self._waiting.get(frame.number)
            if future is not None and not future.done():
                future.set_result(reply)
        elif isinstance(reply, Seen) and self.hello.done():
            self._on_seen(reply)
        elif isinstance(reply, Seen):
            self.hello.set_result(reply)
        elif isinstance(reply, Failure) and not self.hello.done():
            self.hello.set_exception(error_of(reply))

    def _write(self, number: int, request: Request) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(pack(Frame(number, encode_request(request), b"")))

    def _lost(self) -> EngineError:
        return HostLost(f"the worker process of host {self._name} ended before it answered; ask again")
