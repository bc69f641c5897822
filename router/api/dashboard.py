"""`GET /`: the dashboard and its files. They need no key; the data that the page fetches needs the scope `admin`.

The page is plain HTML, CSS and ES modules in `router/dashboard/page/`, served unchanged.
"""

from functools import cache
from pathlib import Path
from typing import Any

from litestar import Controller, Request, Response, get
from litestar.exceptions import NotAuthorizedException, NotFoundException
from litestar.params import FromPath

from router.api.assets import Asset
from router.server.state import ServerState, state_of

_PAGE = Path(__file__).parent.parent / "dashboard" / "page"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_GUARDED, _OPEN = "index.html", "index.html for everyone"
_OLLAMA_RUNS = b"Ollama is running"
_MARKS = (b'data-admin="key"', b'data-admin="open"')


class DashboardController(Controller):
    """The page and its files."""

    include_in_schema = False

    @get("/")
    async def page(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Serves the page and tells it if a key is needed: a try without one would log an error in the browser.

        Ollama's clients get what they ask this path for: a sign that the server runs.
        """
        if _is_ollamas_client(request):
            return Response(_OLLAMA_RUNS, media_type="text/plain; charset=utf-8")
        return _assets()[_OPEN if _is_open(state_of(request)) else _GUARDED].answer(request, _HEADERS)

    @get("/dashboard/{name:str}")
    async def asset(self, request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        """Serves a style sheet, a module or the icon."""
        if name not in _assets():
            raise NotFoundException
        return _assets()[name].answer(request, _HEADERS)


def _is_ollamas_client(request: Request[Any, Any, Any]) -> bool:
    """Whether a client asks for text or JSON, but for no page; browsers always ask for one, and curl for anything."""
    accepted = request.headers.get("accept", "").lower()
    asks_for_text = "text/plain" in accepted or "application/json" in accepted
    return asks_for_text and "text/html" not in accepted and "ollama" in state_of(request).settings.skins


def _is_open(server_state: ServerState) -> bool:
    try:
        server_state.keyring.admit(None, "admin")
    except NotAuthorizedException:
        return False
    return True


@cache
def _assets() -> dict[str, Asset]:
    """Return all files by name. Only these names are served, so no path reaches another file."""
    found = {path.name: Asset.of(path.read_bytes(), path.suffix) for path in _PAGE.iterdir()}
    return found | {_OPEN: Asset.of((_PAGE / _GUARDED).read_bytes().replace(*_MARKS), ".html")}
