"""Attacks on the HTTP layer, and the security headers of every response."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from litestar import Litestar

from engines.hub.client import HubConfig
from router.app import create_app
from router.auth.keys import Key
from router.config.settings import Settings
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY, Served, serve, serve_fake, serving_in_thread

SECRET = "ey-hunter-secret"
GUARDS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
BODY = {"input": "a"}
HOSTILE = (
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "mini%2f..%2f..", "file:%2f%2f%2fetc",
    "%00", "mini%00", "%ff%fe", "mini%0d%0aset-cookie:%20a=b", "%3Cscript%3Ealert(1)%3C%2Fscript%3E", "{{7*7}}",
    "a" * 5000, "C:%5Cwindows",
)  # fmt: skip
"""Model ids that would reach a file, a header or a page, if ids ever reached one."""
ROUTES = ("/v1/models/{}", "/admin/models/{}", "/m/{}/v1/embeddings", "/admin/models/{}/preload", "/dashboard/{}")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(host="0.0.0.0", api_key=SECRET, cors_origins=("https://a.example",)))


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/embeddings"), ("GET", "/metrics"), ("GET", "/nothing"),
     ("PUT", "/v1/models"), ("GET", "/admin/memory"), ("GET", "/docs/openapi.json")],
)  # fmt: skip
@pytest.mark.parametrize("key", [SECRET, "wrong"])
def test_every_answer_carries_the_guards(keyed: Served, method: str, path: str, key: str) -> None:
    answer = keyed.client.request(method, path, json=BODY, headers={"authorization": f"Bearer {key}"})

    assert {name: answer.headers.get_list(name) for name in GUARDS} == {
        name: [value] for name, value in (GUARDS | _own(path, answer)).items()
    }


def _own(path: str, answer: httpx.Response) -> dict[str, str]:
    """The documentation has its own content security policy."""
    return {"content-security-policy": answer.headers["content-security-policy"]} if path.startswith("/docs") else {}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_may_load_only_what_this_server_sends(keyed: Served, path: str) -> None:
    policies = keyed.client.get(path).headers.get_list("content-security-policy")

    assert len(policies) == 1
    assert "default-src 'none'" in policies[0] or "default-src 'self'" in policies[0]
    assert "unsafe-eval" not in policies[0]
    assert "frame-ancestors 'none'" in policies[0]
    assert "http" not in policies[0]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: name[:24])
@pytest.mark.parametrize("route", ROUTES)
def test_a_hostile_id_is_nothing_but_an_unknown_name(keyed: Served, route: str, name: str) -> None:
    method = "POST" if route.endswith(("embeddings", "preload")) else "GET"
    status, head, body = raw(keyed.url, f"{method} {route.format(name)} HTTP/1.1", json.dumps(BODY))
    code = json.loads(body)["error"]["code"]

    assert (status, code) in {(404, "model_not_found"), (404, "not_found"), (405, "method_not_allowed")}
    assert "set-cookie" not in head
    assert len(body) < 1500
    for secret in ("root:", "Traceback", "site-packages"):
        assert secret not in body


def raw(url: str, request_line: str, body: str) -> tuple[int, str, str]:
    """Send raw bytes: a client would normalize the path first."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as client:
        client.sendall(
            f"{request_line}\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        )
        received = b""
        while piece := client.recv(65536):
            received += piece
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), content.decode()


def test_no_path_is_remembered_at_any_length() -> None:
    """Litestar caches 1,024 paths, which at 64 KiB each, percent-encoded, would take 200 MB."""
    paths: list[str] = []
    app = create_app(Settings(), REGISTRY, ScriptedBackend("mini"))
    route = app.asgi_router.handle_routing

    def handle_routing(path: str, method: Any) -> Any:
        paths.append(path)
        return route(path=path, method=method)

    app.asgi_router.handle_routing = handle_routing  # type: ignore[assignment]  # a spy
    with serving_in_thread(app) as url:
        answers = [
            httpx.get(f"{url}{path}") for path in ("/v1/models/" + "%C3%A9" * 9000, "/dashboard/" + "a" * 60_000)
        ]

    assert [answer.status_code for answer in answers] == [404, 404]
    assert max(map(len, paths)) < 2**14


def test_the_server_itself_refuses_a_head_without_end_and_what_is_no_http() -> None:
    """`embedyard serve`, not a protocol wired up by a test."""
    with serve_fake("0", "1") as server:
        parts, answer = urlsplit(server.url), httpx.get(f"{server.url}/health")
        told = []
        for sent in (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 12_000, b"\x16\x03\x01 TLS?\r\n\r\n"):
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as client:
                client.sendall(sent)
                told.append(client.recv(65536))

    assert "server" not in answer.headers
    assert [refusal.split()[1] for refusal in told] == [b"431", b"400"]
    assert all(b'"code":"invalid_value"' in refusal for refusal in told)


def test_nothing_that_holds_a_secret_shows_it() -> None:
    settings = Settings(
        host="0.0.0.0",
        api_key=SECRET,
        admin_api_key=f"{SECRET}-2",
        rate_limit_storage=f"async+redis://:{SECRET}@cache:6379",
    )
    app = create_app(settings, REGISTRY, ScriptedBackend("mini"))
    holders = [settings, Key.of("web", SECRET, "embed"), HubConfig(token=SECRET), *_parts(app)]

    for holder in holders:
        for shown in (
            repr(holder),
            str(holder),
            f"{holder!r}",
            repr(vars(holder)) if hasattr(holder, "__dict__") else "",
        ):
            assert SECRET not in shown, type(holder).__name__


def _parts(app: Litestar) -> list[object]:
    state = app.state
    return [
        app,
        state,
        state.server_state,
        state.server_state.keyring,
        *state.server_state.keyring.keys,
        state.limiter,
        state.limiter.store,
    ]
