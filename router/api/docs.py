"""`/docs` and `/docs/openapi.json`. They need no internet: the assets are in `router/dashboard/`."""

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
from router.api.openapi import OpenApiJson
from router.version import embedyard_version

_DASHBOARD = Path(__file__).parent.parent / "dashboard"
_ASSETS = {
    "swagger-ui.css": "vendor/swagger-ui/swagger-ui.css",
    "swagger-ui-bundle.js": "vendor/swagger-ui/swagger-ui-bundle.js",
    "favicon.png": "vendor/swagger-ui/favicon-32x32.png",
    "docs.js": "docs/docs.js",
    "chinese.js": "docs/chinese.js",
}
_PAGE = "docs/index.html"
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DESCRIPTION = (
    "Embeddings of many models with OpenAI's API. Every error has the same envelope, and every response has the header "
    "`x-request-id`. Responses 429 and 503 say in `Retry-After` and `retry-after-ms` when to retry; "
    "`x-should-retry: false` means that a retry would fail again."
)


class SwaggerPage(OpenAPIRenderPlugin):
    """Renders Swagger UI with local files; Litestar's plugin links to a CDN."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return _read(_PAGE)

    def receive_router(self, router: Router) -> None:
        router.register(docs_asset)


@get("/assets/{name:str}")
async def docs_asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Serves one file of the page."""
    if name not in _ASSETS:
        raise NotFoundException
    asset = await asyncio.to_thread(_asset, _ASSETS[name])  # compressing the largest takes 0.1 s, once
    return asset.answer(request, {})


@cache
def _asset(path: str) -> Asset:
    return Asset.of(_read(path), Path(path).suffix)


def _read(path: str) -> bytes:
    return (_DASHBOARD / path).read_bytes()


def _after_request(response: Response[Any]) -> Response[Any]:
    """Answer unknown paths below /docs with the error envelope; Litestar sends a page of its own."""
    if response.status_code == 404:
        raise NotFoundException
    response.headers.setdefault("content-security-policy", _CONTENT_SECURITY_POLICY)
    return response


def openapi_config() -> OpenAPIConfig:
    """Configure the OpenAPI document, which is generated from the handlers and the schemas."""
    return OpenAPIConfig(
        title="Embedyard",
        version=embedyard_version(),
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, *_: handler.handler_name,
        openapi_router=Router("/docs", route_handlers=[], include_in_schema=False, after_request=_after_request),
        render_plugins=[SwaggerPage(), OpenApiJson()],
        components=Components(
            security_schemes={"BearerToken": SecurityScheme(type="http", scheme="bearer", description="API_KEY")}
        ),
        tags=[
            Tag(name="embeddings", description="Compute vectors of texts."),
            Tag(name="rerank", description="Compute scores and labels; embedding models give cosines."),
            Tag(name="batches", description="Files and batches, as OpenAI has them; `DATA_DIR` turns them on."),
            Tag(name="models", description="The models in the registry."),
            Tag(
                name="admin", description="Models in memory and operator commands; needs a key with the scope `admin`."
            ),
            Tag(name="health", description="Probes; no key needed."),
            Tag(name="skins", description="The APIs of other embedding servers; `SKINS` selects them."),
        ],
    )
