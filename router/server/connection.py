"""`TimeoutHttpProtocol`: uvicorn's HTTP protocol with timeouts, size limits and backpressure.

A client that sends one byte an hour, or never reads its response, holds a connection and memory for nothing. uvicorn
limits neither, nor the size of the head, and regards a response as sent when the transport has buffered it in memory;
and it answers malformed HTTP in plain text.
"""

import asyncio
import socket
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.schemas.inference import ErrorDetail, ErrorEnvelope
from router.server.open_files import connection_limit

if TYPE_CHECKING:
    from uvicorn._types import (
        ASGI3Application,
        ASGIReceiveCallable,
        ASGISendCallable,
        ASGISendEvent,
        HTTPResponseStartEvent,
    )
    from uvicorn._types import Scope as ASGIScope

log = structlog.get_logger()

HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request, or from the opening of the connection, to the end of the headers."""
BODY_TIMEOUT_S = 30.0
"""Between two chunks of a body."""
BODY_TOTAL_TIMEOUT_S = 60.0
MIN_BODY_BYTES_PER_S = 8 * 1024
"""A whole body may take `BODY_TOTAL_TIMEOUT_S`, plus one second for each so many bytes received."""
WRITE_TIMEOUT_S = 60.0
"""How long a client may read nothing while part of a response waits for it."""
MIN_WRITE_TIMEOUT_S = 5.0
"""The same while the server shuts down, more than `MAX_UNREAD_BYTES` of responses wait, or no connection is free:
clients that read are not affected, stalled ones are dropped first."""
MAX_UNREAD_BYTES = 512 * 2**20
_CHECKS_PER_TIMEOUT = 4
"""Number of progress checks within the shorter timeout."""
CHUNK_BYTES = 64 * 1024
"""Bytes of a response that are passed to the transport at once."""
SMALL_BYTES = 16 * 1024
"""Responses up to this size are sent without waiting for the client: waiting takes 5 µs, and little is unread."""
MAX_UNSENT_BYTES = 128 * 1024
"""Bytes of a response that the kernel buffers before the network takes them. Its default bound is 4 MB a connection:
memory that no permit covers; and because the kernel asks for more only when a third of it is sent, a client that reads
20 KB/s would show no progress for a minute."""
MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers of one request; and its trailers, of which 15 MiB take 300 MiB of memory."""
MAX_PIPELINED = 64
"""Requests that may wait on one connection behind the current one. A single read of 256 KiB can hold 4,000: 12 MB."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""Bytes that are read and discarded of a body whose request has been answered."""

MAX_CONNECTIONS = connection_limit()
"""Beyond it the longest idle connections are closed, a sixteenth of the limit at a time: finding them takes a scan."""
_EVICTION_DIVISOR = 16


class UnreadBytes:
    """Counts the bytes of large responses of one server that clients have not read yet."""

    num_bytes = 0


_UNREAD_BYTES = WeakKeyDictionary[ServerState, UnreadBytes]()


class JoinedWrites:
    """A transport that writes the head of a small response together with its body.

    uvicorn writes them one after the other. As this transport buffers nothing, that is two packets and two system
    calls, and wakes the client twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.holds_next = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write, or keep the bytes for the next write."""
        if self.holds_next:
            self.holds_next, self._head = False, self._head + data
        elif self._head:
            data, self._head = self._head + data, b""
            self._transport.write(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is kept: no body follows."""
        self.holds_next = False
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close after what is kept."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Return anything else from the transport itself."""
        return getattr(self._transport, name)


def _is_small(message: "HTTPResponseStartEvent") -> bool:
    """Whether a small body of known length follows, which the application sends at once."""
    for name, value in message.get("headers", ()):  # a loop: a generator is a call for each header
        if name == b"content-length":
            return int(value) <= SMALL_BYTES
    return False


class TimeoutHttpProtocol(HttpToolsProtocol):
    """Closes connections of stalled clients, and sends responses no faster than clients read them.

    The transport pauses the protocol as soon as the kernel does not accept everything at once, so `write_paused` means
    that the client has not read all that was written. An app's last `send` of a large response returns after that: the
    app holds a request's resources, its permit included, until the response has been sent.
    """

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unsent_bytes = 0
    _last_progress_s = 0.0
    _app: "ASGI3Application"
    _unread: UnreadBytes
    _current: RequestResponseCycle | None = None
    _in_head = True
    _in_body = _is_closing_soon = _is_shutting_down = False
    _head_bytes = _first_bytes = _chunk_bytes = _body_bytes = _trailer_bytes = _discarded_bytes = 0
    _body_began_s = _idle_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._writes = JoinedWrites(transport)
        super().connection_made(self._writes)  # type: ignore[arg-type]  # it is the transport but for two methods
        transport.set_write_buffer_limits(high=0)
        _limit_unsent(transport)
        self._unread = _UNREAD_BYTES.setdefault(self.server_state, UnreadBytes())
        self._app = self.app
        self.app = self._serve
        self._idle_since_s = self.loop.time()
        self._start_timer(HEAD_TIMEOUT_S)
        if len(self.connections) > MAX_CONNECTIONS:
            self._close_idle_connections()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._cancel_write_timer()
        current = self._current  # uvicorn notifies the newest request only
        if current is not None and not current.response_complete:
            current.disconnected = True
            current.message_event.set()
        self.pipeline.clear()
        self.app = self._app  # breaks the reference cycle of the protocol
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes here, because the parser buffers an incomplete head in memory."""
        if self._is_closing_soon:
            return
        self._chunk_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._body_bytes, self._trailer_bytes = self._body_bytes + len(data), self._trailer_bytes + len(data)
        super().data_received(data)
        if self._in_body:
            self._start_body_timer()
        elif self._in_head:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
            elif self._timer is None:
                self._start_timer(HEAD_TIMEOUT_S)
        elif self._timer is None and self.timeout_keep_alive_task is None and self._is_idle():
            self._start_timer(HEAD_TIMEOUT_S)  # empty lines before a request cancelled uvicorn's own timeout

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes, self._first_bytes = max(1, self._head_bytes), self._chunk_bytes
        self._cancel_timer()  # `data_received` starts it again, unless the head is complete by then

    def on_headers_complete(self) -> None:
        size_bytes = (
            self._head_bytes + self._first_bytes
        )  # at the most: of the first read, parts may not be of the head
        if size_bytes > MAX_HEAD_BYTES:
            size_bytes = len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if size_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._close_after_responses()
        if self._is_done_reading:
            return
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        self._body_began_s, self._body_bytes, self._trailer_bytes, self._discarded_bytes = self.loop.time(), 0, 0, 0
        super().on_headers_complete()
        if not self.pipeline:
            self._current = self.cycle

    def on_body(self, body: bytes) -> None:
        self._trailer_bytes = 0
        if self._is_done_reading:
            return
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._cancel_timer()
        if not self._is_done_reading:
            super().on_message_complete()

    def shutdown(self) -> None:
        super().shutdown()
        self._is_shutting_down = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent_bytes, self._last_progress_s = self.transport.get_write_buffer_size(), self.loop.time()
        self._start_write_timer()

    def resume_writing(self) -> None:
        self._cancel_write_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._current = self.pipeline[-1][0]
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    def _serve(self, scope: "ASGIScope", receive: "ASGIReceiveCallable", send: "ASGISendCallable") -> Awaitable[None]:
        return self._app(scope, receive, partial(self._send, send))

    async def _send(self, send: "ASGISendCallable", message: "ASGISendEvent") -> None:
        """Send a response in chunks, each after the previous one was sent; a small one in one write."""
        writes = self._writes
        if message["type"] == "http.response.start":
            writes.holds_next = _is_small(message)
            await send(message)
            writes.holds_next = False
            return
        if message["type"] != "http.response.body" or len(message["body"]) <= SMALL_BYTES:
            await send(message)
            writes.flush()
            return
        body, is_last = message["body"], not message.get("more_body", False)
        self._unread.num_bytes += len(body)
        try:
            for start in range(0, len(body), CHUNK_BYTES):
                chunk = body[start : start + CHUNK_BYTES]
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if is_last:
                await self.flow.drain()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._unread.num_bytes -= len(body)

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with the JSON envelope of the API."""
        self._refuse(400, "Malformed HTTP/1.1 request.")

    def _refuse_head(self) -> None:
        self._refuse(431, f"Request head too large (maximum {MAX_HEAD_BYTES} bytes); send fewer or shorter headers.")

    def _refuse(self, status: int, message: str) -> None:
        """Respond without the app, which has not seen the request or waits for the rest of it, and close."""
        if self._is_done_reading:
            return
        if not self._answers_next():
            self._close_after_responses()
            return
        detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code="invalid_value")
        body = msgspec.json.encode(ErrorEnvelope(error=detail))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _answers_next(self) -> bool:
        """Whether the connection's next response is that of the request being read."""
        if self._is_idle():
            return not self._in_body  # else the response was sent before the body
        return self._in_body and not self.pipeline and not self.cycle.response_started

    def _is_idle(self) -> bool:
        """Whether all requests whose head has been read are answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_done_reading(self) -> bool:
        """Whether no more requests are read from this connection."""
        return self._is_closing_soon or self.transport.is_closing()

    def _close_after_responses(self) -> None:
        """Close after the complete requests are answered."""
        self._cancel_timer()
        self._is_closing_soon = True
        if self._in_body and self.pipeline:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._current
        if last is None or last.response_complete:
            self.transport.close()
        else:
            last.keep_alive = False

    def _close_idle_connections(self) -> None:
        """Close idle connections; this one when all others are busy."""
        ours = [one for one in self.connections if isinstance(one, TimeoutHttpProtocol)]
        found = [one for one in ours if not one.transport.is_closing()]
        if len(found) <= MAX_CONNECTIONS:
            return  # the rest is closing already
        idle = [one for one in found if one is not self and one._is_idle()]
        idle.sort(key=lambda one: one._idle_since_s)
        for one in idle[: max(1, MAX_CONNECTIONS // _EVICTION_DIVISOR)]:
            one.transport.abort()
        if not idle:
            self.transport.abort()

    def _start_timer(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, self._on_timeout, seconds)

    def _start_body_timer(self) -> None:
        """Start the body timer: a timeout per chunk, and one for the whole body that grows with the bytes received."""
        if self._trailer_bytes > MAX_HEAD_BYTES:  # since the last byte of the body
            self._refuse_head()
            return
        total_s = BODY_TOTAL_TIMEOUT_S + self._body_bytes / MIN_BODY_BYTES_PER_S
        left_s = self._body_began_s + total_s - self.loop.time()
        self._cancel_timer()
        if left_s < BODY_TIMEOUT_S:
            self._timer = self.loop.call_later(max(0.0, left_s), self._on_timeout, total_s)
        else:
            self._start_timer(BODY_TIMEOUT_S)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_write_timer(self) -> None:
        wait_s = min(WRITE_TIMEOUT_S, MIN_WRITE_TIMEOUT_S) / _CHECKS_PER_TIMEOUT
        self._write_timer = self.loop.call_later(wait_s, self._check_writing)

    def _check_writing(self) -> None:
        """Abort a stalled connection. While the protocol is paused nothing is written, so unsent bytes decrease only
        when the client reads."""
        unsent_bytes, now_s = self.transport.get_write_buffer_size(), self.loop.time()
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes, self._last_progress_s = unsent_bytes, now_s
        is_full = self._unread.num_bytes > MAX_UNREAD_BYTES or len(self.connections) >= MAX_CONNECTIONS
        wait_s = MIN_WRITE_TIMEOUT_S if is_full or self._is_shutting_down else WRITE_TIMEOUT_S
        if now_s - self._last_progress_s < wait_s:
            self._start_write_timer()
            return
        self._write_timer = None
        log.warning("connection.stalled", seconds=wait_s, unsent_bytes=unsent_bytes)
        self.transport.abort()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_timeout(self, seconds: float) -> None:
        self._timer = None
        if self._in_body and self.flow.read_paused:  # this server itself has paused reading
            self._body_began_s = self.loop.time()
            self._start_body_timer()
        elif self._in_body or self._head_bytes:
            self._refuse(
                408, f"Request timeout: the rest of the request did not arrive within {round(seconds, 1):g} s; retry."
            )
        elif not self.transport.is_closing():
            self.transport.close()


def _limit_unsent(transport: asyncio.Transport) -> None:
    """Set TCP_NOTSENT_LOWAT, where the socket and the system support it."""
    connection = transport.get_extra_info("socket")
    families = (socket.AF_INET, socket.AF_INET6)
    if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT") and connection.family in families:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
