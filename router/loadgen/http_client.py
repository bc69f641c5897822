"""Minimal HTTP/1.1 client of the measured APIs: sends pre-encoded requests, and leaves responses undecoded.

A connection carries one request at a time.
"""

import asyncio
import base64
import http.client
import json
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import httptools
import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Route = Literal["embeddings", "rerank", "score"]
"""The routes that can be measured, below `/v1`."""


class Target(Struct, frozen=True):
    """An OpenAI-compatible server and one of its models. `timeout_s`: of a request."""

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    route: Route = "embeddings"

    @property
    def is_tls(self) -> bool:
        """Whether the URL is HTTPS."""
        return urlsplit(self.url).scheme == "https"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or (443 if self.is_tls else 80)

    @property
    def path(self) -> str:
        """Path of the route; the URL may or may not end in `/v1`."""
        return f"{self.base_path}/{self.route}"

    @property
    def base_path(self) -> str:
        """The path of the API, up to `/v1`."""
        return f"{urlsplit(self.url).path.rstrip('/').removesuffix('/v1')}/v1"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key is not None else {}
        return {"Content-Type": "application/json", **key}


class Request(Struct, frozen=True):
    """One encoded request."""

    data: bytes
    num_texts: int


class Response(Struct, frozen=True):
    """One response, not decoded."""

    status: int
    body: bytes


def encode(target: Target, texts: Sequence[str], encoding_format: str = "base64", **fields: object) -> Request:
    """Encode a request; for rerank and score, the first text is the query of the others."""
    query, *documents = texts
    inputs: dict[Route, dict[str, object]] = {
        "embeddings": {"input": list(texts), "encoding_format": encoding_format},
        "rerank": {"query": query, "documents": documents},
        "score": {"text_1": query, "text_2": documents},
    }
    body = msgspec.json.encode({"model": target.model, **inputs[target.route], **fields})
    num_texts = len(texts) if target.route == "embeddings" else len(documents)
    host = urlsplit(target.url).netloc  # as in the URL: without the default port
    headers = {"Host": host, **target.headers, "Content-Length": str(len(body))}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return Request("\r\n".join(lines).encode() + body, num_texts)


def vectors(target: Target, texts: Sequence[str], encoding_format: str = "base64") -> NDArray[np.float32]:
    """Send one request, check and decode the response: float32 `[n, D]`.

    Raises:
        OSError: the server is unreachable, or its response is invalid.
    """
    body = msgspec.json.encode({"model": target.model, "input": list(texts), "encoding_format": encoding_format})
    items = sorted(_request_json(target, "POST", target.path, body)["data"], key=lambda item: item["index"])
    if len(items) != len(texts):
        raise OSError(f"{target.url} answered {len(items)} vectors for {len(texts)} texts")
    return np.stack([_decode(item["embedding"]) for item in items])


def scores(target: Target, query: str, documents: Sequence[str]) -> list[float]:
    """Send one rerank request; return the scores in the order of the documents.

    Raises:
        OSError: the server is unreachable, or its response is invalid.
    """
    body = msgspec.json.encode({"model": target.model, "query": query, "documents": list(documents)})
    try:
        results = _request_json(target, "POST", target.path, body)["results"]
        found = {result["index"]: float(result["relevance_score"]) for result in results}
        return [found[index] for index in range(len(documents))]
    except (KeyError, TypeError, ValueError):
        raise OSError(f"{target.url} did not answer one score for each of {len(documents)} documents") from None


def models(target: Target) -> list[str]:
    """List the model ids of the server.

    Raises:
        PermissionError: it wants another key.
        OSError: the server is unreachable, or its response is invalid.
    """
    response = _request_json(target, "GET", f"{target.base_path}/models")
    try:
        return [str(model["id"]) for model in response["data"]]
    except (KeyError, TypeError):
        raise OSError(f"{target.url} does not list its models") from None


def _request_json(target: Target, method: str, path: str, body: bytes | None = None) -> Any:
    """Send one request on a new connection; returns the JSON of the response."""
    kind = http.client.HTTPSConnection if target.is_tls else http.client.HTTPConnection
    connection = kind(*target.address, timeout=target.timeout_s)
    try:
        connection.request(method, path, body, target.headers)
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            kind_of = PermissionError if response.status in (401, 403) else OSError
            raise kind_of(f"{target.url} answered {response.status}: {refusal(content)[1]}")
        return json.loads(content)
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{target.url} sent an unreadable response: {error}") from None
    finally:
        connection.close()


def refusal(body: bytes) -> tuple[str, str]:
    """Return code and message of an error response; without OpenAI's envelope, the start of its body."""
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
    """A keep-alive connection with at most one request in flight."""

    def __init__(self) -> None:
        self.is_open = False
        self._pending: asyncio.Future[Response] | None = None
        self._transport: Any = None
        self._reset()

    @classmethod
    async def open(cls, target: Target) -> "Connection":
        """Connect.

        Raises:
            OSError: nothing listens there.
        """
        host, port = target.address
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port, ssl=target.is_tls or None)
        return connection

    async def ask(self, request: Request) -> Response:
        """Send a request and wait for the whole response.

        Raises:
            ConnectionError: the server closed the connection, or the response is not HTTP.
        """
        if not self.is_open:
            raise ConnectionResetError("the connection is closed")
        self._pending = asyncio.get_running_loop().create_future()
        self._transport.write(request.data)
        return await self._pending

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        self._transport.close()

    # ---- callbacks of the transport ----

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
        if self._in_response and not self._has_length and exc is None:
            self._finish_response()
        self._fail("the server closed the connection")

    # ---- callbacks of the parser ----

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._in_response = self._parser.get_status_code() >= 200  # 1xx are informational

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._in_response:
            self._finish_response()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._in_response = False
        self._has_length = False

    def _finish_response(self) -> None:
        response = Response(self._parser.get_status_code(), b"".join(self._parts))
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._reset()
        if self._pending is not None and not self._pending.done():
            self._pending.set_result(response)

    def _fail(self, reason: str) -> None:
        if self._pending is not None and not self._pending.done():
            self._pending.set_exception(ConnectionResetError(reason))
