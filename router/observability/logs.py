"""Configures logging: format and destination. Every module logs through structlog; other libraries' logs are merged.

Tracebacks are plain: structlog's richer ones print local variables, which hold texts and keys.
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from select import select
from typing import TextIO, cast

import orjson
import structlog
from structlog.typing import Processor

from router.observability.request_context import POLLED_ROUTES, RequestContext

_log = structlog.get_logger()


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
    """Log to stderr: `json`, one object per line; `console`, for people; `auto`, `console` on a terminal."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([structlog.processors.format_exc_info] if as_json else []),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer(_to_json)
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    level = logging.getLevelNamesMapping()[log_level.upper()]
    lines = cast(TextIO, LineWriter(sys.stderr))  # has all that both libraries use of a stream
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(lines),
        cache_logger_on_first_use=True,
    )
    _adopt_other_libraries(lines, shared, renderer, max(level, logging.WARNING))


def log_request(context: RequestContext) -> None:
    """Log a request that has ended; structlog's context adds the request id, the model and the key."""
    log = _log.warning if context.status >= 500 else _log.debug if context.route in POLLED_ROUTES else _log.info
    more: dict[str, object] = {"code": context.code} if context.code != "ok" else {}
    if context.trace_id:
        more["trace_id"] = context.trace_id
    if context.answer is not None:
        more |= {"inputs": len(context.answer.token_counts), "tokens": sum(context.answer.token_counts)}
        more |= {f"{stage.name}_ms": _ms(stage.seconds) for stage in context.stages}
    log(
        "request.done",
        method=context.method,
        route=context.route,
        status=context.status,
        ms=_ms(context.seconds),
        **more,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _to_json(event: object, *, default: Callable[[object], object]) -> str:
    return orjson.dumps(event, default=default).decode()


def _adopt_other_libraries(lines: TextIO, shared: list[Processor], renderer: Processor, level: int) -> None:
    """Log other libraries at level warning and above: their info lines are not about requests or models."""
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
