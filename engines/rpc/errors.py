"""Errors as records: how one crosses to another process or machine, and is raised there as what it was.

Exceptions are not pickled: those with required keywords would not come back, and a library's own would need it there.
"""

from collections.abc import Iterator

import structlog
from msgspec import Struct

from engines import errors
from engines.errors import EngineError, EngineFailed

log = structlog.get_logger(__name__)

Detail = str | int | float | None


class ErrorRecord(Struct, frozen=True, kw_only=True, tag=True):
    """One `EngineError`: the name of its class, its message, and what else it carries (`param`, `retry_after_s`, …)."""

    kind: str
    message: str
    details: dict[str, Detail] = {}


def error_record_of(error: Exception) -> ErrorRecord:
    """The record of an error. What nobody foresaw is logged here, where its traceback is, and crosses without it."""
    if isinstance(error, EngineError):
        details = {name: value for name, value in vars(error).items() if isinstance(value, Detail)}
        return ErrorRecord(kind=type(error).__name__, message=str(error), details=details)
    log.error("host.crashed", exc_info=error)
    message = f"the host failed on this request ({type(error).__name__}); its log has the details"
    return ErrorRecord(kind=EngineFailed.__name__, message=message)


def error_of(failure: ErrorRecord) -> EngineError:
    """The error again. A class that this side does not know, of another version, becomes `EngineFailed`."""
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
