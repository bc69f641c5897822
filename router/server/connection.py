"""One connection: uvicorn's protocol, and beside it the patience and the room that a client gets.

A client that sends its request a byte an hour, or never reads its answer, holds a connection and memory for nothing.
uvicorn limits neither, nor the size of what comes before the body, and takes an answer as sent when the transport has
it, in memory; and it answers what is no HTTP in plain text.
"""

import asyncio
import socket
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import msgspec
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.schemas.inference import ErrorDetail, ErrorEnvelope

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
    from uvicorn._types import Scope as ASGIScope

log = structlog.get_logger()

HEAD_S = 20.0
"""From the first byte of a request, or from the connection's begin, to the end of the headers."""
BODY_S = 30.0
"""Between two pieces of a body."""
BODY_TOTAL_S = 60.0
MIN_BODY_BYTES_PER_S = 8 * 1024
"""A whole body has `BODY_TOTAL_S`, and a second more for each so many bytes that have come."""
WRITE_S = 60.0
"""How long nothing of an answer may flow while some of it waits for the client to read."""
LAST_WRITE_S = 5.0
"""The same while the server shuts down, more than `MAX_UNREAD_BYTES` of its answers wait, or no connection is free:
those who read are not asked to be faster, and those who do not read go first."""
MAX_UNREAD_BYTES = 512 * 2**20
_LOOKS = 4
"""So many times within the shorter wait it is looked whether anything has flowed."""
PIECE_BYTES = 64 * 1024
"""Of an answer that is handed over at once."""
SMALL_BYTES = 16 * 1024
"""An answer that ends as soon as it is handed over: to wait for it takes 5 µs, and less than this much is unread."""
MAX_UNSENT_BYTES = 128 * 1024
"""What the kernel takes of an answer before the network does. Its own bound is 4 MB a connection: memory that no
permit covers, and, because the kernel asks for more only when a third of it has left, a minute without a sign of
life from a client that reads 20 KB/s."""
MAX_HEAD_BYTES = 64 * 1024
"""Address and headers of one request."""
MAX_PIPELINED = 64
"""Requests that wait on one connection behind the one that is being answered. 256 KiB, which are read at once, hold
4,000 of them, and 12 MB of memory."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""What is read, and thrown away, of a body whose request has been answered."""


_MOST = 8192
_OWN_FILES = 256
"""Files that models, workers and logs need: a load fails that may open none."""


def most_connections() -> int:
    """As many as the process may have open files, less its own; and no more than can be looked through in 2 ms."""
    try:
        import resource  # not on Windows
    except ImportError:
        return _MOST
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else min(_MOST, max(limit // 2, limit - _OWN_FILES))


MAX_CONNECTIONS = most_connections()
"""Beyond it the connections that have been idle longest make room, a part of them at a time: they have to be sought."""
_ROOM = 16


class Unread:
    """What is held of the large answers of one server that have not left yet."""

    num_bytes = 0


_UNREAD = WeakKeyDictionary[ServerState, Unread]()


class TimeoutHttpProtocol(HttpToolsProtocol):
    """Closes connections whose client does not get on, and hands over answers no faster than they are read.

    The transport keeps nothing that the kernel does not take at once without pausing the protocol, so `write_paused`
    means that the client has not read all of what was written. An app's last `send` of a large answer returns when
    that is over: what the app holds for a request, its place and permit among it, it holds until the answer has left.
    """

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _is_leaving = False
    _idle_since_s = 0.0
    _unsent_bytes = 0
    _flowed_s = 0.0
    _app: "ASGI3Application"
    _unread: Unread
    _running: RequestResponseCycle | None = None
    _is_ending = False
    _in_head = True
    _in_body = False
    _head_bytes = 0
    _body_bytes = 0
    _body_began_s = 0.0
    _discarded_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        _limit_unsent(transport)
        self._unread = _UNREAD.setdefault(self.server_state, Unread())
        self._app = self.app
        self.app = self._serve
        self._idle_since_s = self.loop.time()
        self._wait(HEAD_S)
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_writing()
        if self._running is not None and not self._running.response_complete:  # uvicorn tells the newest request only
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        self.app = self._app  # else the protocol holds itself
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What the parser has not understood yet lies in its memory, so the size is looked at here."""
        if self._in_head:
            self._head_bytes += len(data)
        elif self._in_body:
            self._body_bytes += len(data)
        super().data_received(data)
        if self._in_body:
            self._wait_for_body()
        elif self._in_head:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
        elif self._timer is None and self.timeout_keep_alive_task is None and self._is_idle():
            self._wait(HEAD_S)  # empty lines, which are no request yet, ended uvicorn's own wait

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._wait(HEAD_S)

    def on_headers_complete(self) -> None:
        size_bytes = len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if size_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._end_after_answers()
        if self._is_over:
            return
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        self._body_bytes, self._body_began_s, self._discarded_bytes = 0, self.loop.time(), 0
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle

    def on_body(self, body: bytes) -> None:
        if self._is_over:
            return
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop()
        if not self._is_over:
            super().on_message_complete()

    def shutdown(self) -> None:
        super().shutdown()
        self._is_leaving = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent_bytes, self._flowed_s = self.transport.get_write_buffer_size(), self.loop.time()
        self._watch_writing()

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    def _serve(self, scope: "ASGIScope", receive: "ASGIReceiveCallable", send: "ASGISendCallable") -> Awaitable[None]:
        return self._app(scope, receive, partial(self._send, send))

    async def _send(self, send: "ASGISendCallable", message: "ASGISendEvent") -> None:
        """Hand an answer over in pieces, each when the one before has left, and end it when the last has."""
        if message["type"] != "http.response.body" or len(message["body"]) <= SMALL_BYTES:
            await send(message)
            return
        body, is_last = message["body"], not message.get("more_body", False)
        self._unread.num_bytes += len(body)
        try:
            for start in range(0, len(body), PIECE_BYTES):
                piece = body[start : start + PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if is_last:
                await self.flow.drain()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._unread.num_bytes -= len(body)

    def send_400_response(self, msg: str) -> None:
        """What cannot be read is told so in the contract's envelope, too."""
        self._refuse(400, "This is not a request in HTTP/1.1.")

    def _refuse_head(self) -> None:
        self._refuse(431, f"Address and headers have more than {MAX_HEAD_BYTES} bytes: send fewer or shorter ones.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer past the app, which has not seen the request or waits for the rest of it; and close."""
        if self._is_over:
            return
        if not self._is_next():
            self._end_after_answers()
            return
        detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code="invalid_value")
        body = msgspec.json.encode(ErrorEnvelope(error=detail))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _is_next(self) -> bool:
        """Whether the next answer of the connection is that of the request which is being read."""
        if self._is_idle():
            return not self._in_body  # else its answer did not wait for its body
        return self._in_body and not self.pipeline and not self.cycle.response_started

    def _is_idle(self) -> bool:
        """Whether every request whose head has been read is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_over(self) -> bool:
        """Whether nothing more is read of this connection."""
        return self._is_ending or self.transport.is_closing()

    def _end_after_answers(self) -> None:
        """Close once the requests that have come whole are answered."""
        self._stop()
        self._is_ending = True
        if self._in_body and self.pipeline:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is None or last.response_complete:
            self.transport.close()
        else:
            last.keep_alive = False

    def _make_room(self) -> None:
        """Close idle connections, or, when every other has a request, this one."""
        found = [
            one for one in self.connections if isinstance(one, TimeoutHttpProtocol) and not one.transport.is_closing()
        ]
        if len(found) <= MAX_CONNECTIONS:
            return  # the others are on their way out
        idle = [one for one in found if one is not self and one._is_idle()]
        idle.sort(key=lambda one: one._idle_since_s)
        for one in idle[: max(1, MAX_CONNECTIONS // _ROOM)]:
            one.transport.abort()
        if not idle:
            self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self._give_up, seconds)

    def _wait_for_body(self) -> None:
        """Two bounds: from piece to piece, and for the whole by what has come."""
        total_s = BODY_TOTAL_S + self._body_bytes / MIN_BODY_BYTES_PER_S
        left_s = self._body_began_s + total_s - self.loop.time()
        self._stop()
        if left_s < BODY_S:
            self._timer = self.loop.call_later(max(0.0, left_s), self._give_up, total_s)
        else:
            self._wait(BODY_S)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_writing(self) -> None:
        wait_s = min(WRITE_S, LAST_WRITE_S) / _LOOKS
        self._write_timer = self.loop.call_later(wait_s, self._look_at_writing)

    def _look_at_writing(self) -> None:
        """While the protocol is paused nobody writes, so what waits gets fewer when the client reads, and only then."""
        unsent_bytes, now_s = self.transport.get_write_buffer_size(), self.loop.time()
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes, self._flowed_s = unsent_bytes, now_s
        is_full = self._unread.num_bytes > MAX_UNREAD_BYTES or len(self.connections) >= MAX_CONNECTIONS
        wait_s = LAST_WRITE_S if is_full or self._is_leaving else WRITE_S
        if now_s - self._flowed_s < wait_s:
            self._watch_writing()
            return
        self._write_timer = None
        log.warning("connection.stalled", seconds=wait_s, unsent_bytes=unsent_bytes)
        self.transport.abort()

    def _stop_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _give_up(self, seconds: float) -> None:
        self._timer = None
        if self._in_body and self.flow.read_paused:  # it is this server that does not get on
            self._body_began_s = self.loop.time()
            self._wait_for_body()
        elif self._in_body or self._head_bytes:
            self._refuse(408, f"The rest of the request did not come within {round(seconds, 1):g} s: send it again.")
        elif not self.transport.is_closing():
            self.transport.close()


def _limit_unsent(transport: asyncio.Transport) -> None:
    """Only TCP has it, and not on every system."""
    connection = transport.get_extra_info("socket")
    if (
        connection is not None
        and hasattr(socket, "TCP_NOTSENT_LOWAT")
        and connection.family in (socket.AF_INET, socket.AF_INET6)
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
