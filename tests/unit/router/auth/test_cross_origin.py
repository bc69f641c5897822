"""Tests requests that web pages of other origins send to a server without keys."""

from collections.abc import Iterator

import httpx
import pytest

from router.auth.guards import reject_cross_origin
from router.config.settings import Settings
from tests.testkit.servers import Served, serve

OPEN = Settings()
EVERYONE = Settings(host="0.0.0.0", allow_anonymous=True)
EVICT = "/admin/models/mini/evict"


@pytest.mark.parametrize(
    ("settings", "host", "origin"),
    [
        (OPEN, "127.0.0.1:6008", ""),
        (OPEN, "localhost:6008", ""),
        (OPEN, "[::1]:6008", ""),
        (OPEN, "", ""),
        (OPEN, "127.0.0.1:6008", "http://127.0.0.1:6008"),
        (OPEN, "localhost", "https://localhost:8443"),
        (Settings(cors_origins=("https://a.example",)), "127.0.0.1:6008", "https://a.example"),
        (Settings(cors_origins=("*",)), "127.0.0.1:6008", "null"),
        (Settings(allow_anonymous=True), "server.example.com", ""),
        (EVERYONE, "10.0.0.5:6008", ""),
        (EVERYONE, "server.example.com", "https://server.example.com"),
        (EVERYONE, "server.example.com", "https://server.example.com:8443"),
    ],
)
def test_own_pages_and_programs_are_allowed(settings: Settings, host: str, origin: str) -> None:
    assert reject_cross_origin(settings, host, origin) == ""


@pytest.mark.parametrize(
    ("settings", "host", "origin", "part"),
    [
        (OPEN, "evil.example:6008", "", "'evil.example:6008'"),
        (OPEN, "127.0.0.1.evil.example", "", "ALLOW_ANONYMOUS=true"),
        (OPEN, "[::1", "", "localhost"),
        (OPEN, "127.0.0.1:" + "0" * 300, "", "localhost"),
        (OPEN, "evil.example:6008", "http://evil.example:6008", "localhost"),
        (OPEN, "127.0.0.1:6008", "https://evil.example", "CORS_ORIGINS"),
        (OPEN, "127.0.0.1:6008", "http://127.0.0.1:8888", "CORS_ORIGINS"),
        (OPEN, "127.0.0.1:6008", "null", "API_KEY"),
        (OPEN, "127.0.0.1:6008", "http://[", "CORS_ORIGINS"),
        (OPEN, "127.0.0.1", "http://[::1", "CORS_ORIGINS"),
        (OPEN, "127.0.0.1", "http://\u2100.example", "CORS_ORIGINS"),
        (EVERYONE, "server.example.com", "https://evil.example", "CORS_ORIGINS"),
        (Settings(cors_origins=("https://a.example",)), "127.0.0.1", "https://b.example", "CORS_ORIGINS"),
    ],
)
def test_a_refusal_names_the_setting_that_would_allow_it(settings: Settings, host: str, origin: str, part: str) -> None:
    assert part in reject_cross_origin(settings, host, origin)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(api_key="k"))


def test_a_page_can_neither_load_models_nor_embed(served: Served) -> None:
    simple = {"origin": "https://evil.example", "content-type": "text/plain"}
    moved = served.client.post(EVICT, content=b"{}", headers=simple)
    embedded = served.client.post("/v1/embeddings", content=b'{"input": "a"}', headers=simple)
    rebound = served.client.get("/admin/models", headers={"host": "evil.example"})

    for answer in (moved, embedded, rebound):
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
    assert served.backend.commands == []
    assert served.backend.calls == []


@pytest.mark.parametrize(
    "origin", ["http://[", "http://[::1", "http://]", "http://a]:b[", "://", "\xff", "http://\xbd"]
)
def test_an_origin_that_is_no_address_is_refused(served: Served, origin: str) -> None:
    answer = served.client.get("/v1/models", headers={b"origin": origin.encode("latin-1")})

    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize(
    "headers", [{"origin": "https://evil.example"}, {"host": "evil.example"}, {"origin": "http://["}]
)
def test_a_page_reads_no_metrics(served: Served, keyed: Served, headers: dict[str, str]) -> None:
    """Metrics need no key on loopback, but web pages may not read them."""
    refused = served.client.get("/metrics", headers=headers)
    without_key = keyed.client.get("/metrics", headers=headers)
    with_key = keyed.client.get("/metrics", headers=headers | {"authorization": "Bearer k"})

    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert [without_key.status_code, with_key.status_code] == [401, 200]
    assert [server.client.get("/metrics").status_code for server in (served, keyed)] == [200, 200]


def test_the_page_of_the_server_itself_can(served: Served) -> None:
    answer = served.client.post(EVICT, json={}, headers={"origin": served.url})

    assert answer.status_code == 200


def test_with_a_key_it_does_not_matter_where_a_request_comes_from(keyed: Served) -> None:
    headers = {"authorization": "Bearer k", "origin": "https://a.example", "host": "server.example.com"}

    assert keyed.client.get("/admin/models", headers=headers).status_code == 200
    assert httpx.get(f"{keyed.url}/admin/models", headers={"origin": "https://a.example"}).status_code == 401
