"""Configures logging: format and destination. Every module logs through structlog; other libraries' logs are merged.

Tracebacks are plain: structlog's richer ones print local variables, which hold texts and keys.
"""

import json
import logging
import os
import sys
from contextlib import suppress
from select import select
from typing import TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor

from router.observability.console import ConsoleRenderer
from router.observability.request_context import POLLED_ROUTES, RequestContext
from router.observability.stray_lines import StrayLines, adopt_stray_lines

_log = structlog.get_logger()

_JSON_TIME = structlog.processors.TimeStamper(fmt="iso", utc=True)
_CONSOLE_TIME = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
_MAX_PATH_CHARS = 200
_MAX_MESSAGE_CHARS = 300


class LineWriter:
    """Writes each line with one system call, whatever the buffering of the stream.

    Worker processes share the server's stderr. Two writes for a line and its end, as `print` makes them under
    PYTHONUNBUFFERED, let another process's line come between (three processes, 6,000 lines: six were not JSON).

    Args:
        stream: used directly when it has no file descriptor.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fd: int | None = None
        with suppress(OSError, AttributeError, ValueError):  # a test's stream has none
            self._fd = stream.fileno()

    def write(self, text: str) -> None:
        """Write the text. Errors are ignored: an unwritable log must not fail a request."""
        with suppress(OSError):
            if self._fd is None:
                self._stream.write(text)
                return
            data = text.encode(errors="backslashreplace")
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # another program made the terminal non-blocking
                    select([], [self._fd], [])

    def flush(self) -> None:
        """Flush the stream; with a file descriptor there is no buffer."""
        if self._fd is None:
            self._stream.flush()


def configure_logging(log_format: str, log_level: str) -> None:
    """Log to stderr: `json`, one object per line; `console`, for people; `auto`, `console` on a terminal.

    In JSON everything that is written to stderr is: warnings, uncaught exceptions, lines of other libraries.
    """
    stream = sys.stderr.stream if isinstance(sys.stderr, StrayLines) else sys.stderr
    is_terminal = stream.isatty()
    as_json = log_format == "json" or (log_format == "auto" and not is_terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _JSON_TIME if as_json else _CONSOLE_TIME,
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = _render_json if as_json else ConsoleRenderer(has_colors=is_terminal)
    level = logging.getLevelNamesMapping()[log_level.upper()]
    lines = cast(TextIO, LineWriter(stream))  # has all that both libraries use of a stream
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(lines),
        cache_logger_on_first_use=True,
    )
    _adopt_other_libraries(lines, shared, renderer, max(level, logging.WARNING))
    adopt_stray_lines(stream, as_json=as_json)


def log_request(context: RequestContext) -> None:
    """Log a request that has ended; structlog's context adds the request id, the model and the key."""
    route = context.route
    log = _log.warning if context.status >= 500 else _log.debug if route in POLLED_ROUTES else _log.info
    more: dict[str, object] = {}
    if not route:  # an unknown one; a known route's path may hold a model id, which is a field of its own
        more["path"] = context.scope["path"][:_MAX_PATH_CHARS]
    if context.code != "ok":
        more |= _refusal(context)
    if context.trace_id:
        more["trace_id"] = context.trace_id
    if context.answer is not None:
        more |= {"texts": len(context.answer.token_counts), "tokens": sum(context.answer.token_counts)}
        for stage in context.stages:
            more[f"{stage.name}_ms"] = round(stage.seconds * 1000, 1)
    log(
        "request.done",
        method=context.method,
        route=route,
        status=context.status,
        ms=round(context.seconds * 1000, 1),
        **more,
    )


def _refusal(context: RequestContext) -> dict[str, object]:
    """Return what the caller was told: the code, the field that is wrong, and the beginning of the message."""
    told = {"code": context.code, "param": context.param, "message": context.message[:_MAX_MESSAGE_CHARS]}
    return {name: text for name, text in told.items() if text}


def _render_json(_logger: object, _method: str, line: EventDict) -> str:
    """Render a line as an object whose first members are time, level and event."""
    line = {name: line.pop(name) for name in ("timestamp", "level", "event") if name in line} | dict(line)
    try:
        return orjson.dumps(line, default=repr).decode()
    except TypeError:  # half a surrogate pair, which orjson refuses
        return json.dumps(line, default=repr)


def _adopt_other_libraries(lines: TextIO, shared: list[Processor], renderer: Processor, level: int) -> None:
    """Log other libraries at level warning and above: their info lines are not about requests or models."""
    handler = logging.StreamHandler(lines)
    handler.setLevel(level)  # libraries give their loggers levels of their own
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
