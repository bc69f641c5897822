"""Phases send requests on schedule, whatever their responses, and count failures by kind."""

import asyncio
import socket
from itertools import pairwise

import pytest

from router.loadgen import Outcome, Phase, after, closed, opened, send
from router.loadgen.http_client import Request, Target, encode
from tests.testkit.http_wire import OK, Handle, respond_with, response, wire

BUSY = b'{"error":{"message":"wait a second","code":"queue_full"}}'


def request(target: Target) -> Request:
    return encode(target, ["one", "two"])


class Gate:
    """Holds all responses until `needed` requests have arrived."""

    def __init__(self, needed: int) -> None:
        self._needed, self._waiting, self.most = needed, 0, 0
        self._opened = asyncio.Event()

    async def __call__(self, writer: asyncio.StreamWriter) -> None:
        self._waiting += 1
        self.most = max(self.most, self._waiting)
        if self._waiting >= self._needed:
            self._opened.set()
        await self._opened.wait()
        self._waiting -= 1
        writer.write(response())


async def test_an_open_load_does_not_wait_for_a_server_that_stalls_and_counts_the_stall() -> None:
    gate = Gate(needed=20)
    async with wire(gate) as (_, target):
        outcome = await opened(target, [request(target)], 100.0, until=after(20))
    latencies_s = {sample.due_s: sample.latency_s for sample in outcome.samples}
    first_s, last_s = min(latencies_s), max(latencies_s)

    assert gate.most == 20
    assert outcome.num_failed == 0
    assert latencies_s[first_s] == pytest.approx(latencies_s[last_s] + last_s - first_s, abs=0.05)
    assert last_s - first_s > 0.1


async def test_an_open_load_is_the_same_every_time() -> None:
    async with wire(respond_with(response())) as (_, target):
        runs = [await opened(target, [request(target)], 2000.0, until=after(10)) for _ in range(2)]
    gaps = [[later - sooner for sooner, later in pairwise(due_s(outcome))] for outcome in runs]

    assert gaps[0] == pytest.approx(gaps[1])
    assert len(set(gaps[0])) > 5, "at random moments, not in step"


def due_s(outcome: Outcome) -> list[float]:
    return sorted(sample.due_s for sample in outcome.samples)


async def test_a_closed_load_has_so_many_clients_and_no_more() -> None:
    gate = Gate(needed=3)
    async with wire(gate) as (server, target):
        outcome = await closed(target, [request(target)], 3, until=after(12))

    assert gate.most == 3
    assert len(outcome.samples) == 12
    assert server.num_connections == 3
    assert sum(sample.num_texts for sample in outcome.samples) == 24


@pytest.mark.parametrize(
    ("handle", "kind", "message"),
    [
        (respond_with(response(BUSY, "429 Too Many Requests")), "429 queue_full", "wait a second"),
        (respond_with(response(b"oops", "502 Bad Gateway")), "502", "oops"),
        (respond_with(then_closes=True), "connection closed", "the server closed the connection"),
    ],
)
async def test_a_failure_is_counted_by_its_kind_and_described(handle: Handle, kind: str, message: str) -> None:
    async with wire(handle) as (_, target):
        outcome = await send(target, [request(target)], Phase(clients=2), until=after(5))

    assert outcome.errors == {kind: 5}
    assert outcome.messages == {kind: message}
    assert (outcome.num_failed, outcome.texts_per_s) == (5, 0)


async def test_a_refused_connection_is_a_failure_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}", "m")
    outcome = await send(target, [request(target)], Phase(per_s=1000.0), until=after(3))

    assert outcome.errors == {"refused to connect": 3}


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one() -> None:
    answers = iter([1.5, 0.0, 0.0])

    async def slow_at_first(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(next(answers))
        writer.write(response())

    async with wire(slow_at_first, timeout_s=0.5) as (server, target):
        outcome = await closed(target, [request(target)], 1, until=after(3))

    assert [sample.status for sample in outcome.samples] == [0, 200, 200]
    assert outcome.messages == {"timed out": "no response within 0.5 s"}
    assert server.num_connections == 2


async def test_observers_get_every_request_with_its_answer() -> None:
    seen: list[tuple[int, bytes]] = []
    async with wire(respond_with(response())) as (_, target):
        requests = [request(target)]
        await opened(
            target, requests, 1000.0, until=after(4), watch=lambda sample, body: seen.append((sample.status, body))
        )

    assert seen == [(200, OK)] * 4
