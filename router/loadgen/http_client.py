"""The embeddings API as bytes on a socket: requests encoded beforehand, answers left as they come.

One connection carries one request at a time. Speaks HTTP/1.1 and no other, and knows no particular server.
"""

import asyncio
import base64
import http.client
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray


class Target(Struct, frozen=True):
    """An OpenAI-compatible server and one of its models. `timeout_s`: how long an answer may take."""

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0

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


def encode(target: Target, texts: Sequence[str], encoding_format: str = "base64", **fields: object) -> Request:
    """`POST /v1/embeddings` as bytes."""
    body = msgspec.json.encode(
        {"model": target.model, "input": list(texts), "encoding_format": encoding_format, **fields}
    )
    host = urlsplit(target.url).netloc  # as it stands there: without the port where it is the usual one
    headers = {"Host": host, **target.headers, "Content-Length": str(len(body))}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return Request("\r\n".join(lines).encode() + body, len(texts))


def vectors(target: Target, texts: Sequence[str], encoding_format: str = "base64") -> NDArray[np.float32]:
    """One request, checked and decoded: `[n, D]`.

    Raises:
        OSError: the server cannot be reached, or its answer is not one.
    """
    body = msgspec.json.encode({"model": target.model, "input": list(texts), "encoding_format": encoding_format})
    items = sorted(_exchange(target, "POST", target.path, body)["data"], key=lambda item: item["index"])
    if len(items) != len(texts):
        raise OSError(f"{target.url} answered {len(items)} vectors for {len(texts)} texts")
    return np.stack([_decode(item["embedding"]) for item in items])


def models(target: Target) -> list[str]:
    """What the server says it serves.

    Raises:
        OSError: it cannot be reached, or does not say.
    """
    answer = _exchange(target, "GET", target.path.replace("/embeddings", "/models"))
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        raise OSError(f"{target.url} does not say which models it serves") from None


def _exchange(target: Target, method: str, path: str, body: bytes | None = None) -> Any:
    """One request on a connection of its own; the JSON of its answer."""
    kind = http.client.HTTPSConnection if target.is_tls else http.client.HTTPConnection
    connection = kind(*target.address, timeout=target.timeout_s)
    try:
        connection.request(method, path, body, target.headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise OSError(f"{target.url} answered {answer.status}: {refusal(content)[1]}")
        return json.loads(content)
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{target.url} answered nothing that can be read: {error}") from None
    finally:
        connection.close()


def refusal(body: bytes) -> tuple[str, str]:
    """Code and message of an answer that is a failure; of one that is not OpenAI's, its first words."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or ""), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", " ".join(body[:300].decode(errors="replace").split())


def _decode(embedding: str | list[float]) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


class Connection(asyncio.Protocol):
    """One kept-alive connection with one request under way at most."""

    def __init__(self) -> None:
        self.is_open = False
        self._waiting: asyncio.Future[Answer] | None = None
        self._transport: Any = None
        self._begin()

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
            ConnectionError: the server closed the connection, or answered something that is not HTTP.
        """
        if not self.is_open:
            raise ConnectionResetError("the connection is closed")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request.data)
        return await self._waiting

    def close(self) -> None:
        """Hang up."""
        self.is_open = False
        self._transport.close()

    # ---- what the transport says ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server does not speak HTTP/1.1: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._is_answering and not self._has_length and exc is None:
            self._settle()
        self._fail("the server closed the connection")

    # ---- what the parser says ----

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._is_answering = self._parser.get_status_code() >= 200  # those below are notes before the answer

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._is_answering:
            self._settle()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._is_answering = False
        self._has_length = False

    def _settle(self) -> None:
        answer = Answer(self._parser.get_status_code(), b"".join(self._parts))
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._begin()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def _fail(self, reason: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError(reason))
