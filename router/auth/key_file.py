"""Reads `KEYS_FILE`: its entries as Structs, and rules between them. Reports all mistakes at once, with their lines.

No message quotes the file, because it may hold a key by mistake where a hash belongs.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs

from router.auth.keys import Key, Scope
from router.config.yaml_document import Document, FileError, KeyPath, Mistake, read_document, read_text
from router.config.yaml_schema import check_shape

ENVIRONMENT_IDS = ("API_KEY", "ADMIN_API_KEY")
"""Ids of the keys in the settings."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


class KeysError(FileError):
    """The keys file cannot be used."""

    file = "the keys file"


def read_id(value: object) -> str:
    """Validate a key's id, its name in logs, metrics and limits."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(
            "a name of up to 64 letters, digits, dots, dashes and underscores, starting with a letter or digit"
        )
    if value in ENVIRONMENT_IDS:
        raise ValueError(f"another name: {value} is the key of the setting of this name")
    return value


def _read_digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("the SHA-256 of the key as 64 hexadecimal digits in quotes; `embedyard keys create` prints it")
    return value


def read_pattern(value: object) -> str:
    """Validate a model name, or a pattern of names."""
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(r"\S+", value):
        raise ValueError('a model name or a pattern such as "BAAI/*", in quotes')
    return value


def _read_by(parse: Callable[[object], object]) -> Meta:
    return Meta(extra={"parse": parse})


Count = Annotated[int, Meta(ge=1)]


class KeyEntry(Struct, forbid_unknown_fields=True, kw_only=True):
    """One entry of the file."""

    id: Annotated[str, _read_by(read_id)]
    sha256: Annotated[str, _read_by(_read_digest)]
    scopes: Annotated[list[Scope], Meta(min_length=1)] | UnsetType = UNSET
    models: Annotated[list[Annotated[str, _read_by(read_pattern)]], Meta(min_length=1)] | UnsetType = UNSET
    requests_per_minute: Count | UnsetType = UNSET
    tokens_per_minute: Count | UnsetType = UNSET
    max_concurrent: Count | UnsetType = UNSET
    keep_alive: bool | UnsetType = UNSET

    def to_key(self) -> Key:
        """Build the key. Defaults: the scope `embed`, all models, the server's limits."""
        given = {name: value for name, value in structs.asdict(self).items() if value is not UNSET}
        digest = bytes.fromhex(given.pop("sha256"))
        scopes = frozenset(given.pop("scopes", ("embed",)))
        models = tuple(given.pop("models", ("*",)))
        return Key(digest=digest, scopes=scopes, models=models, **given)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the keys of a file, in its order.

    Raises:
        KeysError: with every mistake.
    """
    try:
        text = read_text(path, "create it with `embedyard keys create`, or unset KEYS_FILE")
    except ValueError as error:
        raise KeysError((Mistake((), str(error)),)) from None
    return parse_keys(text)


def parse_keys(text: str) -> tuple[Key, ...]:
    """Parse the keys of a YAML text; an empty text holds none.

    Raises:
        KeysError: with every mistake.
    """
    document = read_document(text, Document(entries=(), label="id", is_secret=True))
    if document.value is None and not document.mistakes:
        return ()
    if document.value is not None:
        check_shape(document, list[KeyEntry])
        _check_unique(document, "id", "another key has this id")
        _check_unique(document, "sha256", "another entry has this hash, so both are the same key")
    if document.mistakes:
        raise KeysError(document.mistakes)
    return tuple(entry.to_key() for entry in msgspec.convert(document.value, list[KeyEntry]))


def _check_unique(document: Document, field: str, what: str) -> None:
    seen: dict[str, KeyPath] = {}
    for index, entry in _entries(document):
        value = entry.get(field)
        if not isinstance(value, str):
            continue
        path = (index, field)
        first = seen.setdefault(value.lower() if field == "sha256" else value, path)
        if first != path:
            document.add(path, f"{what}: see line {document.line(first)}")


def _entries(document: Document) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, entry in enumerate(document.value if isinstance(document.value, list) else []):
        if isinstance(entry, dict):
            yield index, entry
