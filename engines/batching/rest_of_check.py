"""Decides when an engine checks what an earlier load had proved: after its first answers.

`engines/models/self_check.py` decides what that is.
"""

import time
from collections.abc import Callable
from typing import Literal

import structlog
from msgspec import structs

from engines.device.tasks import Task
from engines.models.base import ForwardPathFailed
from engines.protocols import Clock
from engines.types import ModelInfo

log = structlog.get_logger(__name__)

CHECK_AFTER_S = 1.0
"""Seconds after the model is ready: the request that it was loaded for has its answer by then."""

LATEST_S = 30.0
"""Under traffic that never ends, the check runs this much later at the latest; other texts run between its layers."""


class RestOfCheck:
    """Runs the rest of one model's check once, while no text waits for the model.

    Args:
        check: runs it, beside other passes. It raises `ForwardPathFailed` where it must run later.
        is_pending: tells whether there is a rest.
        clock: seconds.
        is_refuted: tells whether the check has found a form that is wrong.
    """

    def __init__(
        self,
        check: Callable[[], None],
        is_pending: Callable[[], bool],
        clock: Clock = time.monotonic,
        is_refuted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._check = check
        self._is_pending = is_pending
        self._is_refuted = is_refuted
        self._clock = clock
        self._due_s: float | None = None
        self._is_running = False

    @property
    def due_in_s(self) -> float | None:
        """Returns the seconds until it should run; None where nothing is left, or it runs."""
        if self._due_s is None or self._is_running or not self._is_pending():
            return None
        return max(0.0, self._due_s - self._clock())

    @property
    def is_overdue(self) -> bool:
        """Tells whether it should run although texts wait."""
        return self.due_in_s == 0.0 and self._due_s is not None and self._clock() >= self._due_s + LATEST_S

    @property
    def has_passed(self) -> bool:
        """Tells whether all vectors so far are of forms that are right, so that they may be kept for later requests."""
        return not self._is_pending() and not self._is_refuted()

    def started(self) -> "RestOfCheck | None":
        """Starts to count, as the model is ready; returns itself, or None where nothing is left to check."""
        self._due_s = self._clock() + CHECK_AFTER_S
        return self if self._is_pending() else None

    def described(self, info: ModelInfo) -> ModelInfo:
        """Returns the model's description, with what is checked by now."""
        checked: Literal["all", "canary"] = "canary" if self._is_pending() else "all"
        return info if info.checked == checked else structs.replace(info, checked=checked)

    def next_task(self) -> Task | None:
        """Returns the check where it is due; None else."""
        if self.due_in_s != 0.0:
            return None
        self._is_running = True
        return Task(self.run, is_long=True)

    def run(self) -> None:
        """Runs the check, on a thread of the scheduler. The encoder leaves a path that is wrong; no request fails."""
        try:
            self._check()
        except ForwardPathFailed:
            self._due_s = self._clock() + CHECK_AFTER_S
        except Exception:
            log.exception("model.check_postponed")
            self._due_s = self._clock() + LATEST_S
        finally:
            self._is_running = False
