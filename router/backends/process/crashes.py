"""Counts worker crashes by the models that ran, and quarantines a model after three crashes within ten minutes.

A model that crashes its host would otherwise take all others down with it, again and again. A crash has one cause, so
of the models that ran, only the one with the most crashes is quarantined. The first quarantine is short, as the cause
may be gone; a model that crashes its host again within ten minutes of its return gets the next longer one at once, and
so ends with one crash in ten minutes. Pure except for the clock.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from msgspec import Struct

from engines.errors import LoadFailed

MAX_CRASHES = 3
WINDOW_S = 600.0
QUARANTINES_S = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Lengths of a model's quarantines, one after the other."""

KIND = "kills_host"
"""Kind of `LoadFailed` in metrics and in the response's message."""


class _Crash(Struct, frozen=True):
    """Time of a crash and the models that were running, the most suspect last."""

    at_s: float
    models: tuple[str, ...]


class _Quarantine(Struct, frozen=True):
    """A model's last quarantine: when it ends or has ended, its place in the row, and the crashes that led to it."""

    until_s: float
    place: int
    num_crashes: int


class CrashCounter:
    """Decides from crashes which models are quarantined, and until when.

    Args:
        now_s: monotonic seconds.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._crashes: list[_Crash] = []
        self._quarantines: dict[str, _Quarantine] = {}

    def record_crash(self, model_ids: Iterable[str]) -> str | None:
        """Record that a worker crashed while these models ran, the most suspect last.

        Returns:
            The model that is quarantined for it, if any.
        """
        models = tuple(dict.fromkeys(model_ids))
        if not models:
            return None
        now_s = self._now_s()
        self._quarantines = {
            model_id: last for model_id, last in self._quarantines.items() if last.until_s > now_s - WINDOW_S
        }
        self._crashes = [crash for crash in self._crashes if crash.at_s > now_s - WINDOW_S]
        self._crashes.append(_Crash(now_s, models))
        counts = Counter(model_id for crash in self._crashes for model_id in crash.models)
        for model_id, last in self._quarantines.items():
            if model_id in models and last.until_s <= now_s:  # else the call was sent before
                counts[model_id] += MAX_CRASHES - 1
        suspect = max(enumerate(models), key=lambda pair: (counts[pair[1]], pair[0]))[1]
        if counts[suspect] < MAX_CRASHES:
            return None
        self._quarantine(suspect, now_s)
        # explained now, so they count against no other model
        self._crashes = [crash for crash in self._crashes if suspect not in crash.models]
        return suspect

    def _quarantine(self, model_id: str, now_s: float) -> None:
        last = self._quarantines.get(model_id)
        place = 0 if last is None else min(last.place + 1, len(QUARANTINES_S) - 1)
        num_crashes = sum(model_id in crash.models for crash in self._crashes)
        num_crashes += 0 if last is None else last.num_crashes
        self._quarantines[model_id] = _Quarantine(now_s + QUARANTINES_S[place], place, num_crashes)

    def clear(self, model_id: str) -> None:
        """Drop a model's crashes and quarantine: its source, revision or settings have changed."""
        self._quarantines.pop(model_id, None)
        left = (
            _Crash(crash.at_s, tuple(other for other in crash.models if other != model_id)) for crash in self._crashes
        )
        self._crashes = [crash for crash in left if crash.models]

    def left_s(self, model_id: str) -> float:
        """Return how long the model stays quarantined; 0 when it is not."""
        last = self._quarantines.get(model_id)
        return 0.0 if last is None else max(0.0, last.until_s - self._now_s())

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
        last = self._quarantines[model_id]
        within = f" within {WINDOW_S / 60:g} minutes" if last.place == 0 else ""
        return (
            f"model {model_id!r} was running in {last.num_crashes} crashes of a worker process{within} ({KIND}); "
            f"retried in {self.left_s(model_id):.0f} s or when its registry entry changes; see the log for the "
            "signals, and dmesg for out-of-memory kills"
        )
