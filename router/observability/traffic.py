"""The last minute of each model, for whoever watches: counted in steps of five seconds, and forgotten after twelve.

`/metrics` has the same and more, but its text is long with many models, and its histograms are too coarse for a minute
of one model. Knows no routes; belongs to the event loop.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection
from msgspec import Struct

from router.observability.request_context import RequestContext

STEP_S = 5.0
STEPS = 12

_RESOLUTION = math.log(1.05)
_SHORTEST_S = 1e-4


class MinuteStats(Struct, frozen=True):
    """One model. `texts_per_s_by_step`: the steps that are over, oldest first; `p50_s` and `p95_s` are right to 3 %."""

    texts_per_s: float
    tokens_per_s: float
    texts_per_s_by_step: tuple[float, ...]
    p50_s: float
    p95_s: float


class _Step:
    """`seconds`: requests by the logarithm of how long they took."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.texts = self.tokens = 0
        self.seconds: Counter[int] = Counter()


class Traffic:
    """`clock`: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._steps: dict[str, deque[_Step]] = {}

    def record(self, visit: RequestContext) -> None:
        """A visit that has ended. Only embeddings that were answered count."""
        if visit.answer is None or visit.status != 200:
            return
        step = self._step(visit.model)
        step.texts += len(visit.answer.token_counts)
        step.tokens += sum(visit.answer.token_counts)
        step.seconds[_bucket(visit.seconds)] += 1

    def _step(self, model_id: str) -> _Step:
        number = int(self._clock() // STEP_S)
        steps = self._steps.get(model_id)
        if steps is None:
            steps = self._steps[model_id] = deque(maxlen=STEPS + 1)
        if not steps or steps[-1].number != number:
            steps.append(_Step(number))
        return steps[-1]

    def last_minute(self) -> dict[str, MinuteStats]:
        """Every model that answered within it."""
        now_s = self._clock()
        number = int(now_s // STEP_S)
        window_s = max(1.0, min(STEPS * STEP_S + now_s % STEP_S, now_s - self._began_s))
        found = {}
        for model_id, steps in list(self._steps.items()):
            recent = [step for step in steps if step.number >= number - STEPS]
            if recent:
                found[model_id] = _minute(recent, number, window_s)
            else:
                del self._steps[model_id]
        return found


def _minute(steps: list[_Step], now: int, window_s: float) -> MinuteStats:
    texts = {step.number: step.texts for step in steps}
    seconds = sum((step.seconds for step in steps), Counter[int]())
    return MinuteStats(
        texts_per_s=sum(texts.values()) / window_s,
        tokens_per_s=sum(step.tokens for step in steps) / window_s,
        texts_per_s_by_step=tuple(texts.get(number, 0) / STEP_S for number in range(now - STEPS, now)),
        p50_s=_percentile(seconds, 0.50),
        p95_s=_percentile(seconds, 0.95),
    )


def _bucket(seconds: float) -> int:
    """Each is 5 % longer than the one before."""
    return round(math.log(max(seconds, _SHORTEST_S)) / _RESOLUTION)


def _percentile(counts: Counter[int], share: float) -> float:
    """The middle of the bucket in which it lies."""
    left = share * counts.total()
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            break
    return math.exp(bucket * _RESOLUTION)


def traffic_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Traffic:
    """Return the traffic counters of the server that a connection belongs to."""
    traffic: Traffic = connection.app.state.traffic
    return traffic
