"""Renders log lines for people: time, event, fields.

`12:30:01 POST /v1/embeddings 200 53ms model=all-MiniLM-L6-v2 texts=2 tokens=12 id=4b6f…`. Nothing that a client sends
can end a line or reach the terminal as a control sequence.
"""

from collections.abc import Mapping

from structlog.typing import EventDict

from engines.types import format_bytes

_RESET = "\x1b[0m"
_DIM, _RED, _YELLOW, _GREEN = "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[32m"
_LEVELS = {"warning": _YELLOW, "error": _RED, "critical": _RED}
_REQUEST_FIELDS = ("model", "texts", "tokens", "code", "param", "message", "key")
"""Fields of a request's line and their order. Its stages are in the JSON format only: they would double the line."""


class ConsoleRenderer:
    """The last processor of the console format. `has_colors`: the stream is a terminal."""

    def __init__(self, *, has_colors: bool) -> None:
        self._has_colors = has_colors

    def __call__(self, _logger: object, _method: str, line: EventDict) -> str:
        """Render one line, and its traceback below."""
        level, exception = str(line.pop("level", "info")), line.pop("exception", "")
        parts = [self._colored(str(line.pop("timestamp", "")), _DIM)]
        if level in _LEVELS:
            parts.append(self._colored(level, _LEVELS[level]))
        event, request_id = str(line.pop("event", "")), line.pop("request_id", "")
        if event == "request.done":
            parts += self._request(line)
        else:
            parts += [_escaped(event), *_pairs(line)]
        parts += [f"id={request_id}"] if request_id else []
        return "\n".join([" ".join(part for part in parts if part), *([str(exception)] if exception else [])])

    def _request(self, line: EventDict) -> list[str]:
        status = line.get("status", 0)
        color = _RED if status >= 500 else _YELLOW if status >= 400 else _GREEN
        place = _escaped(str(line.get("route") or line.get("path", "")))
        shown = {name: line[name] for name in _REQUEST_FIELDS if line.get(name)}
        return [
            str(line.get("method", "")), place, self._colored(str(status), color), _ms(line.get("ms", 0.0)),
            *_pairs(shown),
        ]  # fmt: skip

    def _colored(self, text: str, color: str) -> str:
        return f"{color}{text}{_RESET}" if self._has_colors and text else text


def _ms(ms: float) -> str:
    return f"{ms:.0f}ms" if ms >= 9.95 else f"{ms:.1f}ms"


def _pairs(fields: Mapping[str, object]) -> list[str]:
    return [f"{name}={_value(value)}" for name, value in fields.items() if value not in ("", None)]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_value, value)) or "none"
    if isinstance(value, Mapping):  # a device with its memory
        return _value(", ".join(_member(str(name), each) for name, each in value.items()))
    text = str(value)
    is_plain = text.isprintable() and not any(mark in text for mark in ' "=')
    return text if is_plain else '"' + _escaped(text).replace('"', '\\"') + '"'


def _member(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes')} {format_bytes(value)}"
    return f"{value}"


def _escaped(text: str) -> str:
    """Escape what is not printable: line ends, terminal sequences, marks that reverse the direction of writing."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
