"""One connection: uvicorn's protocol, and beside it the patience and the room that a client gets.

A client that sends its request a byte an hour, or never reads its answer, holds a connection and memory for nothing.
uvicorn limits neither, nor the size of what comes before the body; and it answers what is no HTTP in plain text.
"""

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.schema import ErrorDetail, ErrorEnvelope

HEAD_S = 20.0
"""From the first byte of a request, or from the connection's begin, to the end of the headers."""
BODY_S = 30.0
"""Between two pieces of a body."""
WRITE_S = 60.0
"""How long a client may read nothing of an answer that waits for it."""
MAX_HEAD_BYTES = 64 * 1024
"""Address and headers of one request."""


class PatientProtocol(HttpToolsProtocol):
    """Closes connections whose client does not get on."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _in_body = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What the parser has not understood yet lies in its memory, so the size is looked at here."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_body:
            self._wait(BODY_S)
        elif self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._wait(HEAD_S)

    def on_headers_complete(self) -> None:
        size_bytes = len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if size_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        if self.transport.is_closing():
            return
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop()
        if not self.transport.is_closing():
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What cannot be read is told so in the contract's envelope, too."""
        self._refuse(400, "This is not a request in HTTP/1.1.")

    def _refuse_head(self) -> None:
        self._refuse(431, f"Address and headers have more than {MAX_HEAD_BYTES} bytes: send fewer or shorter ones.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer past the app, which has not seen the request or waits for the rest of it; and close."""
        if self.transport.is_closing():
            return
        detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code="invalid_value")
        body = msgspec.json.encode(ErrorEnvelope(error=detail))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        if self._is_next():
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _is_next(self) -> bool:
        """Whether the next answer of the connection is that of the request which is being read."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        return self._in_body and not self.pipeline and not self.cycle.response_started

    def _wait(self, seconds: float) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self._give_up, seconds)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _give_up(self, seconds: float) -> None:
        if self._in_body or self._head_bytes:
            self._refuse(408, f"The rest of the request did not come within {seconds:g} s: send it again.")
        elif not self.transport.is_closing():
            self.transport.close()
