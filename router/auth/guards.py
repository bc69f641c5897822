"""Who may come in: bearer keys, their scopes and their models. Knows no routes; a controller says what it needs.

Keys are kept and compared as SHA-256 digests, each comparison in constant time and all of them always made.
"""

import hmac
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler

from router.auth.keys import ANONYMOUS, Key, Scope, digest_of
from router.config.setting_values import is_loopback
from router.config.settings import Settings
from router.observability.request_context import context_of

_NAME = (
    "This server listens on its own machine only and needs no key, so it answers to that machine's names only, and "
    "not to {host!r}: ask 127.0.0.1 or localhost. Or set API_KEY, or ALLOW_ANONYMOUS=true if every name shall do."
)


_PAGE = (
    "This server needs no key, so it takes no requests from pages of {origin!r}: set CORS_ORIGINS to let them in, or "
    "API_KEY."
)


def reject_cross_origin(settings: Settings, host: str, origin: str) -> str:
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


Connection = ASGIConnection[Any, Any, Any, Any]


Guard = Callable[[Connection, BaseRouteHandler], Coroutine[Any, Any, None]]


_NO_KEY = "This server needs a key: send the header 'Authorization: Bearer KEY'."


_WRONG_KEY = "This key is not known here: check the header 'Authorization: Bearer KEY'."


class Keyring:
    """All keys of the server. `open_scopes` need none."""

    def __init__(self, keys: Iterable[Key], open_scopes: Iterable[Scope] = ()) -> None:
        self.keys = tuple(keys)
        self._open_scopes = frozenset(open_scopes)
        num_callers = sum("embed" in key.scopes for key in self.keys) + ("embed" in self._open_scopes)
        self._is_shared = num_callers > 1

    def admit(self, authorization: str | None, scope: Scope) -> Key:
        """The key in this `Authorization` header, if it may do what `scope` covers; `ANONYMOUS` where none is needed.

        Raises:
            NotAuthorizedException: no key, or an unknown one.
            PermissionDeniedException: a key without that scope.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        is_given = scheme.lower() == "bearer" and bool(secret.strip())
        key = self._find(secret.strip()) if is_given else None
        if key is not None and scope in key.scopes:
            return key
        if scope in self._open_scopes:
            return ANONYMOUS
        if key is None:
            raise NotAuthorizedException(_WRONG_KEY if is_given else _NO_KEY)
        raise PermissionDeniedException(
            f"This key has the scope {', '.join(sorted(key.scopes))}; this route needs {scope}."
        )

    def caller_of(self, key: Key) -> str:
        """The name by which engines tell this key's requests from those of others; empty where there are no others."""
        return key.id if self._is_shared else ""

    def may_keep_alive(self, key: Key) -> bool:
        """Whether requests with this key may say `keep_alive`, which evicts a model, or holds memory, for everybody.

        Three cases: 1. the key says so itself. 2. who embeds without a key may where everything is open. 3. any other
        may where it has no neighbours, or is an operator's.
        """
        if key.keep_alive is not None:
            return key.keep_alive  # (1)
        if key.is_anonymous:
            return "admin" in self._open_scopes  # (2)
        return not self._is_shared or "admin" in key.scopes  # (3)

    def _find(self, secret: str) -> Key | None:
        digest = digest_of(secret)
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        return matches[0] if matches else None


def keyring_of(settings: Settings, filed: Iterable[Key] = ()) -> Keyring:
    """The keys of the environment, and those of `KEYS_FILE`. There are five cases:

    1. no key: everything is open (settings refuse to listen to the world this way unless told to).
    2. `API_KEY` alone: it opens everything.
    3. `API_KEY` and `ADMIN_API_KEY`: each opens its own side only.
    4. `ADMIN_API_KEY` alone: it opens everything; where no key was needed before, embedding still needs none.
    5. `KEYS_FILE`: its keys open what they say, those of the environment as above; nothing is open without a key,
       even as long as the file holds none.
    """
    client, admin = settings.api_key, settings.admin_api_key
    is_open = (settings.is_loopback or settings.allow_anonymous) and settings.keys_file is None  # (5)
    keys, open_scopes = [*filed], list[Scope]()
    if client and admin:  # (3)
        keys += [Key.of("API_KEY", client, "embed"), Key.of("ADMIN_API_KEY", admin, "admin")]
    elif client:  # (2)
        keys.append(Key.of("API_KEY", client, "embed", "admin"))
    elif admin:  # (4)
        keys.append(Key.of("ADMIN_API_KEY", admin, "embed", "admin"))
        open_scopes = ["embed"] if is_open else []
    elif is_open:  # (1)
        open_scopes = ["embed", "admin"]
    return Keyring(keys, open_scopes)


class _Auth(Protocol):
    """The part of `ServerState` that guards read; its class is in a layer above this one."""

    keyring: Keyring
    settings: Settings


def _auth_of(connection: Connection) -> _Auth:
    auth: _Auth = connection.app.state.server_state
    return auth


def requires(scope: Scope) -> Guard:
    """A guard for controllers whose routes need `scope`. A coroutine, because Litestar runs others on a thread."""

    async def guard(connection: Connection, _: BaseRouteHandler) -> None:
        began_s = time.perf_counter()
        auth = _auth_of(connection)
        key = auth.keyring.admit(connection.headers.get("authorization"), scope)
        connection.scope["state"]["key"] = key
        if key.is_anonymous:
            _refuse_foreign_pages(connection, auth.settings)
        else:
            context_of(connection).set_key(key.id)
        context_of(connection).stage("auth", began_s)

    return guard


def is_foreign(connection: Connection, settings: Settings) -> bool:
    """Whether a request comes from a web page that is not this server's."""
    return bool(_why_foreign(connection, settings))


def _refuse_foreign_pages(connection: Connection, settings: Settings) -> None:
    why = _why_foreign(connection, settings)
    if why:
        raise PermissionDeniedException(why)


def _why_foreign(connection: Connection, settings: Settings) -> str:
    headers = connection.headers
    return reject_cross_origin(settings, headers.get("host", ""), headers.get("origin", ""))


def key_of(connection: Connection) -> Key:
    """The key that the guard admitted."""
    key: Key = connection.scope["state"]["key"]
    return key
