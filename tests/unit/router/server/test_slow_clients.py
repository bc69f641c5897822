"""Clients that read or send slowly, or not at all: `TimeoutHttpProtocol` on a fake transport and clock."""

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs
from uvicorn.server import ServerState

from router.server import connection
from router.server.connection import (
    BODY_TIMEOUT_S,
    BODY_TOTAL_TIMEOUT_S,
    CHUNK_BYTES,
    HEAD_TIMEOUT_S,
    MIN_WRITE_TIMEOUT_S,
    WRITE_TIMEOUT_S,
)
from tests.testkit.http_connections import LARGE, FakeApp, FakeConnection, settled

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CREDITS = 1024
"""What a client gets besides the body: the head."""


def post(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length


Connect = Callable[..., FakeConnection]


async def test_a_request_is_not_over_before_its_answer_has_left(connect: Connect) -> None:
    app = FakeApp()
    client = connect(app, room=0)
    await client.send(GET)
    inside = []
    while len(client.transport.sent) < LARGE:
        inside.append(app.num_inside)
        await client.read(100_000)
    await client.read(CREDITS)

    assert set(inside) == {1}
    assert app.num_inside == 0
    assert client.transport.most_waiting <= CHUNK_BYTES
    assert client.transport.sent.endswith(b"x" * LARGE)


async def test_an_answer_that_is_read_at_once_is_sent_without_waiting(connect: Connect) -> None:
    app = FakeApp(20_000)
    client = connect(app)
    await client.send(GET + GET)

    assert (app.num_begun, app.num_inside) == (2, 0)
    assert client.transport.num_writes == 4  # heads and bodies
    assert client.transport.sent.count(b"x" * 20_000) == 2


@pytest.mark.parametrize("end", ["the client leaves", "the server cancels"])
async def test_a_request_whose_answer_is_not_read_ends_with_its_connection(connect: Connect, end: str) -> None:
    app = FakeApp()
    client = connect(app, room=0)
    await client.send(GET)
    inside = app.num_inside
    if end == "the client leaves":
        client.transport.lose()
    else:
        for task in client.state.tasks:
            task.cancel()
    await settled()

    assert (inside, app.num_inside, client.state.tasks) == (1, 0, set())


async def test_a_request_sent_ahead_begins_when_the_answer_before_it_has_left(connect: Connect) -> None:
    app = FakeApp()
    client = connect(app, room=0)
    await client.send(GET + GET)
    first = app.num_begun
    await client.read(LARGE + CREDITS)

    assert (first, app.num_begun, app.num_inside) == (1, 2, 1)


async def test_the_first_of_two_requests_gets_the_disconnect_of_its_client(connect: Connect) -> None:
    app = FakeApp()
    app.gate.clear()
    client = connect(app)
    await client.send(GET + GET)
    running = client.protocol._current
    client.transport.lose()

    assert running is not None
    assert (await running.receive())["type"] == "http.disconnect"


async def test_requests_sent_ahead_are_so_many_at_most(connect: Connect) -> None:
    app = FakeApp(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET * 4000)
    num_kept = len(client.protocol.pipeline)
    app.gate.set()
    await settled()
    for _ in range(num_kept):
        await settled()

    assert num_kept == connection.MAX_PIPELINED
    assert app.num_begun == num_kept + 1
    assert client.transport.sent.count(b"x" * 10) == num_kept + 1
    assert client.transport.is_lost


async def test_a_client_that_reads_slowly_without_a_pause_gets_the_whole_answer(connect: Connect) -> None:
    app = FakeApp(20_000_000)
    client = connect(app, room=300_000)
    await client.send(GET)
    while not client.transport.is_closing() and app.num_inside:
        await client.loop.advance(1.0)
        await client.read(90_000)

    assert client.loop.now_s > 3 * WRITE_TIMEOUT_S
    assert not client.transport.was_aborted
    assert client.transport.sent.endswith(b"x" * 20_000_000)


async def test_less_than_a_piece_a_minute_is_progress_too(connect: Connect) -> None:
    client = connect(FakeApp(), room=0)
    await client.send(GET)
    for _ in range(20):
        await client.loop.advance(WRITE_TIMEOUT_S / 2)
        await client.read(1000)

    assert not client.transport.was_aborted


async def test_a_client_that_stops_reading_is_disconnected(connect: Connect) -> None:
    app = FakeApp()
    client = connect(app, room=1_000_000)
    with capture_logs() as lines:
        await client.send(GET)
        await client.loop.advance(0.9 * WRITE_TIMEOUT_S)
        await client.read(1)
        await client.loop.advance(0.9 * WRITE_TIMEOUT_S)
        was_aborted = client.transport.was_aborted
        await client.loop.advance(0.4 * WRITE_TIMEOUT_S)

    assert (was_aborted, client.transport.was_aborted) == (False, True)
    assert app.num_inside == 0
    assert [line["event"] for line in lines] == ["connection.stalled"]


@pytest.mark.parametrize("head", [GET, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"])
async def test_a_client_that_does_not_read_a_short_answer_is_disconnected(connect: Connect, head: bytes) -> None:
    """Closing a transport waits until its buffer is sent."""
    client = connect(FakeApp(10), room=20)
    await client.send(head)
    await client.loop.advance(1.3 * WRITE_TIMEOUT_S)

    assert client.transport.is_lost


async def test_a_shutdown_waits_less_for_clients_that_do_not_read(connect: Connect) -> None:
    client = connect(FakeApp(), room=0)
    await client.send(GET)
    client.protocol.shutdown()
    await client.loop.advance(0.9 * MIN_WRITE_TIMEOUT_S)
    early = client.transport.was_aborted
    await client.loop.advance(0.5 * MIN_WRITE_TIMEOUT_S)

    assert (early, client.transport.was_aborted) == (False, True)


async def test_clients_that_do_not_read_are_disconnected_first_when_much_is_unread(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNREAD_BYTES", 2 * LARGE)
    state = ServerState()
    reading, idle, few = (connect(FakeApp(), room=0, state=state) for _ in range(3))
    for client in (reading, idle):
        await client.send(GET)
        await client.read(CREDITS)
    await idle.loop.advance(2 * MIN_WRITE_TIMEOUT_S)
    while_few_are = idle.transport.was_aborted
    await few.send(GET)
    await few.read(CREDITS)
    for _ in range(int(MIN_WRITE_TIMEOUT_S) + 2):
        await reading.read(1000)
        await reading.loop.advance(1)
        await idle.loop.advance(1)
    await few.loop.advance(2 * MIN_WRITE_TIMEOUT_S)

    assert (while_few_are, idle.transport.was_aborted) == (False, True)
    assert (reading.transport.was_aborted, few.transport.was_aborted) == (False, False)


async def test_a_body_that_trickles_is_waited_for_so_long_and_not_longer(connect: Connect) -> None:
    app = FakeApp()
    client = connect(app)
    await client.send(post(1000))
    while not client.transport.is_lost and client.loop.now_s < 10 * BODY_TOTAL_TIMEOUT_S:
        await client.loop.advance(20)
        await client.send(b"x")

    assert client.loop.now_s <= BODY_TOTAL_TIMEOUT_S + 20
    assert client.transport.sent.startswith(b"HTTP/1.1 408 ")
    assert app.num_inside == 0


async def test_a_large_body_has_time_for_its_size(connect: Connect) -> None:
    size, piece = 5_000_000, 20_000
    app = FakeApp(10)
    client = connect(app)
    await client.send(post(size))
    for _ in range(size // piece):
        await client.loop.advance(1)
        await client.send(b"x" * piece)

    assert client.loop.now_s > 2 * BODY_TOTAL_TIMEOUT_S
    assert client.transport.sent.startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_stops_halfway_has_no_more_time_for_what_came(connect: Connect) -> None:
    client = connect(FakeApp())
    await client.send(post(9_000_000))
    await client.send(b"x" * 5_000_000)
    await client.loop.advance(BODY_TIMEOUT_S)

    assert client.transport.sent.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_the_server_does_not_read_yet_is_not_late(connect: Connect) -> None:
    app = FakeApp(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET)
    await client.send(post(500_000) + b"x" * 100_000)
    await client.loop.advance(3 * BODY_TOTAL_TIMEOUT_S)
    app.gate.set()
    await settled()
    await client.send(b"x" * 400_000)

    assert client.transport.sent.count(b"HTTP/1.1 200 ") == 2


async def test_a_request_that_was_answered_gets_no_second_answer_for_its_body(connect: Connect) -> None:
    app = FakeApp(10)
    app.does_read = False
    client = connect(app)
    await client.send(post(1000))
    await client.loop.advance(BODY_TIMEOUT_S)

    assert client.transport.sent.count(b"HTTP/1.1") == 1
    assert client.transport.is_lost


async def test_an_unneeded_body_is_not_read_without_end(connect: Connect) -> None:
    app = FakeApp(10)
    app.does_read = False
    client = connect(app)
    await client.send(post(10**12))
    num_sent, piece = 0, b"x" * 1_000_000
    while not client.transport.is_lost and num_sent < 1000:
        await client.send(piece)
        num_sent += 1

    assert num_sent == connection.MAX_DISCARDED_BYTES // len(piece) + 1


async def test_what_is_no_http_does_not_cut_the_answer_before_it(connect: Connect) -> None:
    app = FakeApp(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET + b"\x16\x03\x01\r\n\r\n")
    app.gate.set()
    await settled()

    assert client.transport.sent.endswith(b"\r\n\r\n" + b"x" * 10)
    assert client.transport.is_lost


async def test_an_empty_line_keeps_no_connection(connect: Connect) -> None:
    client = connect(FakeApp(10))
    await client.send(GET)
    await client.loop.advance(10)
    await client.send(b"\r\n")
    await client.loop.advance(HEAD_TIMEOUT_S)

    assert client.transport.is_lost


async def test_idle_connections_are_closed_for_new_ones(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 4)
    state, app = ServerState(), FakeApp(10)
    app.gate.clear()
    busy, *idle = (connect(app, state=state) for _ in range(4))
    await busy.send(GET)
    for client, answered_s in zip(idle, (3.0, 1.0, 2.0), strict=True):
        await client.loop.advance(answered_s)
        client.protocol.on_response_complete()
    await idle[2].send(b"GET / HT")
    late = connect(app, state=state)
    await settled()
    lost = [client.transport.is_lost for client in (busy, *idle, late)]

    assert lost == [False, False, True, False, False]


async def test_connections_that_come_together_close_idle_ones_together(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 4)
    state = ServerState()
    for _ in range(50):
        connect(FakeApp(), state=state)
    await settled()

    assert len(state.connections) == 4


async def test_a_server_whose_connections_are_all_busy_takes_no_more(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    state, app = ServerState(), FakeApp(10)
    app.gate.clear()
    busy = [connect(app, state=state) for _ in range(2)]
    for client in busy:
        await client.send(GET)
    late = connect(app, state=state)
    await settled()

    assert [client.transport.is_lost for client in (*busy, late)] == [False, False, True]


async def test_clients_that_do_not_read_are_disconnected_first_when_no_connection_is_free(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 1)
    client = connect(FakeApp(), room=0)
    await client.send(GET)
    await client.loop.advance(2 * MIN_WRITE_TIMEOUT_S)

    assert client.transport.was_aborted
