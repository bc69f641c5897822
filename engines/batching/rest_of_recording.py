"""Decides when the passes of a model that came back are recorded again: in the idle time after its first answers.

`engines/models/later_graphs.py` records them, one size a step.
"""

from engines.batching.rest_of_check import LATEST_S, RestOfCheck
from engines.device.tasks import Task
from engines.models.parking import ParkableEncoder
from engines.types import ModelInfo

PAUSE_S = 1.0
"""Under traffic that never ends, seconds from one step that a text has waited for to the next one."""


class RestOfRecording(RestOfCheck):
    """Runs the steps of a recording, one a task, so that texts which come meanwhile run between them.

    Every form of the ordinary pass was checked at load, and the description does not change but for the path.
    """

    _is_late = False

    def described(self, info: ModelInfo) -> ModelInfo:
        """Returns the model's description as it is."""
        return info

    def next_task(self) -> Task | None:
        """See `RestOfCheck.next_task`."""
        is_late = self.is_overdue
        task = super().next_task()
        if task is not None:
            self._is_late = is_late
        return task

    def run(self) -> None:
        """Runs one step. No request fails."""
        if self._is_late:
            self._due_s = self._clock() - LATEST_S + PAUSE_S
        super().run()


def rest_after_waking(parkable: ParkableEncoder, rest: RestOfCheck | None) -> RestOfCheck | None:
    """Returns what a model that came back has left to do: recording, or what was left before it was parked.

    A model that has recorded passes was checked as a whole at its load, so that it never has both.
    """
    graphs = parkable.graphs
    if graphs is None or not graphs.is_pending:
        return rest
    return RestOfRecording(graphs.step, lambda: graphs.is_pending).started()
