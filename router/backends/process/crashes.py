"""Which models were running when worker processes died. Three deaths within ten minutes, and the model is quarantined.

A model that kills its host would otherwise take all others down with it, again and again. A death has one cause, so of
those that ran at once only the one is quarantined that ran in most of the deaths. Pure but for the clock.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from msgspec import Struct

from engines.errors import LoadFailed

MAX_DEATHS = 3
WINDOW_S = 600.0
KIND = "kills_host"
"""The kind of `LoadErrored` in metrics and in the answer's message."""


class _Death(Struct, frozen=True):
    """When, and which models were running, the most suspect last."""

    at_s: float
    models: tuple[str, ...]


class CrashCounter:
    """Deaths, and what follows from them.

    Args:
        now_s: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._deaths: list[_Death] = []
        self._until_s: dict[str, float] = {}

    def record_crash(self, model_ids: Iterable[str]) -> None:
        """A worker died while these were running, the most suspect last."""
        models = tuple(dict.fromkeys(model_ids))
        if not models:
            return
        now_s = self._now_s()
        self._deaths = [death for death in self._deaths if death.at_s > now_s - WINDOW_S]
        self._deaths.append(_Death(now_s, models))
        counts = Counter(model_id for death in self._deaths for model_id in death.models)
        suspect = max(enumerate(models), key=lambda pair: (counts[pair[1]], pair[0]))[1]
        if counts[suspect] >= MAX_DEATHS:
            own = [death for death in self._deaths if suspect in death.models]
            self._until_s[suspect] = own[-MAX_DEATHS].at_s + WINDOW_S
            self._deaths = [death for death in self._deaths if suspect not in death.models]  # nobody else's any more

    def clear(self, model_id: str) -> None:
        """The model is another one now: its source, revision or settings have changed."""
        self._until_s.pop(model_id, None)
        left = (
            _Death(death.at_s, tuple(other for other in death.models if other != model_id)) for death in self._deaths
        )
        self._deaths = [death for death in left if death.models]

    def left_s(self, model_id: str) -> float:
        """How long the model stays quarantined; 0 when it is not."""
        return max(0.0, self._until_s.get(model_id, 0.0) - self._now_s()) if model_id in self._until_s else 0.0

    def check(self, model_id: str) -> None:
        """Let the model pass, or not.

        Raises:
            LoadFailed: quarantined.
        """
        left_s = self.left_s(model_id)
        if left_s > 0:
            raise LoadFailed(self.reason(model_id), retry_after_s=left_s, kind=KIND)

    def reason(self, model_id: str) -> str:
        """Why it is quarantined, for people."""
        return (
            f"model {model_id!r} was running when its host's process died, {MAX_DEATHS} times within "
            f"{WINDOW_S / 60:g} minutes ({KIND}); it is tried again in {self.left_s(model_id):.0f} s, or when its "
            "entry in the registry changes; the log has the signals, and dmesg says whether memory ran out"
        )
