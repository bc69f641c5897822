"""Parses quantities: sizes (`20GiB`), durations (`10m`), memory budgets (`80%`) and devices (`cuda:0`).

Every parser raises `ValueError` with a text that says what is allowed. It never quotes the value, which may be secret.
"""

import re

from engines.spec import NEVER_IDLE
from engines.types import Budget

DEVICE_PATTERN = r"^(auto|cpu|cuda(:[0-9]+)?)$"
"""One device in `DEVICE` or in a model's `device`."""
KEEP_ALIVE_PATTERN = r"^\s*(-1|[0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+)\s*$"
BUDGET_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*(%|[kKmMgGtT]?[iI]?[bB]?)\s*$"
SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*[kKmMgGtT]?[iI]?[bB]?\s*$"
"""Patterns of keep-alives, budgets and sizes for JSON Schema, which cannot bound numbers inside a string."""

SIZE_ALLOWED = "a size such as 500MB, 20GiB or a whole number of bytes"
DURATION_ALLOWED = "a duration such as 30s, 10m, 1h30m or a number of seconds"
KEEP_ALIVE_ALLOWED = f"{DURATION_ALLOWED}, 0 (unload after each request) or -1 (stay until memory is needed)"
BUDGET_ALLOWED = "a percentage such as 80%, or a size such as 20GiB"
CACHE_ALLOWED = "a size such as 256MiB, with the unit and at least 1MiB, or 0 for none"

_BYTES_OF: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{ending}": int(base**power)
    for power, prefix in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_MAX_CHARS = 64
"""Most characters of a quantity. Clients send some, and regular expressions must not run on input of any length."""
_MAX_DURATION_S = 1e9
"""31 years. Longer durations are clipped, because event loops raise on timers of more than 10¹⁰ to 10¹⁶ seconds."""
_SECONDS_OF = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_DEVICE = re.compile(DEVICE_PATTERN, re.ASCII)
_MIN_BUDGET_BYTES = 2**24
_MIN_CACHE_BYTES = 2**20


def parse_bytes(value: object) -> int:
    """Parse `500MB` (powers of 1000), `20GiB` (powers of 1024) or a number of bytes; units are case-insensitive."""
    match = _SIZE.fullmatch(_text(value)) if isinstance(value, str | int) else None
    factor = _BYTES_OF.get(match[2].lower()) if match else None
    if match is None or factor is None or isinstance(value, bool):
        raise ValueError(SIZE_ALLOWED)
    return round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def parse_cache_bytes(value: object) -> int:
    """Parse the size of a cache, or 0 for none. The unit is required: `256` would hold a quarter of a vector."""
    try:
        size_bytes = parse_bytes(value)
    except ValueError:
        raise ValueError(CACHE_ALLOWED) from None
    if 0 < size_bytes < _MIN_CACHE_BYTES:
        raise ValueError(CACHE_ALLOWED)
    return size_bytes


def parse_duration_s(value: object) -> float:
    """Parse `10m`, `1h30m`, `45` or `1.5` into seconds. Zero is allowed, negative durations are not."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(DURATION_ALLOWED)
    text = _text(value)
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    elif _DURATION.fullmatch(text):
        seconds = sum(float(number) * _SECONDS_OF[unit] for number, unit in _DURATION_PART.findall(text))
    else:
        raise ValueError(DURATION_ALLOWED)
    return min(seconds, _MAX_DURATION_S)


def parse_keep_alive_s(value: object) -> float:
    """Parse a duration, or -1 for "never unload when idle" (`NEVER_IDLE`)."""
    if not isinstance(value, bool) and _text(value) in ("-1", "-1.0"):
        return NEVER_IDLE
    try:
        return parse_duration_s(value)
    except ValueError:
        raise ValueError(KEEP_ALIVE_ALLOWED) from None


def parse_budget(value: object) -> Budget:
    """Parse `80%` (above 0, at most 100) or a size. The unit is required: `20` would be twenty bytes."""
    text = _text(value) if isinstance(value, str) else ""
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1].strip()):
        percentage = float(text[:-1])
        if 0 < percentage <= 100:
            return Budget(fraction=percentage / 100)
        raise ValueError("a percentage above 0% and up to 100%, or a size such as 20GiB")
    try:
        size_bytes = parse_bytes(value)
    except ValueError:
        raise ValueError(BUDGET_ALLOWED) from None
    if size_bytes < _MIN_BUDGET_BYTES:
        raise ValueError(f"{BUDGET_ALLOWED}, with the unit and at least 16MiB")
    return Budget(size_bytes=size_bytes)


def parse_host_budget(value: object) -> Budget:
    """Parse a budget, or 0 for none."""
    if not isinstance(value, bool) and _text(value) == "0":
        return Budget(size_bytes=0)
    try:
        return parse_budget(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 0 for none") from None


def _text(value: object) -> str:
    """Return a quantity as text; empty, which no parser accepts, if it is too long."""
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return ""
    return text.strip() if len(text) <= _MAX_CHARS else ""


def parse_device(value: object) -> str:
    """Parse one device: `auto`, `cpu`, `cuda` or `cuda:N`."""
    if isinstance(value, str) and _DEVICE.fullmatch(value.strip()):
        return value.strip()
    raise ValueError("auto, cpu, cuda or cuda:N")
