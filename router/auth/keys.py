"""`Key`: the permissions and limits of a bearer key. It holds the hash of the key, never the key itself."""

import secrets
from collections.abc import Iterable
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Literal

from msgspec import Struct

Scope = Literal["embed", "admin", "batch"]
"""`batch`: files and batches; `embed` includes it, so that `batch` alone is a key for bulk work only."""

_PREFIX = "ey-"
_RANDOM_BYTES = 32


class Key(Struct, frozen=True, kw_only=True):
    """A key as the server stores it. A limit of `None` means the server's setting.

    Attributes:
        id: the name of the key in logs, metrics and limits.
        digest: SHA-256 of the key; empty for `ANONYMOUS`.
        models: patterns of model names; `*` matches any characters, including slashes.
        keep_alive: whether its requests may set `keep_alive`; None: `Keyring.may_keep_alive` decides.
    """

    id: str
    digest: bytes
    scopes: frozenset[Scope]
    models: tuple[str, ...] = ("*",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    keep_alive: bool | None = None

    @classmethod
    def of(cls, key_id: str, secret: str, *scopes: Scope) -> "Key":
        """Build a key with the limits of the server."""
        return cls(id=key_id, digest=digest_of(secret), scopes=frozenset(scopes))

    @property
    def is_anonymous(self) -> bool:
        """Whether this stands for requests without a key."""
        return not self.digest

    def has(self, scope: Scope) -> bool:
        """Whether the key opens routes of that scope."""
        return scope in self.scopes or (scope == "batch" and "embed" in self.scopes)

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model with these names is allowed."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.models)

    def __repr__(self) -> str:
        return f"Key({self.id}: {', '.join(sorted(self.scopes))})"


ANONYMOUS = Key(id="anonymous", digest=b"", scopes=frozenset(("embed", "admin")))


def digest_of(secret: str) -> bytes:
    """Hash a key with SHA-256. No salt and no stretching: keys are random, and each request pays for the hash."""
    return sha256(secret.encode("latin-1", "replace")).digest()


def new_secret() -> str:
    """Generate a key of 256 random bits, with a prefix that people and secret scanners recognize."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
