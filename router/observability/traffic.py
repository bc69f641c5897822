"""`Traffic`: statistics of the last minute per model, in twelve steps of five seconds, for the dashboard.

`/metrics` has the same and more, but its text is long with many models, and its histograms are too coarse for a minute
of one model. Independent of routes; used from the event loop only.
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
    """Statistics of one model. `texts_per_s_by_step`: completed steps, oldest first; `p50_s`, `p95_s`: within 3 %."""

    texts_per_s: float
    tokens_per_s: float
    texts_per_s_by_step: tuple[float, ...]
    p50_s: float
    p95_s: float


class _Step:
    """Counts of one step. `seconds`: requests by logarithmic duration bucket."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.texts = self.tokens = 0
        self.seconds: Counter[int] = Counter()


class Traffic:
    """Records requests per model and step. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._steps: dict[str, deque[_Step]] = {}

    def record(self, context: RequestContext) -> None:
        """Count a request that has ended, if it returned embeddings."""
        if context.answer is None or context.status != 200:
            return
        step = self._step(context.model)
        step.texts += len(context.answer.token_counts)
        step.tokens += sum(context.answer.token_counts)
        step.seconds[_bucket(context.seconds)] += 1

    def _step(self, model_id: str) -> _Step:
        number = int(self._clock() // STEP_S)
        steps = self._steps.get(model_id)
        if steps is None:
            steps = self._steps[model_id] = deque(maxlen=STEPS + 1)
        if not steps or steps[-1].number != number:
            steps.append(_Step(number))
        return steps[-1]

    def last_minute(self) -> dict[str, MinuteStats]:
        """Return the statistics of every model with traffic in the last minute."""
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
    """Return the duration's bucket; each is 5 % longer than the previous one."""
    return round(math.log(max(seconds, _SHORTEST_S)) / _RESOLUTION)


def _percentile(counts: Counter[int], share: float) -> float:
    """Return the middle of the bucket that contains the percentile."""
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
