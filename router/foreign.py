"""Requests that a web page sends behind its reader's back, to a server that needs no key. Pure.

Browsers let any page send simple requests to 127.0.0.1, and by rebinding a name of its own to that address (DNS
rebinding) a page can read the answers, too. A key stops both, because no page knows it; where none is needed, the two
headers that a page cannot choose are looked at instead.
"""

from urllib.parse import urlsplit

from router.settings import Settings
from router.settings_values import is_loopback

_NAME = (
    "This server listens on its own machine only and needs no key, so it answers to that machine's names only, and "
    "not to {host!r}: ask 127.0.0.1 or localhost. Or set API_KEY, or ALLOW_ANONYMOUS=true if every name shall do."
)
_PAGE = (
    "This server needs no key, so it takes no requests from pages of {origin!r}: set CORS_ORIGINS to let them in, or "
    "API_KEY."
)


def why_foreign(settings: Settings, host: str, origin: str) -> str:
    """Why a request without a key is refused; empty when it is not.

    Args:
        host, origin: the headers; browsers always send the first, and nothing but browsers the second.
    """
    knows_its_names = settings.is_loopback and not settings.allow_anonymous
    if host and knows_its_names and not is_loopback(_hostname(f"//{host}")):
        return _NAME.format(host=host[:100])
    if origin and not ({"*", origin.rstrip("/")} & set(settings.cors_origins)) and not _is_own(origin, host):
        return _PAGE.format(origin=origin[:100])
    return ""


def _is_own(origin: str, host: str) -> bool:
    """A proxy may have taken the port away from `host`."""
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:  # http://[
        return False
    return netloc == host or (_has_no_port(host) and _hostname(origin) == _hostname(f"//{host}"))


def _has_no_port(host: str) -> bool:
    return not host.rpartition("]")[2].count(":")


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
