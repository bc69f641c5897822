"""The concurrency limiter over real sockets: from a request's head to the last byte of its response, and body bytes."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from router.config.settings import Settings
from router.errors import TooManyRequests
from router.limits.concurrency import Caller, ConcurrencyLimiter
from router.limits.limiter import Limiter
from tests.testkit.servers import EMBED, Limited, bearer, limited, write_keys


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the log: console lines would take more time than the requests."""
    with capture_logs():
        yield


def open_request(url: str, head: str, receive_bytes: int | None = None) -> socket.socket:
    """`receive_bytes`: size of the client's kernel buffer for an unread response."""
    address = urlsplit(url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(5)
    connection.connect((str(address.hostname), int(address.port or 0)))
    connection.sendall(f"POST {EMBED} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
    return connection


def concurrency_of(server: Limited) -> ConcurrencyLimiter:
    limiter: Limiter = server.app.state.limiter
    return limiter.concurrency


def inside(server: Limited) -> int:
    return concurrency_of(server).num_running


def test_a_request_is_running_until_its_answer_is_read(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"max_concurrent": 1}})
    body = json.dumps({"input": ["a"] * 2048}).encode()
    head = f"Authorization: {bearer('web')['authorization']}\r\nConnection: close\r\nContent-Length: {len(body)}"
    with limited(Settings(keys_file=keys)) as server:
        with open_request(server.url, head, receive_bytes=4096) as unread:
            unread.sendall(body)
            while not server.backend.calls:
                time.sleep(0.002)
            refused = [server.embed("web").status_code for _ in range(5)]
            received = sum(iter(lambda: len(unread.recv(2**20)), 0))
        while inside(server):
            time.sleep(0.002)
        admitted = server.embed("web").status_code
        with open_request(server.url, head, receive_bytes=4096) as unread:
            unread.sendall(body)
            while inside(server) < 1:
                time.sleep(0.002)
        while inside(server):
            time.sleep(0.002)

    assert refused == [429] * 5
    assert received > 200_000
    assert admitted == 200


def test_bodies_that_trickle_take_no_place_of_others(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {}, "lab": {}})
    head = f"Authorization: {bearer('web')['authorization']}\r\nContent-Length: 1000\r\n\r\n{{"
    with limited(Settings(keys_file=keys, max_concurrent_requests=2)) as server, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(open_request(server.url, head))
        while concurrency_of(server).incoming_bytes < 8:
            time.sleep(0.002)
        others = [server.embed("lab").status_code for _ in range(3)]
        stack.close()
        while concurrency_of(server).incoming_bytes:
            time.sleep(0.002)

    assert others == [200] * 3
    assert inside(server) == 0


def test_a_body_that_trickles_counts_for_its_own_key(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"max_concurrent": 1}})
    head = f"Authorization: {bearer('web')['authorization']}\r\nContent-Length: 1000\r\n\r\n{{"
    with limited(Settings(keys_file=keys)) as server:
        with open_request(server.url, head):
            while concurrency_of(server).incoming_bytes < 1:
                time.sleep(0.002)
            meanwhile = server.embed("web").status_code
        while concurrency_of(server).incoming_bytes:
            time.sleep(0.002)
        after = server.embed("web").status_code

    assert (meanwhile, after) == (429, 200)


def test_a_body_that_is_there_when_there_is_no_place_is_refused(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {}, "lab": {}})
    body = json.dumps({"input": "a"}).encode()
    head = f"Authorization: {bearer('lab')['authorization']}\r\nContent-Length: {len(body)}"
    with limited(Settings(keys_file=keys, max_concurrent_requests=1)) as server, ThreadPoolExecutor() as threads:
        server.backend.delays_s["cold"] = 0.3
        with open_request(server.url, head) as late:
            late.sendall(body[:1])
            while concurrency_of(server).incoming_bytes < 1:
                time.sleep(0.002)
            running = threads.submit(server.embed, "web", model="cold")
            while not inside(server):
                time.sleep(0.002)
            late.sendall(body[1:])
            answer = late.recv(65536)
        status = running.result().status_code
        while inside(server):
            time.sleep(0.002)

    assert answer.startswith(b"HTTP/1.1 429 ")
    assert status == 200
    assert concurrency_of(server).incoming_bytes == 0


def test_bodies_on_their_way_are_so_many_bytes_of_a_caller_and_of_all() -> None:
    mib = 2**20
    room = ConcurrencyLimiter(10, max_body_bytes=256 * mib)
    web, lab, ops = (Caller(f"key:{name}", "this key") for name in ("web", "lab", "ops"))
    room.receive(web, 512 * mib)
    with pytest.raises(TooManyRequests, match=r"this key is sending 536870913 bytes \(maximum 536870912\)"):
        room.receive(web, 1)
    room.receive(lab, 512 * mib)
    with pytest.raises(TooManyRequests, match=r"receiving 1073741825 bytes \(maximum 1073741824\)"):
        room.receive(ops, 1)
    room.end_body(web, 512 * mib)
    room.receive(ops, 512 * mib)

    assert room.incoming_bytes == 1024 * mib
