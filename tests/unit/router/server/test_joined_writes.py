"""The head of a small response leaves in one write with its body, and never waits without one."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from uvicorn.server import ServerState

from tests.testkit.http_connections import FakeConnection, settled

Messages = Sequence[dict[str, Any]]


class Sender:
    """An app that sends the given messages; fails at the end where it is told so."""

    def __init__(self, messages: Messages, *, fails: bool = False) -> None:
        self._messages, self._fails = messages, fails

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for message in self._messages:
            await send(dict(message))
        if self._fails:
            raise ValueError("after the head")


def head(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answered(messages: Messages, *, method: str = "GET", fails: bool = False) -> Any:
    """Return the transport after one request."""
    app: Any = Sender(messages, fails=fails)
    client = FakeConnection(app, 10**6, ServerState())
    await client.send(f"{method} / HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    return client.transport


async def test_a_small_answer_is_one_write() -> None:
    transport = await answered([head((b"x-a", b"1"), (b"content-length", b"5")), body(b"hello")])

    assert transport.num_writes == 1
    assert transport.sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert transport.sent.endswith(b"\r\n\r\nhello")


async def test_two_answers_are_two_writes_in_order() -> None:
    app: Any = Sender([head((b"content-length", b"2")), body(b"ab")])
    client = FakeConnection(app, 10**6, ServerState())
    await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 2)

    assert client.transport.num_writes == 2
    assert client.transport.sent.count(b"\r\n\r\nab") == 2


@pytest.mark.parametrize(
    ("messages", "method"),
    [
        pytest.param([head((b"content-length", b"5")), body(b"")], "HEAD", id="HEAD"),
        pytest.param([head((b"content-length", b"0")), body(b"")], "GET", id="an empty body"),
    ],
)
async def test_a_head_without_a_body_is_written(messages: Messages, method: str) -> None:
    transport = await answered(messages, method=method)

    assert transport.sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" in transport.sent


@pytest.mark.parametrize(
    "header",
    [
        pytest.param((b"content-type", b"text/event-stream"), id="a stream that has no event yet"),
        pytest.param((b"content-length", b"20000"), id="a large body that is not ready"),
    ],
)
async def test_a_head_does_not_wait_for_a_body_that_may_come_late(header: tuple[bytes, bytes]) -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(head(header))
        await gate.wait()

    client = FakeConnection(cast(Any, app), 10**6, ServerState())
    await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    sent = bytes(client.transport.sent)
    gate.set()
    await settled()

    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_an_app_that_fails_after_the_head_sends_the_head_and_closes() -> None:
    transport = await answered([head((b"content-length", b"5"))], fails=True)

    assert transport.sent.endswith(b"\r\n\r\n")
    assert transport.is_closing()


async def test_a_body_in_parts_is_sent_as_it_comes() -> None:
    parts = [head((b"content-length", b"4")), body(b"ab", more=True), body(b"cd")]
    transport = await answered(parts)

    assert transport.num_writes == 2
    assert transport.sent.endswith(b"\r\n\r\nabcd")
