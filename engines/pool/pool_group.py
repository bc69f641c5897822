"""Carries messages between the pools of one process, over whose devices a model may be split."""

from collections import deque
from collections.abc import Callable

from engines.pool.messages import PoolEvent
from engines.pool.neighbour_messages import Notify
from engines.pool.neighbours import Neighbours


class PoolGroup:
    """The pools of devices of one kind in this process. Used on one event loop only.

    Attributes:
        core: what their state machines share.
        queue: messages that are not delivered yet.
    """

    def __init__(self) -> None:
        self.core = Neighbours()
        self._steps: list[Callable[[PoolEvent], None]] = []
        self.queue: deque[Notify] = deque()
        self._is_delivering = False

    def join(self, name: str, device: str, step: Callable[[PoolEvent], None]) -> None:
        """Adds a pool, right after its state machine has joined `core`."""
        self.core.names.append(name)
        self.core.devices.append(device)
        self._steps.append(step)

    def post(self, notice: Notify) -> None:
        """Queues a message, for `deliver`."""
        self.queue.append(notice)

    def deliver(self) -> None:
        """Delivers all messages, each as a step of its own; those of these steps too. Does nothing inside a step that
        it has begun itself."""
        if self._is_delivering:
            return
        self._is_delivering = True
        try:
            while self.queue:
                notice = self.queue.popleft()
                self._steps[notice.pool](notice.event)
        finally:
            self._is_delivering = False
