"""Limits over real sockets: per window, concurrent, and the headers of responses."""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from engines.errors import (
    EngineFailed,
    InvalidValue,
    ModelLoading,
    NonFiniteEmbedding,
    OutOfMemory,
    QueueFull,
    ShuttingDown,
)
from engines.types import EmbedCall
from router.app import create_app
from router.auth.keys import ANONYMOUS, Key
from router.config.settings import Settings
from router.limits import store as limit_store
from router.limits.budgets import Limit
from router.limits.concurrency import Caller, caller_of
from router.limits.limiter import RATE_HEADERS, Limiter, duration, estimate_tokens
from router.limits.store import PROBE_INTERVAL_S
from tests.testkit.backends import ScriptedBackend
from tests.testkit.clocks import FakeClock
from tests.testkit.redis_server import RedisServer, needs_redis
from tests.testkit.servers import EMBED, REGISTRY, Limited, bearer, limited, serving, write_keys

FAMILIES = ("requests", "tokens")


def told(answer: httpx.Response, family: str) -> tuple[str | None, ...]:
    """Return limit, remaining and reset of a family from the headers."""
    return tuple(answer.headers.get(f"x-ratelimit-{word}-{family}") for word in ("limit", "remaining", "reset"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the log: console lines would take more time than the requests."""
    with capture_logs():
        yield


@pytest.fixture
def three() -> Iterator[Limited]:
    """A server with three requests and a hundred tokens per minute for every caller."""
    with limited(Settings(rate_limit_requests=3, rate_limit_tokens=100)) as server:
        yield server


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.1, "100ms"),
        (0.9994, "1s"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.999, "59.999s"),
        (60.0, "1m0s"),
        (61.5, "1m1.5s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (3725.25, "1h2m5.25s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_answer_says_what_is_left(three: Limited) -> None:
    first = three.embed(input="12345")
    three.clock.advance(6.5)
    second = three.embed(input=["12345", "123"])

    assert (first.status_code, second.status_code) == (200, 200)
    assert told(first, "requests") == ("3", "2", "1m0s")
    assert told(first, "tokens") == ("100", "95", "1m0s")
    assert told(second, "requests") == ("3", "1", "53.5s")
    assert told(second, "tokens") == ("100", "87", "53.5s")


def test_answers_without_limits_say_nothing() -> None:
    with limited(Settings()) as server:
        answer = server.embed()

    assert answer.status_code == 200
    assert not RATE_HEADERS.keys() & answer.headers.keys()


def test_only_requests_that_embed_are_counted(three: Limited) -> None:
    for path in ("/v1/models", "/v1/models/mini", "/admin/models", "/health", "/docs/openapi.json") * 2:
        answer = three.client.get(path)
        assert answer.status_code == 200
        assert not RATE_HEADERS.keys() & answer.headers.keys()


def test_one_request_too_many_is_refused_until_the_oldest_has_left(three: Limited) -> None:
    for _ in range(3):
        assert three.embed().status_code == 200
        three.clock.advance(7)
    refused = three.embed()
    three.clock.advance(int(refused.headers["retry-after-ms"]) / 1000)
    admitted, again = three.embed(), three.embed()

    assert refused.status_code == 429
    assert refused.json()["error"] == {
        "message": "Rate limit reached: this address has used its 3 requests per 60 s; retry in 39.001s",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("40", "39001")
    assert told(refused, "requests") == ("3", "0", "39s")
    assert told(refused, "tokens")[:2] == ("100", "97")
    assert "x-should-retry" not in refused.headers
    assert (admitted.status_code, again.status_code) == (200, 429)
    assert len(three.backend.calls) == 4


def test_requests_with_mistakes_count_too(three: Limited) -> None:
    answers = [three.client.post(EMBED, content=b"{") for _ in range(4)]

    assert [answer.status_code for answer in answers] == [400, 400, 400, 429]
    assert told(answers[0], "requests") == ("3", "2", "1m0s")


def test_what_an_estimate_fell_short_of_is_paid_for_in_the_next_window(three: Limited) -> None:
    large = three.embed(input="x" * 150)
    refused = three.embed()
    three.clock.advance(int(refused.headers["retry-after-ms"]) / 1000)
    admitted = three.embed()

    assert large.status_code == 200
    assert told(large, "tokens") == ("100", "0", "1m0s")
    assert refused.status_code == 429
    assert refused.json()["error"]["message"] == (
        "Rate limit reached: this address has used its 100 tokens per 60 s; retry in 1m0.001s"
    )
    assert refused.headers["retry-after"] == "61"
    assert told(admitted, "tokens")[:2] == ("100", "49")


@pytest.mark.parametrize(
    "failure", [InvalidValue("x"), QueueFull("x"), ModelLoading("x"), ShuttingDown("x"), OutOfMemory("x")]
)
def test_a_request_that_fails_before_it_runs_costs_no_tokens(three: Limited, failure: Exception) -> None:
    three.backend.failures["mini"] = failure
    failed = three.embed(input="x" * 360)
    three.backend.failures.clear()

    assert failed.status_code != 200
    assert told(failed, "tokens")[:2] == ("100", "100")
    assert told(three.embed(), "tokens")[:2] == ("100", "99")


@pytest.mark.parametrize("failure", [EngineFailed("x"), NonFiniteEmbedding("x", index=0)])
def test_a_forward_pass_that_fails_costs_what_was_reserved(three: Limited, failure: Exception) -> None:
    three.backend.failures["mini"] = failure
    failed = three.embed(input=[[1] * 30, [2] * 20])
    three.backend.failures.clear()

    assert failed.status_code == 500
    assert told(three.embed(), "tokens")[:2] == ("100", "49")


async def test_requests_at_once_cannot_take_more_than_a_window_admits() -> None:
    backend, clock = ScriptedBackend("mini"), FakeClock()
    gate = backend.gates["mini"] = asyncio.Event()
    app = create_app(Settings(rate_limit_tokens=100), REGISTRY, backend, limit_clock=clock)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        body = {"input": [7] * 30}
        asked = [asyncio.create_task(client.post(EMBED, json=body)) for _ in range(12)]
        refused, _ = await asyncio.wait(asked[:], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        first = next(iter(refused)).result()
        while sum(one.done() for one in asked) < 9:  # noqa: ASYNC110  # the three that are in wait at the gate
            await asyncio.sleep(0.002)
        gate.set()
        answers = await asyncio.gather(*asked)
        last = await client.post(EMBED, json={"input": "a"})
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)

    assert Counter(answer.status_code for answer in answers) == {200: 3, 429: 9}
    assert used == 90
    assert first.json()["error"]["message"] == (
        "Rate limit reached: the request has about 30 tokens, and this address has 10 left of 100 per 60 s, including "
        "running requests; retry in 1.001s"
    )
    assert (first.headers["retry-after"], first.headers["retry-after-ms"]) == ("2", "1001")
    assert told(first, "tokens")[:2] == ("100", "10")
    assert told(last, "tokens") == ("100", "9", "1m0s")


def test_a_request_larger_than_a_window_is_refused_for_good(three: Limited) -> None:
    refused = three.embed(input=[7] * 101)
    with (
        openai.OpenAI(base_url=f"{three.url}/v1", api_key="any") as patient,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        patient.embeddings.create(model="mini", input="word " * 100)

    assert refused.status_code == 429
    assert refused.json()["error"] == {
        "message": "Request too large: about 101 tokens, and the limit of this address is 100 per 60 s; send fewer or "
        "shorter inputs per request",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert told(refused, "requests")[1] == "2"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "1", "it did not try again"
    assert three.backend.calls == []


async def test_a_long_text_counts_as_much_as_the_model_reads() -> None:
    backend = ScriptedBackend("mini")
    gate = backend.gates["mini"] = asyncio.Event()
    app = create_app(Settings(rate_limit_tokens=1000), REGISTRY, backend, limit_clock=FakeClock())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        long = {"input": "word " * 5000}  # the model reads 512 tokens
        running = asyncio.create_task(client.post(EMBED, json=long))
        while not backend.calls:  # noqa: ASYNC110  # a scripted backend has no event for it
            await asyncio.sleep(0.002)
        second = await client.post(EMBED, json={"input": [7] * 489})
        gate.set()
        await running

    assert second.status_code == 429
    assert "has 488 left of 1000" in second.json()["error"]["message"]


def test_a_model_that_was_never_in_memory_may_take_a_window_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with limited(Settings(rate_limit_tokens=1000)) as server:
        monkeypatch.setattr(server.backend, "snapshots", tuple)
        alone = server.embed(input="word " * 5000)
        after = server.embed()

    assert (alone.status_code, after.status_code) == (200, 429)


def leave_while_running(server: Limited, body: dict[str, object]) -> None:
    """Send a request, disconnect while it runs, and wait until the server has noticed."""
    text = json.dumps({"model": "cold", **body})
    with open_request(server.url, f"Content-Length: {len(text)}\r\n\r\n{text}"):
        wait_for(server, 1)
    while inside(server):
        time.sleep(0.002)


@pytest.mark.parametrize(("is_ready", "left"), [(True, 39), (False, 99)])
def test_a_client_that_leaves_pays_for_what_may_have_run(
    monkeypatch: pytest.MonkeyPatch, is_ready: bool, left: int
) -> None:
    with limited(Settings(rate_limit_tokens=100)) as server:
        server.backend.gates["cold"] = asyncio.Event()
        server.backend.models += ("cold",) * is_ready
        leave_while_running(server, {"input": [7] * 60})

        assert server.backend.cancelled == ["cold"]
        assert told(server.embed(), "tokens")[:2] == ("100", str(left))


@pytest.mark.parametrize(
    ("call", "longest", "tokens"),
    [
        ({"texts": ("a" * 400,)}, None, 102),
        ({"texts": ("a" * 400, "b")}, 64, 67),
        ({"texts": ("学" * 400,)}, None, 302),
        ({"texts": ("é" + "a" * 399,)}, None, 103),
        ({"texts": ("\ud800" * 8,)}, None, 8),
        ({"texts": ("a" * 40,) * 3, "prompt": "p" * 400}, None, 336),
        ({"texts": ("a" * 40,) * 3, "instruction": "p" * 400}, None, 336),
        ({"token_ids": ((1, 2, 3), (4,))}, None, 4),
        ({"token_ids": ((1, 2, 3), (4,))}, 2, 3),
    ],
)
def test_tokens_are_estimated_from_bytes(call: dict[str, Any], longest: int | None, tokens: int) -> None:
    assert estimate_tokens(EmbedCall(model_id="m", **call), longest) == tokens


def open_request(url: str, head: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5)
    connection.sendall(f"POST {EMBED} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
    return connection


def test_a_refusal_does_not_wait_for_the_body(three: Limited) -> None:
    for _ in range(3):
        three.embed()
    with open_request(three.url, "Content-Length: 1000000") as connection:
        answer = b""
        while b"rate_limit_exceeded" not in answer:
            received = connection.recv(4096)
            assert received
            answer += received

    assert answer.startswith(b"HTTP/1.1 429 ")


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Limited]:
    """A server with two concurrent requests for `web`, three in total."""
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"max_concurrent": 2}, "lab": {}, "ops": {"scopes": ["admin"]}})
    with limited(Settings(keys_file=keys, max_concurrent_requests=3, concurrency_timeout_s=0)) as server:
        server.backend.delays_s["cold"] = 0.4
        yield server


def wait_for(server: Limited, running: int) -> None:
    while server.backend.running["cold"] < running:
        time.sleep(0.002)


def inside(server: Limited) -> int:
    limiter: Limiter = server.app.state.limiter
    return limiter.concurrency.num_running


def test_a_key_has_so_many_requests_at_once_and_so_has_the_server(few: Limited) -> None:
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(few.embed, "web", model="cold") for _ in range(2)]
        wait_for(few, 2)
        of_key = few.embed("web")
        running.append(threads.submit(few.embed, "lab", model="cold"))
        wait_for(few, 3)
        of_server = few.embed("lab")
        operator = few.client.get("/admin/models", headers=bearer("ops"))
    after = few.embed("web")

    assert [job.result().status_code for job in running] == [200, 200, 200]
    assert (of_key.status_code, of_server.status_code) == (429, 429)
    assert of_key.json()["error"] == {
        "message": "Concurrency limit reached: this key has 2 of 2 requests running; wait for a response before the "
        "next request",
        "type": "rate_limit_error",
        "param": None,
        "code": "too_many_requests",
    }
    assert (
        of_server.json()["error"]["message"]
        == "Concurrency limit reached: 3 requests running (MAX_CONCURRENT_REQUESTS=3); retry"
    )
    assert (of_server.headers["retry-after"], of_server.headers["retry-after-ms"]) == ("1", "1000")
    assert (operator.status_code, after.status_code) == (200, 200)


def test_a_key_with_one_request_at_once_may_send_one_after_the_other(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"max_concurrent": 1}})
    with limited(Settings(keys_file=keys)) as server:
        statuses = {server.embed("web").status_code for _ in range(60)}

    assert statuses == {200}


def test_however_a_request_ends_its_place_is_freed(few: Limited) -> None:
    few.backend.failures["BAAI/bge-m3"] = RuntimeError("broken")
    for _ in range(2):
        assert few.embed("web", input=[]).status_code == 400
        assert few.embed("web", model="nothing").status_code == 404
        assert few.embed("web", model="BAAI/bge-m3").status_code == 500
        body = json.dumps({"input": "a", "model": "cold"})
        head = f"Authorization: {bearer('web')['authorization']}\r\nContent-Length: {len(body)}"
        with open_request(few.url, f"{head}\r\n\r\n{body}"):
            wait_for(few, 1)
        with open_request(few.url, f"{head}0\r\n\r\n{body}"):
            pass
        while inside(few):
            time.sleep(0.002)

    assert few.embed("web").status_code == 200


def test_a_request_refused_before_its_body_is_read_costs_nothing_of_the_window(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"max_concurrent": 1, "requests_per_minute": 2}})
    with limited(Settings(keys_file=keys)) as server, ThreadPoolExecutor() as threads:
        server.backend.delays_s["cold"] = 0.2
        running = threads.submit(server.embed, "web", model="cold")
        wait_for(server, 1)
        refused = [server.embed("web").json()["error"]["code"] for _ in range(3)]
        first = running.result()
        second = server.embed("web")

    assert refused == ["too_many_requests"] * 3
    assert (told(first, "requests")[1], told(second, "requests")[1]) == ("1", "0")


async def test_32_keys_at_once_get_what_is_theirs_in_every_window(tmp_path: Path) -> None:
    limits = {f"k{index}": 2 + index // 4 for index in range(32)}
    keys = write_keys(tmp_path / "keys.yaml", {name: {"requests_per_minute": n} for name, n in limits.items()})
    clock = FakeClock()
    app = create_app(Settings(keys_file=keys), REGISTRY, ScriptedBackend("mini"), limit_clock=clock)
    admitted: Counter[tuple[str, int]] = Counter()

    async def ask(client: httpx.AsyncClient, name: str, window: int) -> None:
        """Send a request for more than half of the limit."""
        for _ in range(limits[name] // 2 + 1):
            answer = await client.post(EMBED, json={"input": "a"}, headers=bearer(name))
            assert answer.status_code in (200, 429)
            admitted[name, window] += answer.status_code == 200

    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        for window in range(2):
            for _ in range(3):
                await asyncio.gather(*(ask(client, name, window) for name in limits))
                clock.advance(20.0001)

    assert {(name, window): admitted[name, window] for name in limits for window in range(2)} == {
        (name, window): limit for name, limit in limits.items() for window in range(2)
    }


def test_the_openai_client_waits_for_retry_after() -> None:
    with limited(Settings(rate_limit_requests=1, rate_limit_window_s=1)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as impatient:
            impatient.embeddings.create(model="mini", input="a")
            with pytest.raises(openai.RateLimitError) as caught:
                impatient.embeddings.create(model="mini", input="a")
        with ThreadPoolExecutor() as threads, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as patient:
            waiting = threads.submit(patient.embeddings.create, model="mini", input="a")
            while len(server.backend.calls) < 1 or not waiting.running():
                time.sleep(0.002)
            server.clock.advance(1.1)
            answer = waiting.result()

    assert caught.value.code == "rate_limit_exceeded"
    assert len(answer.data) == 1


def test_browsers_may_read_what_is_left() -> None:
    with limited(Settings(rate_limit_requests=3, cors_origins=("https://a.example",))) as server:
        answer = server.client.post(EMBED, json={"input": "a"}, headers={"origin": "https://a.example"})

    assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"]


def test_callers_without_a_key_are_known_by_their_address(three: Limited) -> None:
    def ask(address: str) -> int:
        return three.client.post(EMBED, json={"input": "a"}, headers={"x-forwarded-for": address}).status_code

    first = [ask("203.0.113.7") for _ in range(4)]
    other = ask("203.0.113.8")

    assert first == [200, 200, 200, 429]
    assert other == 200


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "address:192.0.2.1"),
        ("::ffff:192.0.2.1", "address:192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "address:2001:db8:1:2::/64"),
        ("unknown", "address:unknown"),
    ],
)
def test_an_address_is_a_subscriber(address: str, name: str) -> None:
    assert caller_of(ANONYMOUS, address, Settings()).name == name


def test_a_keys_own_limits_win_over_the_servers() -> None:
    settings = Settings(rate_limit_requests=100, rate_limit_tokens=5000, rate_limit_window_s=3600)
    plain = Key(id="web", digest=b"d", scopes=frozenset())
    own = Key(id="web", digest=b"d", scopes=frozenset(), requests_per_minute=7, tokens_per_minute=9, max_concurrent=2)

    assert caller_of(plain, "::1", settings) == Caller("key:web", "this key", Limit(100, 3600), Limit(5000, 3600))
    assert caller_of(own, "::1", settings) == Caller("key:web", "this key", Limit(7, 60), Limit(9, 60), 2)
    assert caller_of(plain, "::1", Settings()) == Caller("key:web", "this key")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.mark.parametrize(("mode", "status"), [("open", 200), ("closed", 429)])
def test_a_storage_that_is_down_fails_as_the_settings_say(mode: str, status: int) -> None:
    pytest.importorskip("redis")
    uri = f"async+redis://:hunter2@127.0.0.1:{free_port()}"
    settings = Settings(rate_limit_requests=3, rate_limit_tokens=9, rate_limit_storage=uri, rate_limit_on_error=mode)
    with capture_logs() as lines, limited(settings) as server:
        before = server.client.get("/metrics").text
        answers = [server.embed() for _ in range(5)]
        after = server.client.get("/metrics").text

    assert [answer.status_code for answer in answers] == [status] * 5
    assert "embedyard_limit_storage_up 1.0" in before
    assert "embedyard_limit_storage_up 0.0" in after
    assert [line["event"] for line in lines if line["event"].startswith("limits.")] == ["limits.storage_down"]
    assert "hunter2" not in str(lines) + "".join(answer.text for answer in answers)
    if status == 429:
        assert answers[0].json()["error"]["code"] == "rate_limit_exceeded"
        assert answers[0].headers["retry-after"] == "1"


def test_a_storage_that_is_down_does_not_matter_to_those_without_limits(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"requests_per_minute": 3}, "free": {}})
    uri = f"async+redis://127.0.0.1:{free_port()}"
    with limited(Settings(keys_file=keys, rate_limit_storage=uri, rate_limit_on_error="closed")) as server:
        assert (server.embed("web").status_code, server.embed("free").status_code) == (429, 200)


@needs_redis
def test_a_redis_that_hangs_keeps_one_request_waiting_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        settings = Settings(rate_limit_requests=1000, rate_limit_tokens=100_000, rate_limit_storage=redis.uri)
        with limited(settings) as server:
            before = server.embed()
            redis.pause()
            first = server.embed()
            monkeypatch.setattr(limit_store, "STORE_TIMEOUT_S", 1000.0)  # who asks Redis from now on does not come back
            until_s, statuses = time.monotonic() + 2 * PROBE_INTERVAL_S, set()
            while time.monotonic() < until_s:
                statuses.add(server.embed().status_code)
    finally:
        redis.stop()

    assert "x-ratelimit-limit-tokens" in before.headers
    assert (first.status_code, statuses) == (200, {200})


@needs_redis
def test_servers_with_one_redis_count_together(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"web": {"requests_per_minute": 20, "tokens_per_minute": 1_000_000}})
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        settings = Settings(keys_file=keys, rate_limit_storage=redis.uri)
        with limited(settings) as one, limited(settings) as two, ThreadPoolExecutor(8) as threads:
            statuses = Counter(
                threads.map(lambda index: (one, two)[index % 2].embed("web", input="abc").status_code, range(60))
            )
            last = one.embed("web")
    finally:
        redis.stop()

    assert statuses == {200: 20, 429: 40}
    assert told(last, "requests")[:2] == ("20", "0")
    assert 999_800 <= int(last.headers["x-ratelimit-remaining-tokens"]) <= 1_000_000
