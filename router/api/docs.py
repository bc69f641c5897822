"""`/docs` and `/docs/openapi.json`, with no internet: the assets lie in `router/dashboard/`."""

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

from litestar import Request, Response, Router, get
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.params import FromPath

from router.api.assets import Asset
from router.api.openapi import TrueDocument
from router.version import embedyard_version

_DASHBOARD = Path(__file__).parent.parent / "dashboard"
_ASSETS = {
    "swagger-ui.css": "vendor/swagger-ui/swagger-ui.css",
    "swagger-ui-bundle.js": "vendor/swagger-ui/swagger-ui-bundle.js",
    "favicon.png": "vendor/swagger-ui/favicon-32x32.png",
    "docs.js": "docs/docs.js",
}
_PAGE = "docs/index.html"
_ONLY_OURS = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DESCRIPTION = (
    "Embeddings of many models behind OpenAI's API. Every failure has the same envelope and every answer carries "
    "`x-request-id`. 429 and 503 say in `Retry-After` and `retry-after-ms` when to ask again; `x-should-retry: false` "
    "stands where that would not help."
)


class SwaggerPage(OpenAPIRenderPlugin):
    """Swagger UI from our own files; Litestar's plugin links to a CDN."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return _read(_PAGE)

    def receive_router(self, router: Router) -> None:
        router.register(docs_asset)


@get("/assets/{name:str}")
async def docs_asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """One file of the page."""
    if name not in _ASSETS:
        raise NotFoundException
    asset = await asyncio.to_thread(_asset, _ASSETS[name])  # the first time, packing the largest takes 0.1 s
    return asset.answer(request, {})


@cache
def _asset(path: str) -> Asset:
    return Asset.of(_read(path), Path(path).suffix)


def _read(path: str) -> bytes:
    return (_DASHBOARD / path).read_bytes()


def _in_our_envelope(response: Response[Any]) -> Response[Any]:
    """Litestar answers unknown paths below its documentation with a page of its own."""
    if response.status_code == 404:
        raise NotFoundException
    response.headers.setdefault("content-security-policy", _ONLY_OURS)
    return response


def openapi_config() -> OpenAPIConfig:
    """The document is generated from the handlers and the wire Structs."""
    return OpenAPIConfig(
        title="Embedyard",
        version=embedyard_version(),
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, *_: handler.handler_name,
        openapi_router=Router("/docs", route_handlers=[], include_in_schema=False, after_request=_in_our_envelope),
        render_plugins=[SwaggerPage(), TrueDocument()],
        components=Components(
            security_schemes={"BearerToken": SecurityScheme(type="http", scheme="bearer", description="API_KEY")}
        ),
        tags=[
            Tag(name="embeddings", description="Texts in, vectors out."),
            Tag(name="skins", description="The same for clients of other servers; `SKINS` switches each off."),
            Tag(name="models", description="What may be served."),
            Tag(name="admin", description="What is in memory; needs a key with the scope `admin`."),
            Tag(name="health", description="For probes; open."),
        ],
    )
