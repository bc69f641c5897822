"""Authenticates requests: bearer keys, their scopes, and the origin of requests without a key.

Keys are stored and compared as SHA-256 digests. Each comparison takes constant time, and all keys are always compared.
"""

import hmac
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler

from router.auth.keys import ANONYMOUS, Key, Scope, digest_of
from router.config.setting_values import is_loopback
from router.config.settings import Settings
from router.observability.request_context import context_of

_HOST_REFUSED = (
    "Host {host!r} is not allowed, because this server needs no key: use 127.0.0.1 or localhost, set API_KEY, or set "
    "ALLOW_ANONYMOUS=true to allow every host name"
)

_ORIGIN_REFUSED = (
    "Origin {origin!r} is not allowed, because this server needs no key: add it to CORS_ORIGINS, or set API_KEY"
)


def reject_cross_origin(settings: Settings, host: str, origin: str) -> str:
    """Return why a request without a key is refused; empty if it is allowed.

    Args:
        settings: of the server.
        host: the header; browsers always send it.
        origin: the header; only browsers send it.
    """
    checks_host = settings.is_loopback and not settings.allow_anonymous
    if host and checks_host and not (len(host) <= _MAX_HOST_CHARS and _is_local(host)):
        return _HOST_REFUSED.format(host=host[:100])
    if origin and not ({"*", origin.rstrip("/")} & set(settings.cors_origins)) and not _is_same_origin(origin, host):
        return _ORIGIN_REFUSED.format(origin=origin[:100])
    return ""


_MAX_HOST_CHARS = 300
"""A name of 253, and a port."""


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    """Whether only this machine can reach a `Host` header."""
    return is_loopback(_hostname(f"//{host}"))


def _is_same_origin(origin: str, host: str) -> bool:
    """Whether a page was served by this server. A proxy may have removed the port from `host`."""
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
_MISSING_KEY = "Missing API key: send the header 'Authorization: Bearer KEY'"
_NO_BEARER = "Authorization without the word Bearer: send the header 'Authorization: Bearer KEY'"
_INVALID_KEY = "Invalid API key: check the header 'Authorization: Bearer KEY'"
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?!\w)""")
_NAME = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)
_HEADERS = frozenset((b"authorization", b"api-key", b"host", b"origin"))
_CONSTANTS = ("Authorization: Bearer KEY",)
"""What our own messages quote."""


class Keyring:
    """All keys of the server. `open_scopes` need no key."""

    def __init__(self, keys: Iterable[Key], open_scopes: Iterable[Scope] = ()) -> None:
        self.keys = tuple(keys)
        self._open_scopes = frozenset(open_scopes)
        num_callers = sum(key.has("batch") for key in self.keys) + ("embed" in self._open_scopes)
        self._is_shared = num_callers > 1

    def admit(self, authorization: str | None, scope: Scope) -> Key:
        """Return the key in the `Authorization` header if it has the scope; `ANONYMOUS` if the scope needs no key.

        Raises:
            NotAuthorizedException: the key is missing or unknown.
            PermissionDeniedException: the key lacks the scope.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        is_given = scheme.lower() == "bearer" and bool(secret.strip())
        key = self._find(secret.strip()) if is_given else None
        if key is not None and key.has(scope):
            return key
        if scope in self._open_scopes or (scope == "batch" and "embed" in self._open_scopes):
            return ANONYMOUS
        if key is None:
            is_bare = bool(scheme) and scheme.lower() != "bearer"
            raise NotAuthorizedException(_INVALID_KEY if is_given else _NO_BEARER if is_bare else _MISSING_KEY)
        raise PermissionDeniedException(
            f"Insufficient scope: this key has {', '.join(sorted(key.scopes))}, this route needs {scope}"
        )

    def redact(self, message: str) -> str:
        """Return an error message for the log: of the values that it quotes, names only, and none that is a key.

        A client may have put a text or a key where a name belongs.
        """
        return _QUOTED.sub(lambda match: match[0] if self._may_show(match[0][1:-1]) else "'…'", message)

    def _may_show(self, value: str) -> bool:
        is_name = bool(_NAME.fullmatch(value)) or value in _CONSTANTS
        return is_name and self._find(value) is None

    def find(self, owner: str) -> Key | None:
        """Return the key with the owner's name (see `owner_of`) if it may run batches now."""
        if owner == owner_of(ANONYMOUS):
            return ANONYMOUS if "embed" in self._open_scopes else None
        return next((key for key in self.keys if owner_of(key) == owner and key.has("batch")), None)

    def caller_of(self, key: Key) -> str:
        """Return the name under which engines schedule this key's requests; empty if only one key can embed."""
        return key.id if self._is_shared else ""

    def may_keep_alive(self, key: Key) -> bool:
        """Whether requests with this key may set `keep_alive`, which evicts a model or holds memory for all keys.

        Three cases: 1. the key sets it itself. 2. no key: allowed if all scopes are open. 3. another key: allowed if it
        is the only one that can embed, or has the scope `admin`.
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


def owner_of(key: Key) -> str:
    """Return the name under which the files and batches of a key are stored; all requests without a key share one."""
    return "anonymous" if key.is_anonymous else f"key:{key.id}"


def keyring_of(settings: Settings, filed: Iterable[Key] = ()) -> Keyring:
    """Build the keyring from the environment and `KEYS_FILE`. There are five cases:

    1. no key: all scopes are open (the settings refuse to listen on other interfaces without ALLOW_ANONYMOUS).
    2. `API_KEY` alone: it has all scopes.
    3. `API_KEY` and `ADMIN_API_KEY`: the first has the scope `embed`, the second `admin`.
    4. `ADMIN_API_KEY` alone: it has all scopes; on loopback or with ALLOW_ANONYMOUS, embedding still needs no key.
    5. `KEYS_FILE`: its keys have their own scopes, those of the environment as above; nothing is open without a key,
       even while the file holds none.
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
    """Return a guard that requires a key with the scope; a coroutine, because Litestar runs others on a thread."""

    async def guard(connection: Connection, _: BaseRouteHandler) -> None:
        began_s = time.perf_counter()
        auth = _auth_of(connection)
        headers = _read_headers(connection)
        authorization = headers.get(b"authorization")
        if not authorization and (api_key := headers.get(b"api-key")):
            authorization = f"Bearer {api_key}"  # Azure's clients send it in a header of its own
        key = auth.keyring.admit(authorization, scope)
        connection.scope["state"]["key"] = key
        context = context_of(connection)
        if key.is_anonymous:
            reason = reject_cross_origin(auth.settings, headers.get(b"host", ""), headers.get(b"origin", ""))
            if reason:
                raise PermissionDeniedException(reason)
        else:
            context.set_key(key.id)
        context.stage("auth", began_s)

    return guard


def is_cross_origin(connection: Connection, settings: Settings) -> bool:
    """Whether a request comes from a web page of another origin, or names another host."""
    headers = _read_headers(connection)
    return bool(reject_cross_origin(settings, headers.get(b"host", ""), headers.get(b"origin", "")))


def _read_headers(connection: Connection) -> dict[bytes, str]:
    """Return the first of each header that guards read. Litestar's object of all headers takes 14 calls more."""
    found: dict[bytes, str] = {}
    for name, value in connection.scope["headers"]:
        if name in _HEADERS and name not in found:
            found[name] = value.decode("latin-1")
    return found


def key_of(connection: Connection) -> Key:
    """Return the key that the guard admitted."""
    key: Key = connection.scope["state"]["key"]
    return key
