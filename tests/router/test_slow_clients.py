"""Clients that read or send slowly, or not at all: the protocol of connections, on a transport and a clock of ours."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from structlog.testing import capture_logs
from uvicorn.server import ServerState

from router import connection
from router.connection import BODY_S, BODY_TOTAL_S, HEAD_S, LAST_WRITE_S, PIECE_BYTES, WRITE_S, PatientProtocol

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE = 3_000_000
CREDITS = 1024
"""What a client gets besides the body: the head."""


def post(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length


class Timer:
    def __init__(self, at_s: float, call: Callable[[], object]) -> None:
        self.at_s, self.call, self.is_cancelled = at_s, call, False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    """Time passes when a test says so; tasks are the running loop's."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._timers: list[Timer] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[..., object], *args: object) -> Timer:
        timer = Timer(self.now_s + delay_s, lambda: call(*args))
        self._timers.append(timer)
        return timer

    def create_task(self, coroutine: Any, **_: Any) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine)

    async def advance(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while due := [timer for timer in self._timers if not timer.is_cancelled and timer.at_s <= end_s]:
            timer = min(due, key=lambda timer: timer.at_s)
            self._timers.remove(timer)
            self.now_s = timer.at_s
            timer.call()
            await settled()
        self.now_s = end_s
        await settled()


async def settled() -> None:
    """All tasks have got as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


class FakeTransport(asyncio.Transport):
    """`room`: bytes that the kernel takes at once; what it does not take waits for `read`."""

    def __init__(self, room: int = 0) -> None:
        super().__init__()
        self.room, self.sent, self.waiting = room, bytearray(), bytearray()
        self.num_writes = self.most_waiting = 0
        self.high, self.low = 65536, 16384
        self.is_paused = self.is_lost = self.was_aborted = self._is_closing = False
        self.protocol: Any = None

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = 65536 if high is None else high
        self.low = self.high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def write(self, data: Any) -> None:
        self.num_writes += bool(data)
        self.waiting += data
        self._flow()
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        if len(self.waiting) > self.high and not self.is_paused:
            self.is_paused = True
            self.protocol.pause_writing()

    def read(self, num_bytes: int) -> None:
        """The client reads, so the kernel takes as much again."""
        self.room += num_bytes
        self._flow()
        if self.is_paused and len(self.waiting) <= self.low:
            self.is_paused = False
            self.protocol.resume_writing()
        if self._is_closing and not self.waiting:
            self.lose()

    def _flow(self) -> None:
        taken = self.waiting[: self.room]
        del self.waiting[: self.room]
        self.room -= len(taken)
        self.sent += taken

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True
        if not self.waiting:
            asyncio.get_running_loop().call_soon(self.lose)

    def abort(self) -> None:
        self._is_closing = self.was_aborted = True
        asyncio.get_running_loop().call_soon(self.lose)

    def lose(self) -> None:
        if not self.is_lost:
            self._is_closing = self.is_lost = True
            self.protocol.connection_lost(None)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default


class Answering:
    """An app that answers each request with `size` bytes, and knows which it is still busy with."""

    def __init__(self, size: int = LARGE) -> None:
        self.size, self.num_begun, self.num_inside = size, 0, 0
        self.does_read, self.gate = True, asyncio.Event()
        self.gate.set()
        self.heard: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_begun += 1
        self.num_inside += 1
        try:
            while self.does_read:
                message = await receive()
                self.heard.append(message["type"])
                if not message.get("more_body"):
                    break
            await self.gate.wait()
            headers = [(b"content-length", b"%d" % self.size)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x" * self.size})
        finally:
            self.num_inside -= 1


class Connected:
    """One connection to an app."""

    def __init__(self, app: Answering, room: int, state: ServerState) -> None:
        config = uvicorn.Config(app, http=PatientProtocol, lifespan="off", log_config=None, timeout_keep_alive=75)
        config.load()
        self.loop, self.transport, self.state = FakeLoop(), FakeTransport(room), state
        loop: Any = self.loop
        self.protocol = PatientProtocol(config, self.state, {}, loop)
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    async def send(self, data: bytes) -> None:
        if not self.transport.is_lost:
            self.protocol.data_received(data)
        await settled()

    async def read(self, num_bytes: int) -> None:
        self.transport.read(num_bytes)
        await settled()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Connected]]:
    made: list[Connected] = []

    def connect(app: Answering, room: int = 10**9, state: ServerState | None = None) -> Connected:
        made.append(Connected(app, room, state or ServerState()))
        return made[-1]

    yield connect
    for connected in made:
        connected.transport.lose()
    await settled()


Connect = Callable[..., Connected]


async def test_a_request_is_not_over_before_its_answer_has_left(connect: Connect) -> None:
    app = Answering()
    client = connect(app, room=0)
    await client.send(GET)
    inside = []
    while len(client.transport.sent) < LARGE:
        inside.append(app.num_inside)
        await client.read(100_000)
    await client.read(CREDITS)

    assert set(inside) == {1}
    assert app.num_inside == 0
    assert client.transport.most_waiting <= PIECE_BYTES
    assert client.transport.sent.endswith(b"x" * LARGE)


async def test_an_answer_that_is_read_at_once_makes_nobody_wait(connect: Connect) -> None:
    app = Answering(20_000)
    client = connect(app)
    await client.send(GET + GET)

    assert (app.num_begun, app.num_inside) == (2, 0)
    assert client.transport.num_writes == 4  # heads and bodies
    assert client.transport.sent.count(b"x" * 20_000) == 2


@pytest.mark.parametrize("end", ["the client leaves", "the server cancels"])
async def test_a_request_whose_answer_is_not_read_ends_with_its_connection(connect: Connect, end: str) -> None:
    app = Answering()
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
    app = Answering()
    client = connect(app, room=0)
    await client.send(GET + GET)
    first = app.num_begun
    await client.read(LARGE + CREDITS)

    assert (first, app.num_begun, app.num_inside) == (1, 2, 1)


async def test_the_first_of_two_requests_hears_that_its_client_has_left(connect: Connect) -> None:
    app = Answering()
    app.gate.clear()
    client = connect(app)
    await client.send(GET + GET)
    running = client.protocol._running
    client.transport.lose()

    assert running is not None
    assert (await running.receive())["type"] == "http.disconnect"


async def test_requests_sent_ahead_are_so_many_at_most(connect: Connect) -> None:
    app = Answering(10)
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


async def test_who_reads_slowly_and_without_a_pause_gets_all_of_it(connect: Connect) -> None:
    app = Answering(20_000_000)
    client = connect(app, room=300_000)
    await client.send(GET)
    while not client.transport.is_closing() and app.num_inside:
        await client.loop.advance(1.0)
        await client.read(90_000)

    assert client.loop.now_s > 3 * WRITE_S
    assert not client.transport.was_aborted
    assert client.transport.sent.endswith(b"x" * 20_000_000)


async def test_less_than_a_piece_a_minute_is_progress_too(connect: Connect) -> None:
    client = connect(Answering(), room=0)
    await client.send(GET)
    for _ in range(20):
        await client.loop.advance(WRITE_S / 2)
        await client.read(1000)

    assert not client.transport.was_aborted


async def test_who_stops_reading_is_let_go_of(connect: Connect) -> None:
    app = Answering()
    client = connect(app, room=1_000_000)
    with capture_logs() as lines:
        await client.send(GET)
        await client.loop.advance(0.9 * WRITE_S)
        await client.read(1)
        await client.loop.advance(0.9 * WRITE_S)
        was_aborted = client.transport.was_aborted
        await client.loop.advance(0.4 * WRITE_S)

    assert (was_aborted, client.transport.was_aborted) == (False, True)
    assert app.num_inside == 0
    assert [line["event"] for line in lines] == ["connection.stalled"]


@pytest.mark.parametrize("head", [GET, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"])
async def test_so_is_who_does_not_read_a_short_answer(connect: Connect, head: bytes) -> None:
    """Closing a transport waits for what it has not sent."""
    client = connect(Answering(10), room=20)
    await client.send(head)
    await client.loop.advance(1.3 * WRITE_S)

    assert client.transport.is_lost


async def test_a_shutdown_waits_less_for_those_who_do_not_read(connect: Connect) -> None:
    client = connect(Answering(), room=0)
    await client.send(GET)
    client.protocol.shutdown()
    await client.loop.advance(0.9 * LAST_WRITE_S)
    early = client.transport.was_aborted
    await client.loop.advance(0.5 * LAST_WRITE_S)

    assert (early, client.transport.was_aborted) == (False, True)


async def test_who_does_not_read_goes_first_when_much_is_unread(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNREAD_BYTES", 2 * LARGE)
    state = ServerState()
    reading, idle, few = (connect(Answering(), room=0, state=state) for _ in range(3))
    for client in (reading, idle):
        await client.send(GET)
        await client.read(CREDITS)
    await idle.loop.advance(2 * LAST_WRITE_S)
    while_few_are = idle.transport.was_aborted
    await few.send(GET)
    await few.read(CREDITS)
    for _ in range(int(LAST_WRITE_S) + 2):
        await reading.read(1000)
        await reading.loop.advance(1)
        await idle.loop.advance(1)
    await few.loop.advance(2 * LAST_WRITE_S)

    assert (while_few_are, idle.transport.was_aborted) == (False, True)
    assert (reading.transport.was_aborted, few.transport.was_aborted) == (False, False)


async def test_a_body_that_trickles_is_waited_for_so_long_and_not_longer(connect: Connect) -> None:
    app = Answering()
    client = connect(app)
    await client.send(post(1000))
    while not client.transport.is_lost and client.loop.now_s < 10 * BODY_TOTAL_S:
        await client.loop.advance(20)
        await client.send(b"x")

    assert client.loop.now_s <= BODY_TOTAL_S + 20
    assert client.transport.sent.startswith(b"HTTP/1.1 408 ")
    assert app.num_inside == 0


async def test_a_large_body_has_time_for_its_size(connect: Connect) -> None:
    size, piece = 5_000_000, 20_000
    app = Answering(10)
    client = connect(app)
    await client.send(post(size))
    for _ in range(size // piece):
        await client.loop.advance(1)
        await client.send(b"x" * piece)

    assert client.loop.now_s > 2 * BODY_TOTAL_S
    assert client.transport.sent.startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_stops_halfway_has_no_more_time_for_what_came(connect: Connect) -> None:
    client = connect(Answering())
    await client.send(post(9_000_000))
    await client.send(b"x" * 5_000_000)
    await client.loop.advance(BODY_S)

    assert client.transport.sent.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_the_server_does_not_read_yet_is_not_late(connect: Connect) -> None:
    app = Answering(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET)
    await client.send(post(500_000) + b"x" * 100_000)
    await client.loop.advance(3 * BODY_TOTAL_S)
    app.gate.set()
    await settled()
    await client.send(b"x" * 400_000)

    assert client.transport.sent.count(b"HTTP/1.1 200 ") == 2


async def test_a_request_that_was_answered_gets_no_second_answer_for_its_body(connect: Connect) -> None:
    app = Answering(10)
    app.does_read = False
    client = connect(app)
    await client.send(post(1000))
    await client.loop.advance(BODY_S)

    assert client.transport.sent.count(b"HTTP/1.1") == 1
    assert client.transport.is_lost


async def test_a_body_that_nobody_wants_is_not_read_without_end(connect: Connect) -> None:
    app = Answering(10)
    app.does_read = False
    client = connect(app)
    await client.send(post(10**12))
    num_sent, piece = 0, b"x" * 1_000_000
    while not client.transport.is_lost and num_sent < 1000:
        await client.send(piece)
        num_sent += 1

    assert num_sent == connection.MAX_DISCARDED_BYTES // len(piece) + 1


async def test_what_is_no_http_does_not_cut_the_answer_before_it(connect: Connect) -> None:
    app = Answering(10)
    app.gate.clear()
    client = connect(app)
    await client.send(GET + b"\x16\x03\x01\r\n\r\n")
    app.gate.set()
    await settled()

    assert client.transport.sent.endswith(b"\r\n\r\n" + b"x" * 10)
    assert client.transport.is_lost


async def test_an_empty_line_keeps_no_connection(connect: Connect) -> None:
    client = connect(Answering(10))
    await client.send(GET)
    await client.loop.advance(10)
    await client.send(b"\r\n")
    await client.loop.advance(HEAD_S)

    assert client.transport.is_lost
