"""Stalled clients, on raw sockets: their responses, and that their connections are closed."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn
from litestar import Litestar, get
from structlog.testing import capture_logs

from router.app import create_app
from router.config.settings import Settings
from router.server import connection
from router.server.connection import TimeoutHttpProtocol
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY, QuietServer

BODY = b'{"input": "a", "model": "mini"}'
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    % len(BODY)
)


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeouts."""
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.3)


@contextmanager
def serving(app: Litestar) -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=TimeoutHttpProtocol, loop="asyncio", lifespan="on", ws="none",
        log_config=None,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = QuietServer(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.002)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with serving(create_app(Settings(), REGISTRY, ScriptedBackend("mini"))) as address:
        yield address


def answer(client: socket.socket) -> bytes:
    """Read everything until the server closes."""
    client.settimeout(5)
    received = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    return received


def told(received: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = received.partition(b"\r\n\r\n")
    error: dict[str, str] = json.loads(body)["error"]
    return int(head.split()[1]), error


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        began_s = time.monotonic()
        received = answer(client)

    assert received == b""
    assert time.monotonic() - began_s == pytest.approx(0.3, abs=0.25)


@pytest.mark.parametrize("sent", [b"POS", b"POST /v1/embeddings HTTP/1.1\r\nhost", HEAD, HEAD + b"\r\n" + BODY[:5]])
def test_a_request_that_stops_halfway_gets_an_error(address: tuple[str, int], sent: bytes) -> None:
    with capture_logs() as lines, socket.create_connection(address) as client:
        client.sendall(sent)
        status, error = told(answer(client))
        time.sleep(0.05)

    assert (status, error["type"]) == (408, "invalid_request_error")
    assert "0.3 s" in error["message"]
    assert not [line for line in lines if line["log_level"] in ("error", "critical")]


def test_a_body_in_many_slow_pieces_is_read(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(HEAD + b"connection: close\r\n\r\n")
        for byte in BODY[:6]:
            client.sendall(bytes([byte]))
            time.sleep(0.1)
        client.sendall(BODY[6:])
        received = answer(client)

    assert received.startswith(b"HTTP/1.1 200")


def test_headers_in_many_slow_pieces_are_not(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        for number in range(9):
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"x-%d: y\r\n" % number)
            time.sleep(0.05)
        status, _ = told(answer(client))

    assert status == 408


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 80_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: " + b"y" * 400_000,
        b"GET /" + b"y" * 80_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    ],
    ids=["a long header", "a header without end", "a long address", "many headers"],
)
def test_a_head_that_is_too_large_is_refused(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(sent)
        received = answer(client)

    if received:  # a client that is still sending may lose the answer to a reset
        status, error = told(received)
        assert status == 431
        assert "65536 bytes" in error["message"]


def test_invalid_http_gets_an_error_in_the_envelope(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"\x16\x03\x01 TLS on the wrong port\r\n\r\n")
        status, error = told(answer(client))

    assert (status, error["code"]) == (400, "invalid_value")
    assert "HTTP/1.1" in error["message"]


def test_a_connection_may_be_idle_between_requests(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            client.settimeout(5)
            received = b""
            while not received.endswith(b"}"):  # head and body may come one by one
                received += client.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


def test_a_request_that_takes_long_to_answer_is_not_cut_off() -> None:
    backend = ScriptedBackend("mini")
    backend.delays_s["mini"] = 0.8
    with (
        serving(create_app(Settings(), REGISTRY, backend)) as address,
        socket.create_connection(address) as client,
    ):
        client.sendall(HEAD + b"connection: close\r\n\r\n" + BODY)
        received = answer(client)

    assert received.startswith(b"HTTP/1.1 200")


def test_requests_sent_ahead_are_answered_in_order(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        ahead = HEAD + b"\r\n" + BODY
        client.sendall(ahead + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = answer(client)

    assert received.count(b"HTTP/1.1 200") == 2
    assert received.index(b'"embedding"') < received.index(b'"ok"')


def test_a_client_that_does_not_read_its_answer_is_let_go_of() -> None:
    @get("/large")
    async def large() -> bytes:
        return b"x" * 50_000_000

    with serving(Litestar([large], logging_config=None)) as address:
        client = socket.create_connection(address)
        client.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.9)
        received = answer(client)
        client.close()

    assert 0 < len(received) < 50_000_000
