"""The embeddings API as bytes on a socket: requests encoded beforehand, answers left as they come.

One connection carries one request at a time. Knows HTTP/1.1 as far as answers of JSON need it, and no server.
"""

import asyncio
import base64
import http.client
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

_END_OF_HEAD = b"\r\n\r\n"
_END_OF_CHUNKS = b"0\r\n\r\n"
_LENGTH = b"\r\ncontent-length:"


class Target(Struct, frozen=True):
    """An OpenAI-compatible server and one of its models."""

    url: str
    model: str
    api_key: str | None = None

    @property
    def is_tls(self) -> bool:
        """Whether it is spoken to in HTTPS."""
        return urlsplit(self.url).scheme == "https"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or (443 if self.is_tls else 80)

    @property
    def path(self) -> str:
        """Of embeddings; the URL may end in `/v1` or before it."""
        return f"{urlsplit(self.url).path.rstrip('/').removesuffix('/v1')}/v1/embeddings"

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key is not None else {}
        return {"Content-Type": "application/json", **key}


class Request(Struct, frozen=True):
    """One request, ready to be written."""

    data: bytes
    num_texts: int


class Answer(Struct, frozen=True):
    """One answer, not decoded."""

    status: int
    body: bytes
    headers: bytes


def encode(target: Target, texts: Sequence[str], encoding_format: str = "base64", **fields: object) -> Request:
    """`POST /v1/embeddings` as bytes."""
    body = msgspec.json.encode(
        {"model": target.model, "input": list(texts), "encoding_format": encoding_format, **fields}
    )
    host, port = target.address
    headers = {"Host": f"{host}:{port}", **target.headers, "Content-Length": str(len(body))}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return Request("\r\n".join(lines).encode() + body, len(texts))


def vectors(target: Target, texts: Sequence[str], encoding_format: str = "base64") -> NDArray[np.float32]:
    """One request, checked and decoded: `[n, D]`.

    Raises:
        OSError: the server cannot be reached, or its answer is not one.
    """
    kind = http.client.HTTPSConnection if target.is_tls else http.client.HTTPConnection
    connection = kind(*target.address, timeout=600)
    try:
        body = msgspec.json.encode({"model": target.model, "input": list(texts), "encoding_format": encoding_format})
        connection.request("POST", target.path, body, target.headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"{target.url} answered {answer.status}: {content[:500].decode(errors='replace')}")
    items = sorted(json.loads(content)["data"], key=lambda item: item["index"])
    if len(items) != len(texts):
        raise OSError(f"{target.url} answered {len(items)} vectors for {len(texts)} texts")
    return np.stack([_decode(item["embedding"]) for item in items])


def _decode(embedding: str | list[float]) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


class Connection(asyncio.Protocol):
    """One kept-alive connection with one request under way at most."""

    def __init__(self) -> None:
        self.is_open = False
        self._buffer = bytearray()
        self._body_at = 0
        self._body_bytes: int | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._transport: Any = None

    @classmethod
    async def open(cls, target: Target) -> "Connection":
        """Connect.

        Raises:
            OSError: nobody listens there.
        """
        host, port = target.address
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port, ssl=target.is_tls or None)
        return connection

    async def ask(self, request: Request) -> Answer:
        """Send and wait for the whole answer.

        Raises:
            ConnectionError: the server closed the connection.
        """
        if not self.is_open:
            raise ConnectionResetError("the connection is closed")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request.data)
        return await self._waiting

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._body_at and not self._read_head():
            return
        if self._body_bytes is None:
            is_whole = self._buffer.endswith(_END_OF_CHUNKS)
        else:
            is_whole = len(self._buffer) >= self._body_at + self._body_bytes
        if is_whole:
            self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError("the server closed the connection"))

    def _read_head(self) -> bool:
        end = self._buffer.find(_END_OF_HEAD)
        if end < 0:
            return False
        self._body_at = end + len(_END_OF_HEAD)
        head = bytes(self._buffer[:end]).lower()
        at = head.find(_LENGTH)
        self._body_bytes = int(head[at + len(_LENGTH) :].split(b"\r\n", 1)[0]) if at >= 0 else None
        if b"\r\nconnection: close" in head:
            self.is_open = False
        return True

    def _settle(self) -> None:
        head, body = bytes(self._buffer[: self._body_at]), bytes(self._buffer[self._body_at :])
        self._buffer.clear()
        self._body_at = 0
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(int(head[9:12]), body, head))
