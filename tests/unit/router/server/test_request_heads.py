"""Limits of request heads and trailers: of their size, and of the time that they take."""

from collections.abc import Callable

import pytest

from router.server.connection import HEAD_TIMEOUT_S, MAX_HEAD_BYTES
from tests.testkit.http_connections import FakeApp, FakeConnection, settled

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Connect = Callable[..., FakeConnection]


@pytest.mark.parametrize("before", [b"", GET, GET + GET], ids=["first", "second", "sent ahead"])
async def test_a_head_that_stops_halfway_has_no_more_time_for_what_came(connect: Connect, before: bytes) -> None:
    client = connect(FakeApp(10))
    await client.send(before + GET[:9])
    await client.loop.advance(HEAD_TIMEOUT_S - 1)
    await client.send(GET[9:11])
    in_time = client.transport.is_lost
    await client.loop.advance(1)

    assert (in_time, client.transport.is_lost) == (False, True)


async def test_a_request_that_comes_whole_sets_no_timer(connect: Connect) -> None:
    client = connect(FakeApp(10))
    await client.send(GET)
    num_timers = len(client.loop._timers)
    client.protocol._unset_keepalive_if_required()
    await client.send(GET)

    assert len(client.loop._timers) == num_timers + 1  # uvicorn's, until the next request


async def test_a_large_head_behind_another_request_is_refused(connect: Connect) -> None:
    app = FakeApp(10)
    client = connect(app)
    await client.send(GET + b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n")

    assert app.num_begun == 1
    assert client.transport.is_lost


@pytest.mark.parametrize("before", [b"", GET])
async def test_a_large_head_in_two_parts_is_refused_behind_any_request(connect: Connect, before: bytes) -> None:
    app = FakeApp(10)
    client = connect(app)
    if before:
        await client.send(before)
    await client.send(b"GET /2 HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 6))
    await client.send(b"z: y\r\n" * 10 + b"\r\n")

    assert app.num_begun == len(before) // len(GET)
    assert b"431 Request Header Fields Too Large" in client.transport.sent


async def test_a_next_request_that_stops_in_its_first_read_is_told_so(connect: Connect) -> None:
    client = connect(FakeApp(10))
    await client.send(GET)
    await client.send(GET[:-5])
    await client.loop.advance(HEAD_TIMEOUT_S)

    assert b"408 Request Timeout" in client.transport.sent


async def test_half_a_request_sent_ahead_does_not_cut_the_answer_before_it(connect: Connect) -> None:
    app = FakeApp(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET + GET[:-5])
    await client.loop.advance(2 * HEAD_TIMEOUT_S)
    app.gate.set()
    await settled()

    assert client.transport.sent.endswith(b"x" * 10)
    assert client.transport.is_lost


CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize("endless", [b"0\r\nx: y\r\n", b"0\r\nx: ", b"3;a="], ids=["trailers", "trailer", "extension"])
async def test_what_stands_in_a_body_and_is_not_of_it_has_a_limit(connect: Connect, endless: bytes) -> None:
    app = FakeApp(10)
    client = connect(app)
    await client.send(CHUNKED + endless)
    for _ in range(MAX_HEAD_BYTES // 6):
        await client.send(b"x: y\r\n" if endless.endswith(b"\n") else b"yyyyyy")
    in_time = client.transport.is_lost
    for _ in range(3):
        await client.send(b"x: y\r\n" if endless.endswith(b"\n") else b"yyyyyy")

    assert (in_time, client.transport.is_lost, app.num_inside) == (False, True, 0)
    assert b"431 Request Header Fields Too Large" in client.transport.sent


async def test_a_long_body_of_short_chunks_with_a_trailer_is_read(connect: Connect) -> None:
    client = connect(FakeApp(10))
    await client.send(CHUNKED)
    for _ in range(MAX_HEAD_BYTES // 4):
        await client.send(b"1\r\n")
        await client.send(b"a\r\n")
    await client.send(b"0\r\nx: y\r\n\r\n")

    assert client.transport.sent.endswith(b"x" * 10)


async def test_nothing_is_kept_of_what_comes_behind_a_refused_head(connect: Connect) -> None:
    app = FakeApp(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET + b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 6))
    for _ in range(4):
        await client.send(b"x: y\r\n" * (MAX_HEAD_BYTES // 6))
    num_headers = len(client.protocol.headers)
    await client.send(b"x: y\r\n" * 99)
    app.gate.set()
    await settled()

    assert len(client.protocol.headers) == num_headers
    assert client.transport.sent.endswith(b"x" * 10)
    assert client.transport.is_lost
