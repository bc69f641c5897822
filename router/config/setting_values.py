"""Parses the text of each kind of setting; `router/config/settings.py` lists the variables and their parsers.

Every parser raises `ValueError` with a text that says what is allowed. It never quotes the value, which may be a key.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path

from router.config.quantities import SIZE_ALLOWED, parse_bytes, parse_device, parse_duration_s

HOST_ALLOWED = "an address or host name without a port, such as 127.0.0.1, 0.0.0.0, ::1 or localhost"
SKINS = ("tei", "cohere", "ollama", "infinity", "azure", "path", "voyage")
"""The compatibility APIs: those of other embedding servers, and `path` (the model in the path)."""
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/,]+", re.ASCII)
_DATABASE = re.compile(r"[a-z0-9]+(?:\+[a-z0-9_]+)?://\S*", re.ASCII)
_STORAGE = re.compile(r"async\+[a-z0-9+.-]+://\S*", re.ASCII)


@lru_cache(maxsize=64)  # called for every request; bounded, because clients choose the Host header
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than `localhost` count as reachable from outside."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`, both included."""
    allowed = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(allowed)
        return int(text)

    return read


def or_off(read: Callable[[str], int]) -> Callable[[str], int | None]:
    """Return a parser that reads `off` and `none` as None, and everything else with `read`."""

    def read_or_off(text: str) -> int | None:
        if text.lower() in ("off", "none"):
            return None
        try:
            return read(text)
        except ValueError as error:
            raise ValueError(f"{error}, or off") from None

    return read_or_off


def duration_s(low_s: float = 0.0, high_s: float | None = None) -> Callable[[str], float]:
    """Return a parser of durations between the bounds, in seconds."""
    allowed = f"a duration such as 30s, 10m or a number of seconds, {low_s:g} s or more"
    allowed += f" and at most {high_s:g} s" if high_s is not None else ""

    def read(text: str) -> float:
        try:
            seconds = parse_duration_s(text)
        except ValueError:
            raise ValueError(allowed) from None
        if seconds < low_s or (high_s is not None and seconds > high_s):
            raise ValueError(allowed)
        return seconds

    return read


def window_s(text: str) -> int:
    """Parse the window of a rate limit: whole seconds, because the counters have no fractions of a second."""
    seconds = duration_s(1.0)(text)
    if seconds != int(seconds):
        raise ValueError("a duration of whole seconds, 1 s or more")
    return int(seconds)


def size_bytes(text: str) -> int:
    """Parse a size of at least one byte."""
    size = parse_bytes(text)
    if size < 1:
        raise ValueError(f"{SIZE_ALLOWED}, 1 byte or more")
    return size


def boolean(text: str) -> bool:
    """Parse `true` or `false`, or one of their synonyms."""
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError("true or false") from None


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of one of the words, in any case; the result is lower case."""

    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text.lower()

    return read


def host(text: str) -> str:
    """Parse the address to listen on. IPv6 addresses may be in brackets."""
    bare = text.removeprefix("[").removesuffix("]")
    try:
        return str(ip_address(bare))
    except ValueError:
        if re.fullmatch(r"[A-Za-z0-9_.-]+", bare, re.ASCII):
            return bare
        raise ValueError(HOST_ALLOWED) from None


def key(text: str) -> str:
    """Parse a bearer key: printable ASCII without spaces, as a header holds it without quoting."""
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("printable ASCII characters without spaces")
    return text


def devices(text: str) -> tuple[str, ...]:
    """Parse `auto`, or a comma-separated list of different devices."""
    names = tuple(part.strip() for part in text.split(","))
    try:
        found = tuple(map(parse_device, names))
    except ValueError as error:
        raise ValueError(f"{error}, or a comma-separated list such as cuda:0,cuda:1") from None
    if len(set(found)) != len(found) or ("auto" in found and len(found) > 1):
        raise ValueError("auto alone, or a comma-separated list of different devices such as cuda:0,cuda:1")
    return found


def storage(text: str) -> str:
    """Parse a storage URI of the `limits` package, in its asyncio form."""
    if not _STORAGE.fullmatch(text):
        raise ValueError(
            "a storage URI that starts with async+, such as async+memory:// or async+redis://localhost:6379"
        )
    return text


def database(text: str) -> str:
    """Parse a database URL as SQLAlchemy writes it."""
    if not _DATABASE.fullmatch(text):
        raise ValueError("a SQLAlchemy URL such as postgresql+psycopg://user:password@host/name")
    return text


def web_address(text: str) -> str:
    """Parse an `http` or `https` address."""
    if not re.fullmatch(r"https?://[^\s/]\S*", text, re.ASCII):
        raise ValueError("an address such as http://localhost:4318")
    return text


def origins(text: str) -> tuple[str, ...]:
    """Parse the origins that may call from browsers: `*`, or a comma-separated list of `https://host[:port]`."""
    found = tuple(part.strip().rstrip("/") for part in text.split(","))
    if not all(_ORIGIN.fullmatch(origin) for origin in found):
        raise ValueError("* or a comma-separated list of origins such as https://app.example.com")
    return found


def networks(text: str) -> tuple[str, ...]:
    """Parse addresses and networks of proxies. `*` is refused: it would let every client choose its own address."""
    found = tuple(part.strip() for part in text.split(","))
    try:
        return tuple(str(ip_network(network)) if "/" in network else str(ip_address(network)) for network in found)
    except ValueError:
        raise ValueError(
            "a comma-separated list of addresses and networks of proxies, such as 127.0.0.1,10.0.0.0/8"
        ) from None


def skins(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of `SKINS`, or `none`."""
    found = tuple(part.strip().lower() for part in text.split(","))
    if found == ("none",):
        return ()
    if not set(found) <= set(SKINS):
        raise ValueError(f"none, or a comma-separated list of {', '.join(SKINS)}")
    return tuple(skin for skin in SKINS if skin in found)


def names(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of models: names, hub ids, folders."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise ValueError("a comma-separated list of models: names of the registry, hub ids, folders")
    return found


def path(text: str) -> Path:
    """Parse a path; `~` is the user's home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path without ~, because this user has no home folder") from None
