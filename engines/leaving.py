"""Switches a model to its plainest path when a faster one fails, and back once that has been checked again.

A switch changes how the whole model runs, so it is made while no pass runs: the next pass that begins makes it, and
passes that would run beside it are told to come again (`PathLeft`).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.encoder import PathLeft
from engines.protocols import Clock

FIRST_WAIT_S, LONGEST_WAIT_S = 30.0, 3600.0
"""A path that failed is tried again after the first wait; each failure that follows soon doubles it."""


class Passes:
    """The passes that run now, and whether the path that was chosen at load is in use.

    Args:
        leave: switches to the plainest path; called while no pass runs, after `give_up`.
        resume: switches back and checks the vectors, and returns whether they are right; called while no pass runs. It
            leaves the plainest path in use where they are not.
        clock: seconds.

    Attributes:
        is_left: whether the plainest path is in use, or will be at the next pass, because a faster one failed.
    """

    def __init__(self, leave: Callable[[], None], resume: Callable[[], bool], clock: Clock = time.monotonic) -> None:
        self._leave = leave
        self._resume = resume
        self._clock = clock
        self._lock = threading.Lock()
        self._num_inside = 0
        self._is_switching = False
        self._must_leave = False
        self.is_left = False
        self._wait_s = FIRST_WAIT_S
        self._retry_at_s = 0.0
        self._resumed_at_s = -LONGEST_WAIT_S

    @property
    def is_alone(self) -> bool:
        """Whether passes must run one at a time, because a switch is due or under way."""
        return self._is_switching or self._must_leave or self._is_retry_due()

    @property
    def retry_in_s(self) -> float:
        """Seconds until a path that was left is tried again; 0 when that is due."""
        return max(0.0, self._retry_at_s - self._clock()) if self.is_left else 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, a pass runs.

        Raises:
            PathLeft: a switch is under way, or waits for those who still run.
        """
        with self._lock:
            if self._is_switching or (self._must_leave and self._num_inside):
                raise PathLeft
            self._is_switching = not self._num_inside and (self._must_leave or self._is_retry_due())
            self._num_inside += 1
        try:
            if self._is_switching:  # set by this pass: it is the only one
                self._switch()
            yield
        finally:
            with self._lock:
                self._num_inside -= 1

    def give_up(self) -> None:
        """Have the path left as soon as nobody runs on it."""
        with self._lock:
            if self._must_leave or self.is_left:
                return
            now_s = self._clock()
            is_soon = now_s - self._resumed_at_s < self._wait_s
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S) if is_soon else FIRST_WAIT_S
            self._must_leave = self.is_left = True
            self._retry_at_s = now_s + self._wait_s

    def acquit(self) -> None:
        """The plainest path fails as well: it was not the faster one's fault, which is tried again at once."""
        self._retry_at_s = self._clock()

    def _is_retry_due(self) -> bool:
        return self.is_left and not self._must_leave and self._clock() >= self._retry_at_s

    def _switch(self) -> None:
        """Runs without the lock: it may take as long as a self-check, and others are to be told at once."""
        try:
            if self._must_leave:
                self._leave()
                self._must_leave = False
            elif self._resume():
                self.is_left, self._resumed_at_s = False, self._clock()
            else:
                self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
                self._retry_at_s = self._clock() + self._wait_s
        finally:
            self._is_switching = False
