"""Counts worker crashes by the models that ran, and quarantines a model after three crashes within ten minutes.

A model that crashes its host would otherwise take all others down with it, again and again. A crash has one cause, so
of the models that ran, only the one with the most crashes is quarantined. Pure except for the clock.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from msgspec import Struct

from engines.errors import LoadFailed

MAX_CRASHES = 3
WINDOW_S = 600.0
KIND = "kills_host"
"""Kind of `LoadFailed` in metrics and in the response's message."""


class _Crash(Struct, frozen=True):
    """Time of a crash and the models that were running, the most suspect last."""

    at_s: float
    models: tuple[str, ...]


class CrashCounter:
    """Decides from crashes which models are quarantined, and until when.

    Args:
        now_s: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._crashes: list[_Crash] = []
        self._until_s: dict[str, float] = {}

    def record_crash(self, model_ids: Iterable[str]) -> None:
        """Record that a worker crashed while these models ran, the most suspect last."""
        models = tuple(dict.fromkeys(model_ids))
        if not models:
            return
        now_s = self._now_s()
        self._crashes = [crash for crash in self._crashes if crash.at_s > now_s - WINDOW_S]
        self._crashes.append(_Crash(now_s, models))
        counts = Counter(model_id for crash in self._crashes for model_id in crash.models)
        suspect = max(enumerate(models), key=lambda pair: (counts[pair[1]], pair[0]))[1]
        if counts[suspect] >= MAX_CRASHES:
            caused = [crash for crash in self._crashes if suspect in crash.models]
            self._until_s[suspect] = caused[-MAX_CRASHES].at_s + WINDOW_S
            # explained now, so they count against no other model
            self._crashes = [crash for crash in self._crashes if suspect not in crash.models]

    def clear(self, model_id: str) -> None:
        """Drop a model's crashes and quarantine: its source, revision or settings have changed."""
        self._until_s.pop(model_id, None)
        left = (
            _Crash(crash.at_s, tuple(other for other in crash.models if other != model_id)) for crash in self._crashes
        )
        self._crashes = [crash for crash in left if crash.models]

    def left_s(self, model_id: str) -> float:
        """Return how long the model stays quarantined; 0 when it is not."""
        return max(0.0, self._until_s.get(model_id, 0.0) - self._now_s()) if model_id in self._until_s else 0.0

    def check(self, model_id: str) -> None:
        """Refuse a quarantined model.

        Raises:
            LoadFailed: the model is quarantined.
        """
        left_s = self.left_s(model_id)
        if left_s > 0:
            raise LoadFailed(self.reason(model_id), retry_after_s=left_s, kind=KIND)

    def reason(self, model_id: str) -> str:
        """Return the message that explains the quarantine."""
        return (
            f"model {model_id!r} was running in {MAX_CRASHES} crashes of a worker process within {WINDOW_S / 60:g} "
            f"minutes ({KIND}); retried in {self.left_s(model_id):.0f} s or when its registry entry changes; see the "
            "log for the signals, and dmesg for out-of-memory kills"
        )
