"""Runs `TimeoutHttpProtocol` without sockets: on a fake transport, clock and app."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from router.server.connection import TimeoutHttpProtocol

LARGE = 3_000_000


class Timer:
    def __init__(self, at_s: float, call: Callable[[], object]) -> None:
        self.at_s, self.call, self.is_cancelled = at_s, call, False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    """An event loop with a fake clock; tasks run on the real loop."""

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
    """Yield until all tasks are blocked."""
    for _ in range(20):
        await asyncio.sleep(0)


class FakeTransport(asyncio.Transport):
    """A fake transport. `room`: bytes that the kernel accepts at once; the rest waits for `read`."""

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
        """Simulate that the client reads, so that the kernel accepts as many bytes again."""
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


class FakeApp:
    """An app that answers each request with `size` bytes, and counts the running ones."""

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


class FakeConnection:
    """A connection to an app."""

    def __init__(self, app: FakeApp, room: int, state: ServerState) -> None:
        config = uvicorn.Config(app, http=TimeoutHttpProtocol, lifespan="off", log_config=None, timeout_keep_alive=75)
        config.load()
        self.loop, self.transport, self.state = FakeLoop(), FakeTransport(room), state
        loop: Any = self.loop
        self.protocol = TimeoutHttpProtocol(config, self.state, {}, loop)
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)

    async def send(self, data: bytes) -> None:
        if not self.transport.is_lost:
            self.protocol.data_received(data)
        await settled()

    async def read(self, num_bytes: int) -> None:
        self.transport.read(num_bytes)
        await settled()
