"""The concurrency limiter over real sockets: from a request's head to the last byte of its response, and body bytes."""

import asyncio
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
    settings = Settings(keys_file=keys, max_concurrent_requests=1, concurrency_timeout_s=0)
    with limited(settings) as server, ThreadPoolExecutor() as threads:
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


WEB, LAB = Caller("key:web", "this key"), Caller("key:lab", "this key")


async def queued(limiter: ConcurrencyLimiter, *callers: Caller) -> list[asyncio.Task[None]]:
    """The requests of these callers, which wait in this order."""
    tasks = [asyncio.create_task(limiter.acquire(caller)) for caller in callers]
    await asyncio.sleep(0)
    return tasks


async def finished(tasks: list[asyncio.Task[None]]) -> list[bool]:
    for _ in range(3):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_places_go_to_the_waiting_callers_in_turn() -> None:
    limiter = ConcurrencyLimiter(1, max_wait_s=60)
    assert limiter.try_acquire()
    tasks = await queued(limiter, WEB, WEB, WEB, LAB)
    order = []
    for _ in range(4):
        limiter.release()
        order.append(await finished(tasks))
    limiter.release()

    assert order == [
        [True, False, False, False],
        [True, False, False, True],
        [True, True, False, True],
        [True, True, True, True],
    ]
    assert (limiter.num_running, limiter.num_waiting) == (0, 0)


async def test_a_request_that_is_cancelled_while_it_waits_leaves_its_place_to_the_next() -> None:
    limiter = ConcurrencyLimiter(1, max_wait_s=60)
    limiter.try_acquire()
    left, stays = await queued(limiter, WEB, LAB)
    left.cancel()
    await asyncio.sleep(0)
    limiter.release()

    assert await finished([stays]) == [True]
    assert (limiter.num_running, limiter.num_waiting) == (1, 0)


async def test_a_place_that_comes_with_the_cancellation_is_given_on() -> None:
    limiter = ConcurrencyLimiter(1, max_wait_s=60)
    limiter.try_acquire()
    left, stays = await queued(limiter, WEB, LAB)
    limiter.release()
    left.cancel()

    assert await finished([left, stays]) == [True, True]
    assert (left.cancelled(), limiter.num_running) == (True, 1)


async def test_a_place_that_comes_right_after_the_cancellation_goes_to_the_next() -> None:
    """The request is cancelled, and has not run since: it is still in the line."""
    limiter = ConcurrencyLimiter(1, max_wait_s=60)
    limiter.try_acquire()
    left, again, stays = await queued(limiter, WEB, WEB, LAB)
    left.cancel()
    limiter.release()

    assert await finished([left, stays]) == [True, True]
    assert (left.cancelled(), limiter.num_running, limiter.num_waiting) == (True, 1, 1)
    again.cancel()
    limiter.release()
    assert await finished([again]) == [True]
    assert (limiter.num_running, limiter.num_waiting) == (0, 0)


async def test_a_request_that_waits_too_long_is_refused() -> None:
    limiter = ConcurrencyLimiter(1, max_wait_s=0.001)
    limiter.try_acquire()

    with pytest.raises(
        TooManyRequests, match=r"1 requests running \(MAX_CONCURRENT_REQUESTS=1\), none ended within 0\.001 s; retry"
    ):
        await limiter.acquire(WEB)
    assert (limiter.num_running, limiter.num_waiting) == (1, 0)


async def test_a_caller_may_have_half_of_the_places_to_wait_in() -> None:
    limiter = ConcurrencyLimiter(1, max_wait_s=60)
    limiter.try_acquire()
    tasks = await queued(limiter, *[WEB] * 512)

    with pytest.raises(TooManyRequests, match="512 waiting"):
        limiter.admit(WEB)
    limiter.admit(LAB)
    for task in tasks:
        task.cancel()
    await finished(tasks)
    assert (limiter.num_running, limiter.num_waiting) == (1, 0)


def request_of(server: Limited, key_id: str, model: str) -> socket.socket:
    """An open request, its body sent."""
    body = json.dumps({"input": "a", "model": model}).encode()
    head = f"Authorization: {bearer(key_id)['authorization']}\r\nContent-Length: {len(body)}"
    connection = open_request(server.url, head)
    connection.sendall(body)
    return connection


def test_a_client_that_leaves_while_it_waits_costs_no_place(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {}, "lab": {}})
    settings = Settings(keys_file=keys, max_concurrent_requests=1)
    with limited(settings) as server, ThreadPoolExecutor() as threads:
        server.backend.gates["cold"] = asyncio.Event()
        with request_of(server, "web", "cold"):
            while not inside(server):
                time.sleep(0.002)
            with request_of(server, "lab", "mini"):
                while not concurrency_of(server).num_waiting:
                    time.sleep(0.002)
            while concurrency_of(server).num_waiting:
                time.sleep(0.002)
            waits = threads.submit(server.embed, "lab")
            while not concurrency_of(server).num_waiting:
                time.sleep(0.002)
            assert concurrency_of(server).incoming_bytes > 0, "a body that waits counts as incoming"
        status = waits.result().status_code
        while inside(server):
            time.sleep(0.002)

    assert status == 200
    assert [call.model_id for call in server.backend.calls] == ["cold", "mini"]
    assert concurrency_of(server).incoming_bytes == 0


async def test_a_flex_request_hands_its_place_to_one_that_waits_and_takes_one_of_its_own() -> None:
    concurrency, caller = ConcurrencyLimiter(1, max_wait_s=10.0), Caller("a", "a")
    assert concurrency.try_acquire()
    waiting = asyncio.create_task(concurrency.acquire(caller))
    await asyncio.sleep(0)

    concurrency.acquire_flex()
    await waiting
    running = concurrency.num_running, concurrency.num_flex
    with pytest.raises(TooManyRequests, match=r"1 flex requests running \(MAX_CONCURRENT_REQUESTS=1\)"):
        concurrency.acquire_flex()
    concurrency.release_flex()
    concurrency.release()

    assert running == (1, 1)
    assert (concurrency.num_running, concurrency.num_flex) == (0, 0)


def test_flex_requests_that_run_keep_no_other_request_out(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {}})
    settings = Settings(keys_file=keys, max_concurrent_requests=1, concurrency_timeout_s=0)
    with limited(settings) as server, ThreadPoolExecutor() as threads:
        server.backend.delays_s["cold"] = 0.5
        flex = threads.submit(server.embed, "web", model="cold", service_tier="flex")
        while not concurrency_of(server).num_flex:
            time.sleep(0.002)
        other = server.embed("web").status_code
        was_running = concurrency_of(server).num_flex
        status = flex.result().status_code
        while concurrency_of(server).num_flex:
            time.sleep(0.002)

    assert (other, was_running, status, inside(server)) == (200, 1, 200, 0)
