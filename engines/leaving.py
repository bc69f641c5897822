"""How a path that failed is left: whoever comes when nobody runs on it any more leaves it, the others come again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.encoder import PathLeft


class Passes:
    """The passes that run now.

    Args:
        leave: called while none runs, after `give_up`.

    Attributes:
        is_leaving: whether the path is to be left.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._lock = threading.Lock()
        self._num_inside = 0
        self.is_leaving = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, a pass runs.

        Raises:
            PathLeft: others still run on a path that is to be left.
        """
        with self._lock:
            if self.is_leaving and self._num_inside:
                raise PathLeft
            if self.is_leaving:
                self._leave()
                self.is_leaving = False
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1

    def give_up(self) -> None:
        """Have the path left as soon as nobody runs on it."""
        self.is_leaving = True
