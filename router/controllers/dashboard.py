"""`GET /` and the files of its page, open to everyone: the data behind it needs a key with the scope `admin`.

Knows no models. The page is plain HTML, CSS and ES modules in `router/dashboard/page/`, sent as they are.
"""

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.exceptions import NotAuthorizedException, NotFoundException
from litestar.params import FromPath, HeaderParameter
from msgspec import Struct

from router.yard import Yard

_PAGE = Path(__file__).parent.parent / "dashboard" / "page"
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",  # asked for again each time, and mostly answered with 304: a new server, a new page
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

IfNoneMatch = Annotated[str, HeaderParameter(name="If-None-Match")]


_GUARDED, _OPEN = "index.html", "index.html for everyone"
_MARKS = (b'data-admin="key"', b'data-admin="open"')


class Asset(Struct, frozen=True):
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


class DashboardController(Controller):
    """The page, and what it is made of."""

    include_in_schema = False

    @get("/")
    async def page(self, yard: NamedDependency[Yard], if_none_match: IfNoneMatch = "") -> Response[bytes]:
        """The dashboard. It is told whether a key is needed: to find out by a refusal would be an error in its log."""
        return _answer(_OPEN if _is_open(yard) else _GUARDED, if_none_match)

    @get("/dashboard/{name:str}")
    async def asset(self, name: FromPath[str], if_none_match: IfNoneMatch = "") -> Response[bytes]:
        """A style sheet, a module or the icon."""
        return _answer(name, if_none_match)


def _is_open(yard: Yard) -> bool:
    try:
        yard.keyring.admit(None, "admin")
    except NotAuthorizedException:
        return False
    return True


def _answer(name: str, known_etag: str) -> Response[bytes]:
    asset = _assets().get(name)
    if asset is None:
        raise NotFoundException
    is_known = known_etag == asset.etag
    return Response(
        b"" if is_known else asset.content,
        status_code=304 if is_known else 200,
        media_type=asset.media_type,
        headers=_HEADERS | {"etag": asset.etag},
    )


@cache
def _assets() -> dict[str, Asset]:
    """Every file by its name; a name that is not among them reaches no file."""
    found = {path.name: _asset(path.read_bytes(), path.suffix) for path in _PAGE.iterdir()}
    return found | {_OPEN: _asset((_PAGE / _GUARDED).read_bytes().replace(*_MARKS), ".html")}


def _asset(content: bytes, suffix: str) -> Asset:
    return Asset(content, _MEDIA_TYPES[suffix], f'"{sha256(content).hexdigest()[:16]}"')
