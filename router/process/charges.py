"""Which models were running when worker processes died. Three deaths within ten minutes, and the model is quarantined.

A model that kills its host would otherwise take all others down with it, again and again. Pure but for the clock.
"""

from collections import deque
from collections.abc import Callable, Iterable

from engines.errors import LoadFailed

MAX_DEATHS = 3
WINDOW_S = 600.0
KIND = "kills_host"
"""The kind of `LoadFailed` in metrics and in the answer's message."""


class Charges:
    """Deaths by model.

    Args:
        now_s: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._deaths: dict[str, deque[float]] = {}

    def charge(self, model_ids: Iterable[str]) -> None:
        """A worker died while these were running."""
        for model_id in model_ids:
            self._deaths.setdefault(model_id, deque(maxlen=MAX_DEATHS)).append(self._now_s())

    def acquit(self, model_id: str) -> None:
        """The model is another one now: its source, revision or settings have changed."""
        self._deaths.pop(model_id, None)

    def left_s(self, model_id: str) -> float:
        """How long the model stays quarantined; 0 when it is not."""
        deaths = self._deaths.get(model_id)
        if deaths is None or len(deaths) < MAX_DEATHS:
            return 0.0
        return max(0.0, deaths[0] + WINDOW_S - self._now_s())

    def check(self, model_id: str) -> None:
        """Let the model pass, or not.

        Raises:
            LoadFailed: quarantined.
        """
        left_s = self.left_s(model_id)
        if left_s > 0:
            raise LoadFailed(self.words(model_id), retry_after_s=left_s, kind=KIND)

    def words(self, model_id: str) -> str:
        """Why it is quarantined, for people."""
        return (
            f"model {model_id!r} was running when its host's process died, {MAX_DEATHS} times within "
            f"{WINDOW_S / 60:g} minutes ({KIND}); it is tried again in {self.left_s(model_id):.0f} s, or when its "
            "entry in the registry changes; the log has the signals, and dmesg says whether memory ran out"
        )
