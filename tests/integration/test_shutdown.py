"""Tests the shutdown of a server, over real sockets and with real signals: what every client sees."""

import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.testkit.servers import serve_fake, serve_live

EMBED = "/v1/embeddings"
BODY = {"input": "x"}


class Client(threading.Thread):
    """Sends one request after another until it is refused, and records the answers."""

    def __init__(self, connections: httpx.Client) -> None:
        super().__init__()
        self._connections = connections
        self.seen: list[str] = []

    def run(self) -> None:
        while not self.seen or self.seen[-1] == "200":
            self.seen.append(self._ask())

    def _ask(self) -> str:
        try:
            answer = self._connections.post(EMBED, json=BODY)
        except httpx.ConnectError:
            return "connection refused"
        except httpx.HTTPError as error:
            return type(error).__name__
        return "200" if answer.status_code == 200 else f"{answer.status_code} {answer.json()['error']['code']}"


def test_under_64_clients_every_admitted_request_is_answered() -> None:
    with serve_fake("0.2", "10") as server, server.client() as connections:
        clients = [Client(connections) for _ in range(64)]
        for client in clients:
            client.start()
        server.wait_for_leases(64)
        began_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        exit_code = server.popen.wait(15)
        took_s = time.monotonic() - began_s
        for client in clients:
            client.join(15)
        logged = Counter(server.logged())
    last = Counter(client.seen[-1] for client in clients)
    answered = sum(client.seen.count("200") for client in clients)

    assert exit_code == 0
    assert took_s < 10
    assert last == {"503 shutting_down": 64}
    assert answered >= 64
    assert not {"server.forced_end", "pool.grace_over", "request.crashed"} & set(logged)


def test_while_it_drains_it_reports_so_and_serves_what_it_has() -> None:
    with serve_fake("1.5", "10") as server, server.client() as client, ThreadPoolExecutor() as threads:
        slow = threads.submit(httpx.post, server.url + EMBED, json=BODY, timeout=10)
        server.wait_for_leases(1)
        server.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            time.sleep(0.005)
        ready, health = client.get("/ready"), client.get("/health")
        refused, preload = client.post(EMBED, json=BODY), client.post("/admin/models/mini/preload")
        exit_code = server.popen.wait(60)

    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "shutting_down")
    assert health.status_code == 200
    for answer in (refused, preload):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
    assert slow.result().status_code == 200
    assert exit_code == 0


def test_requests_not_done_at_the_end_of_the_grace_time_get_an_error() -> None:
    with serve_fake("60", "0.3") as server, ThreadPoolExecutor() as threads:
        stuck = threads.submit(httpx.post, server.url + EMBED, json=BODY, timeout=10)
        server.wait_for_leases(1)
        server.send_signal(signal.SIGTERM)
        exit_code = server.popen.wait(60)
        logged = server.logged()

    assert (stuck.result().status_code, stuck.result().json()["error"]["code"]) == (503, "shutting_down")
    assert exit_code == 0
    assert "pool.grace_over" in logged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    with serve_fake("60", "30") as server, ThreadPoolExecutor() as threads:
        stuck = threads.submit(httpx.post, server.url + EMBED, json=BODY, timeout=10)
        server.wait_for_leases(1)
        server.send_signal(signal.SIGTERM)
        with server.client() as client:
            while client.get("/ready").status_code == 200:
                time.sleep(0.005)
        began_s = time.monotonic()
        server.send_signal(number)
        exit_code = server.popen.wait(60)
        took_s = time.monotonic() - began_s

    assert exit_code == -number
    assert took_s < 5, "and not after the grace time of 30"
    assert isinstance(stuck.exception(), httpx.RemoteProtocolError)


def test_a_device_that_hangs_fails_health_tells_its_callers_and_cannot_keep_the_process() -> None:
    with serve_fake("60", "0", "hang") as server, server.client() as client:
        before = client.get("/health")
        answer = client.post(EMBED, json=BODY)
        health = client.get("/health")
        server.send_signal(signal.SIGTERM)
        exit_code = server.popen.wait(60)
        logged = server.logged()

    assert before.status_code == 200
    for told in (answer, health):
        assert (told.status_code, told.json()["error"]["code"]) == (503, "device_down")
        assert "has been running for 999 s" in told.json()["error"]["message"]
    assert exit_code == 1
    assert {"device.down", "server.forced_end"} <= set(logged)


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [({}, [404, 429, 429]), ({"FORWARDED_ALLOW_IPS": "127.0.0.1"}, [404, 404, 429])],
    ids=["nobody is trusted", "the proxy is trusted"],
)
def test_only_a_trusted_proxy_sets_the_callers_address(
    tmp_path: Path, settings: dict[str, str], statuses: list[int]
) -> None:
    """uvicorn alone trusts every client on loopback; one that sent another address with each request had no limit."""
    registry = tmp_path / "registry.yaml"
    registry.write_text("version: 1\nmodels:\n- {name: mini, source: org/mini}\n")
    with serve_live(registry, RATE_LIMIT_REQUESTS="1", **settings) as server:
        answers = [
            httpx.post(
                f"{server.url}/v1/embeddings",
                json={"input": "a", "model": "none"},
                headers={"x-forwarded-for": forwarded},
            )
            for forwarded in ("203.0.113.7", "198.51.100.1, 203.0.113.8", "203.0.113.8")
        ]

    assert [answer.status_code for answer in answers] == statuses
