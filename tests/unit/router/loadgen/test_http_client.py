"""The client reads everything that HTTP/1.1 allows, and reports errors otherwise."""

import asyncio

import pytest

from router.loadgen.http_client import Connection, Target, encode, refusal, scores
from tests.testkit.http_wire import OK, respond_with, response, wire

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_THE_END = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://host", "/v1/embeddings"),
        ("http://host:81/v1/", "/v1/embeddings"),
        ("https://host/openai/v1", "/openai/v1/embeddings"),
    ],
)
def test_the_url_may_end_in_v1_or_before_it(url: str, path: str) -> None:
    assert Target(url, "m").path == path


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://api.example.org/v1", b"api.example.org"), ("http://[::1]:6008", b"[::1]:6008")],
)
def test_the_host_is_named_as_the_address_names_it(url: str, host: bytes) -> None:
    assert b"\r\nHost: " + host + b"\r\n" in encode(Target(url, "m"), ["text"]).data


def test_the_key_goes_into_every_request() -> None:
    request = encode(Target("http://host:81", "m", "secret"), ["text"], dimensions=64)

    head, _, body = request.data.partition(b"\r\n\r\n")
    assert b"Authorization: Bearer secret" in head
    assert b"Host: host:81\r\n" in head
    assert body == b'{"model":"m","input":["text"],"encoding_format":"base64","dimensions":64}'


@pytest.mark.parametrize(
    "pieces",
    [
        (response(),),
        (response()[:40], response()[40:]),
        (b"HTTP/1.1 102 Processing\r\n\r\n", response()),
        (CHUNKED, chunks(OK[:9], OK[9:])),
        (CHUNKED + chunks(OK)[:-5], b"0\r\n\r\n"),
        tuple(bytes([byte]) for byte in response()),
    ],
    ids=["whole", "in halves", "after a note", "in chunks", "with the end by itself", "byte by byte"],
)
async def test_an_answer_is_read_as_it_comes_and_the_connection_is_kept(pieces: tuple[bytes, ...]) -> None:
    async with wire(respond_with(*pieces)) as (server, target):
        connection = await Connection.open(target)
        answers = [await connection.ask(encode(target, ["text"])) for _ in range(2)]
        connection.close()

    assert [(answer.status, answer.body) for answer in answers] == [(200, OK)] * 2
    assert server.num_connections == 1


async def test_an_answer_may_end_with_its_connection() -> None:
    async with wire(respond_with(UNTIL_THE_END, OK, then_closes=True)) as (_, target):
        connection = await Connection.open(target)
        answer = await connection.ask(encode(target, ["text"]))

    assert (answer.status, answer.body) == (200, OK)
    assert not connection.is_open


async def test_a_server_that_says_close_is_not_asked_again_on_that_connection() -> None:
    async with wire(respond_with(response(OK, "200 OK", "Connection: close"))) as (_, target):
        connection = await Connection.open(target)
        await connection.ask(encode(target, ["text"]))
        with pytest.raises(ConnectionResetError, match="closed"):
            await connection.ask(encode(target, ["text"]))
        connection.close()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [((response()[:60],), "closed the connection"), ((b"SSH-2.0-OpenSSH_9\r\n",), "does not speak HTTP/1.1")],
    ids=["half an answer", "another protocol"],
)
async def test_what_is_no_answer_is_an_error(pieces: tuple[bytes, ...], message: str) -> None:
    async with wire(respond_with(*pieces, then_closes=True)) as (_, target):
        connection = await Connection.open(target)
        with pytest.raises(ConnectionResetError, match=message):
            await connection.ask(encode(target, ["text"]))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error":{"message":"slow down","code":"rate_limit_exceeded"}}', ("rate_limit_exceeded", "slow down")),
        (b'{"error":{"message":"no","code":null}}', ("", "no")),
        (b'{"error":"no model"}', ("", '{"error":"no model"}')),
        (b"<html>\n<h1>Bad gateway</h1>", ("", "<html> <h1>Bad gateway</h1>")),
    ],
)
def test_a_refusal_has_the_servers_message(body: bytes, expected: tuple[str, str]) -> None:
    assert refusal(body) == expected


async def test_scores_are_in_the_order_of_the_documents() -> None:
    body = b'{"results":[{"index":1,"relevance_score":0.9},{"index":0,"relevance_score":0.2}]}'
    async with wire(respond_with(response(body))) as (_, target):
        assert await asyncio.to_thread(scores, target, "query", ["first", "second"]) == [0.2, 0.9]


@pytest.mark.parametrize("body", [b'{"results":[{"index":0,"relevance_score":0.2}]}', OK, b"[]", b"no JSON"])
async def test_an_answer_without_a_score_for_each_document_is_an_error(body: bytes) -> None:
    async with wire(respond_with(response(body))) as (_, target):
        with pytest.raises(OSError, match=r"score|unreadable"):
            await asyncio.to_thread(scores, target, "query", ["first", "second"])
