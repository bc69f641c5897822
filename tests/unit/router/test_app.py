"""The composition root: what is put together only when the settings ask for it."""

import httpx
import pytest
from litestar import Litestar

from router.app import create_app
from router.config.settings import Settings
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY, serving

ORIGIN = "https://app.example.com"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization",
}


def keyed(*origins: str) -> Litestar:
    return create_app(Settings(api_key="k", cors_origins=origins), REGISTRY, ScriptedBackend("mini"))


async def test_browsers_of_named_origins_may_call() -> None:
    async with serving(keyed(ORIGIN)) as url, httpx.AsyncClient(base_url=url) as client:
        asked = await client.options("/v1/embeddings", headers=PREFLIGHT)
        answer = await client.post(
            "/v1/embeddings", json={"input": "a"}, headers={"origin": ORIGIN, "authorization": "Bearer k"}
        )
        refused = await client.post("/v1/embeddings", json={"input": "a"}, headers={"origin": ORIGIN})
        stranger = await client.options("/v1/embeddings", headers=PREFLIGHT | {"origin": "https://else.example"})

    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert (answer.status_code, refused.status_code) == (200, 401)
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in stranger.headers
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (400, "invalid_value")
    assert "https://else.example" in stranger.json()["error"]["message"]
    assert "x-request-id" in stranger.headers


@pytest.mark.parametrize("path", ["/v1/embeddings", "/admin/memory"])
async def test_browsers_may_not_call_unless_an_origin_is_allowed(path: str) -> None:
    async with serving(keyed()) as url, httpx.AsyncClient(base_url=url) as client:
        asked = await client.options(path, headers=PREFLIGHT)

    assert "access-control-allow-origin" not in asked.headers
