"""Converts errors to records and back, so that they cross to another process or machine and keep their class.

Exceptions are not pickled: those with required keyword arguments cannot be unpickled, and those of libraries would need
the library on the other side.
"""

from collections.abc import Iterator

import structlog
from msgspec import Struct

from engines import errors
from engines.errors import EngineError, EngineFailed

log = structlog.get_logger(__name__)

Detail = str | int | float | None


class ErrorRecord(Struct, frozen=True, kw_only=True, tag=True):
    """One `EngineError`: the name of its class, its message, and its other attributes (`param`, `retry_after_s`, …)."""

    kind: str
    message: str
    details: dict[str, Detail] = {}


def error_record_of(error: Exception) -> ErrorRecord:
    """Converts an error to a record.

    An unexpected error is logged here with its traceback; its record has only the name of its class.
    """
    if isinstance(error, EngineError):
        details = {name: value for name, value in vars(error).items() if isinstance(value, Detail)}
        return ErrorRecord(kind=type(error).__name__, message=str(error), details=details)
    log.error("host.crashed", exc_info=error)
    message = f"the host failed on this request ({type(error).__name__}); its log has the details"
    return ErrorRecord(kind=EngineFailed.__name__, message=message)


def error_of(failure: ErrorRecord) -> EngineError:
    """Restores the error from its record. An unknown class, from another version, becomes `EngineFailed`."""
    cls = _CLASSES.get(failure.kind, EngineFailed)
    error = cls.__new__(cls, failure.message)
    error.args = (failure.message,)
    vars(error).update(failure.details)
    return error


def _classes() -> Iterator[type[EngineError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, EngineError):
            yield value


_CLASSES = {cls.__name__: cls for cls in _classes()}
