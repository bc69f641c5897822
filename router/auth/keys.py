"""`Key`: who may do what, and how much of it. A leaf; it holds the hash of a key and never the key itself."""

import secrets
from collections.abc import Iterable
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Literal

from msgspec import Struct

Scope = Literal["embed", "admin"]

_PREFIX = "ey-"
_RANDOM_BYTES = 32


class Key(Struct, frozen=True, kw_only=True):
    """A key as the server keeps it. `None` for a limit: what the server's settings say.

    `models` are patterns of model names: `*` stands for any characters, slashes too. `keep_alive`: whether its requests
    may say how long a model stays in memory; None: as `Keyring.may_keep_alive` decides.
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
        """A key without limits of its own."""
        return cls(id=key_id, digest=digest_of(secret), scopes=frozenset(scopes))

    @property
    def is_anonymous(self) -> bool:
        """Whether it stands for those who came without a key."""
        return not self.digest

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether a model that goes by these names is allowed."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.models)

    def __repr__(self) -> str:
        return f"Key({self.id}: {', '.join(sorted(self.scopes))})"


ANONYMOUS = Key(id="anonymous", digest=b"", scopes=frozenset(("embed", "admin")))


def digest_of(secret: str) -> bytes:
    """SHA-256 of a key. No salt and no stretching: keys are random, and every request pays for this."""
    return sha256(secret.encode("latin-1", "replace")).digest()


def new_secret() -> str:
    """A key that nobody has: 256 random bits, and a prefix by which people and scanners know it."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
