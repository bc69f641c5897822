"""Serves raw bytes: each request is answered with bytes that a test chooses, in pieces if needed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from router.loadgen.http_client import Target

Handle = Callable[[asyncio.StreamWriter], Awaitable[None]]

OK = b'{"data":[{"index":0,"embedding":[1.0,0.0]}],"usage":{"prompt_tokens":3}}'


def response(body: bytes = OK, status: str = "200 OK", *headers: str) -> bytes:
    """Return a response with its length."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""])
    return head.encode() + body


class Wire:
    """A server of raw bytes. `num_connections`: opened so far; `num_requests`: read so far."""

    def __init__(self, handle: Handle) -> None:
        self.num_connections = self.num_requests = 0
        self._handle = handle

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.partition(b":")[2]))
                self.num_requests += 1
                await self._handle(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def wire(handle: Handle, *, timeout_s: float = 10.0) -> AsyncIterator[tuple[Wire, Target]]:
    """Serve on this event loop until the block ends."""
    served = Wire(handle)
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield served, Target(f"http://{host}:{port}/v1", "m", timeout_s=timeout_s)
    finally:
        server.close()


def respond_with(*pieces: bytes, then_closes: bool = False) -> Handle:
    """Answer each request with these pieces, one write each."""

    async def handle(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if then_closes:
            writer.close()

    return handle
