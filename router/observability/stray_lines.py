"""Brings into the log what would be printed beside it: warnings, uncaught exceptions, other libraries' handlers.

A log in JSON is read by programs, so each of its lines is JSON. Only native code that ends the process (a fault dump)
still writes as it is.
"""

import logging
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import TextIO

import structlog

_log = structlog.get_logger()

_OWN_HANDLERS = ("transformers", "huggingface_hub", "torch", "sentence_transformers", "ray")
"""Libraries that give their logger a handler of their own, which prints to stderr, when they are imported."""
_MAX_LINE_CHARS = 10_000


class ForwardingLogger(logging.Logger):
    """A library's top logger, of which lines reach the root logger only, whatever handlers the library adds."""

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802 - the method of logging
        """Ignore the handler."""

    @property
    def propagate(self) -> bool:
        """Always true; in logging an attribute, which libraries set to False."""
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:
        """Ignore the value."""


class StrayLines:
    """Stands in for `sys.stderr`: what is written is logged, a line each. All else is the stream's.

    A progress bar rewrites its line with carriage returns; only its last state is logged.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""
        self._log = structlog.get_logger()
        self._lock = threading.Lock()  # any thread may print

    def write(self, text: str) -> int:
        """Log the whole lines; keep the beginning of the next one."""
        with self._lock:
            *lines, rest = (self._rest + text).split("\n")
            self._rest = rest.rpartition("\r")[2][-_MAX_LINE_CHARS:]
        for line in lines:
            if shown := line.rstrip("\r").rpartition("\r")[2].rstrip():
                self._log.warning("stderr", text=shown[:_MAX_LINE_CHARS])
        return len(text)

    def flush(self) -> None:
        """Do nothing: lines are written when they end."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def adopt_stray_lines(stream: TextIO, *, as_json: bool) -> None:
    """Log warnings, uncaught exceptions and other libraries' lines; with `as_json` also what is printed to `stream`."""
    for name in _OWN_HANDLERS:
        _forward(name)
    warnings.showwarning = _log_warning
    sys.excepthook = _log_crash
    threading.excepthook = lambda given: _log_crash(given.exc_type, given.exc_value, given.exc_traceback)
    sys.unraisablehook = lambda given: _log.error("python.unraisable", exc_info=given.exc_value)
    if as_json:
        sys.stderr = StrayLines(stream)


def _forward(name: str) -> None:
    """Make a library's logger forward its lines, before or after the library was imported."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.__class__ = ForwardingLogger
    logger.__dict__.pop("propagate", None)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    place = f"{Path(filename).name}:{lineno}"
    _log.warning("python.warning", category=category.__name__, message=str(message), place=place)


def _log_crash(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    _log.critical("python.uncaught", exc_info=(kind, error, traceback))
