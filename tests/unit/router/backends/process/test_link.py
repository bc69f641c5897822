"""Both ends of a worker's socket when the other one does not read, and when callers cancel."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvloop

from engines.errors import HostLost, QueueFull
from engines.rpc.errors import error_record_of
from engines.rpc.messages import (
    Cancel,
    Cancelled,
    Frame,
    FrameDecoder,
    HostReport,
    Reply,
    Request,
    Run,
    RunResult,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    pack,
)
from engines.rpc.service import HostService
from engines.types import Call, EmbedCall, Embeddings, HostSnapshot
from router.backends.fleet import NotSent
from router.backends.process.child import WorkerConnection
from router.backends.process.link import ParentConnection
from router.backends.process.outbox import Outbox

NewLoop = Callable[[], asyncio.AbstractEventLoop]
LOOPS: tuple[NewLoop, ...] = (uvloop.new_event_loop, asyncio.new_event_loop)
MIB = 2**20
ANSWER = Embeddings(vectors=b"\0\0\0\0", dimensions=1, token_counts=(1,))
SNAPSHOT = HostSnapshot(
    host_id="h", device="cpu", total_bytes=1, budget_bytes=1, used_bytes=0, workspace_bytes=0, free_bytes=1,
    residents=(), models=(),
)  # fmt: skip


def embed(text: str = "x") -> Run[Call]:
    return Run(call=EmbedCall(model_id="a", texts=(text,)))


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[NewLoop], None]:
    """Run a test on uvloop, which servers and workers use, and on asyncio's loop, the fallback."""

    def run(new_loop: NewLoop) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test())

    return pytest.mark.parametrize("new_loop", LOOPS, ids=["uvloop", "asyncio"])(run)


class Peer:
    """The other end of a socket, controlled by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._cutter = FrameDecoder()

    async def read(self) -> list[tuple[int, Request]]:
        """Read the requests that have arrived, and those sent once there is space again."""
        return [(frame.number, decode_request(frame.head)) for frame in await self.frames()]

    async def frames(self) -> list[Frame]:
        """Read the frames as written."""
        frames: list[Frame] = []
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(0.2):
                    data = await loop.sock_recv(self._sock, 10 * MIB)
            except TimeoutError:
                break
            frames += self._cutter.feed(data)
        return frames

    async def answer(self, number: int, reply: Reply) -> None:
        frame = Frame(number, *encode_reply(reply))
        await asyncio.get_running_loop().sock_sendall(self._sock, b"".join(pack(frame)))

    def hang_up(self) -> None:
        self._sock.close()


@asynccontextmanager
async def linked(max_calls: int = 1000) -> AsyncIterator[tuple[ParentConnection, Peer, Outbox]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    outbox = Outbox(max_calls)
    link = ParentConnection("h", outbox, lambda: None, lambda seen: None, lambda: None)
    await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
    peer = Peer(theirs)
    yield link, peer, outbox
    link.close()
    peer.hang_up()
    await link.ended.wait()


async def abandoned(link: ParentConnection, requests: list[Run[Call]]) -> None:
    """All of them are asked, and all of their callers leave."""
    tasks = [asyncio.create_task(link.ask(request)) for request in requests]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@on_both_loops
async def test_what_a_worker_that_does_not_read_was_not_sent_is_forgotten_with_its_caller() -> None:
    async with linked() as (link, peer, outbox):
        for _ in range(5):
            await abandoned(link, [embed("x" * MIB) for _ in range(20)])
        pending = outbox.num_waiting, outbox.num_sent, cast(Any, link)._transport.get_write_buffer_size()
        later = asyncio.create_task(link.ask(embed("later")))
        heard = await peer.read()
        later.cancel()

    assert pending[:2] == (0, 1), "the one that was being written"
    assert pending[2] < MIB
    assert [type(request) for _, request in heard] == [Run, Cancel, Run]
    assert cast(Run[Call], heard[2][1]).call.texts == ("later",)


@on_both_loops
async def test_a_caller_that_waits_for_memory_is_served_when_it_is_free() -> None:
    async with linked(max_calls=20) as (link, peer, outbox):
        tasks = [asyncio.create_task(link.ask(embed(str(index)))) for index in range(30)]
        first = await peer.read()
        waiting = outbox.num_waiting
        for number, _ in first:
            await peer.answer(number, RunResult(result=ANSWER))
        second = await peer.read()
        for number, _ in second:
            await peer.answer(number, RunResult(result=ANSWER))
        answers = await asyncio.gather(*tasks)

    assert (len(first), waiting, len(second)) == (20, 10, 10)
    assert answers == [RunResult(result=ANSWER)] * 30


@on_both_loops
async def test_an_abandoned_call_counts_until_the_worker_says_that_it_has_ended() -> None:
    async with linked() as (link, peer, outbox):
        await abandoned(link, [embed()])
        before = outbox.num_sent
        for number, request in await peer.read():
            if isinstance(request, Run):
                await peer.answer(number, Cancelled())
        await asyncio.sleep(0.05)
        after = outbox.num_sent

    assert (before, after) == (1, 0)


@on_both_loops
async def test_a_call_that_was_not_sent_when_the_worker_ended_is_not_lost() -> None:
    async with linked(max_calls=0) as (link, peer, _):
        tasks = [asyncio.create_task(link.ask(embed())) for _ in range(20)]  # 16 of them go all the same
        await asyncio.sleep(0.05)
        peer.hang_up()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [HostLost] * 16 + [NotSent] * 4


@on_both_loops
async def test_a_request_that_cannot_be_encoded_fails_alone_and_leaves_nothing() -> None:
    async with linked() as (link, peer, outbox):
        with pytest.raises(UnicodeEncodeError):
            await link.ask(embed("\ud800"))
        task = asyncio.create_task(link.ask(embed()))
        ((number, _),) = await peer.read()
        await peer.answer(number, error_record_of(QueueFull("full")))
        with pytest.raises(QueueFull):
            await task
        left = len(cast(Any, link)._waiting), outbox.num_sent

    assert left == (0, 0)


@on_both_loops
async def test_a_link_to_a_worker_that_does_not_read_can_be_closed() -> None:
    async with linked() as (link, _, _):
        task = asyncio.create_task(link.ask(embed("x" * 8 * MIB)))
        await asyncio.sleep(0.05)
        link.close()
        async with asyncio.timeout(5):
            await link.ended.wait()
        with pytest.raises(HostLost):
            await task


class SlowService:
    """A host that answers slowly, and has a new report at every poll."""

    def __init__(self) -> None:
        self.host = self
        self.begun = 0
        self.num_polls = 0

    async def answer(self, request: Request) -> Reply:
        self.begun += 1
        await asyncio.sleep(30)
        return RunResult(result=ANSWER)

    def poll(self, after: int) -> HostReport:
        self.num_polls += 1
        return HostReport(snapshot=SNAPSHOT, fault="x" * 100_000)

    async def event_arrived(self, after: int) -> bool:
        return True


@asynccontextmanager
async def channel(service: SlowService, *, telling: bool = False) -> AsyncIterator[tuple[WorkerConnection, Peer]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    made = WorkerConnection()
    await asyncio.get_running_loop().create_unix_connection(lambda: made, sock=theirs)
    host = cast(HostService, service)
    if telling:
        serving = asyncio.create_task(made.serve(host))
    else:
        made._service = host
    parent = Peer(ours)
    yield made, parent
    parent.hang_up()
    await made.ended.wait()
    if telling:
        await serving


@on_both_loops
async def test_a_request_and_its_cancellation_in_one_read_leave_nothing_in_the_worker() -> None:
    service = SlowService()
    frames = b""
    for number in range(1, 1001):
        for own, request in ((number, embed()), (0, Cancel(number=number))):
            frames += pack(Frame(own, encode_request(request), b""))[0]
    async with channel(service) as (worker, parent):
        worker.data_received(frames)
        await asyncio.sleep(0.1)
        left = worker.num_tasks
        replies = [decode_reply(frame.head, frame.body) for frame in await parent.frames()]

    assert (left, service.begun) == (0, 0)
    assert len(replies) == 1000
    assert set(map(type, replies)) == {Cancelled}


@on_both_loops
async def test_a_request_cancelled_while_it_runs_is_reported_as_ended() -> None:
    service = SlowService()
    async with channel(service) as (worker, parent):
        worker.data_received(pack(Frame(7, encode_request(embed()), b""))[0])
        await asyncio.sleep(0.02)
        worker.data_received(pack(Frame(0, encode_request(Cancel(number=7)), b""))[0])
        told = await parent.frames()
        left = worker.num_tasks

    assert (left, service.begun) == (0, 1)
    assert [frame.number for frame in told] == [7]


@on_both_loops
async def test_a_worker_tells_nothing_more_while_its_parent_does_not_read() -> None:
    service = SlowService()
    async with channel(service, telling=True) as (worker, _):
        while not service.num_polls or worker._writable.is_set():  # noqa: ASYNC110 - the transport's own flag
            await asyncio.sleep(0.001)
        before = service.num_polls
        await asyncio.sleep(0.2)
        after = service.num_polls

    assert 0 < before == after < 50
