"""Tests HEAD: the answer of GET without its body."""

import httpx
import pytest
from litestar import Litestar
from structlog.testing import capture_logs

from tests.testkit.servers import Served, serving

OWN = {"date", "x-request-id", "content-length"}
"""Headers that differ between answers."""


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/ready", "/metrics", "/docs", "/docs/openapi.json", "/v1/models", "/v1/models/mini", "/info",
     "/admin/models", "/api/tags", "/v1/models/none", "/nothing"],
)  # fmt: skip
def test_it_has_the_head_of_get(served: Served, path: str) -> None:
    get, head = (served.client.request(method, path) for method in ("GET", "HEAD"))

    assert head.status_code == get.status_code
    assert head.content == b""
    assert {name: value for name, value in head.headers.items() if name not in OWN} == {
        name: value for name, value in get.headers.items() if name not in OWN
    }
    assert "content-length" in head.headers


@pytest.mark.parametrize("path", ["/v1/embeddings", "/admin/models/mini/evict", "/embed"])
def test_what_cannot_be_got_has_no_head(served: Served, path: str) -> None:
    head = served.client.head(path)

    assert (head.status_code, head.content) == (405, b"")
    assert "POST" in head.headers["allow"]
    assert served.backend.commands == []


async def test_the_head_of_a_stream_is_whole_and_ends_it(app: Litestar) -> None:
    """A stream that stays open would keep the connection and delay the shutdown."""
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        with capture_logs() as lines:
            head = await client.head("/admin/events")
            after = await client.get("/health")

    assert head.headers["content-type"].startswith("text/event-stream")
    assert (head.status_code, after.status_code) == (200, 200)
    assert [line["method"] for line in lines if line["event"] == "request.done"][:1] == ["HEAD"]
