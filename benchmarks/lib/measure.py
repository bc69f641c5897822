"""Compares programs: interleaved rounds (A B A B …), medians, ratios of medians, and the spread of pairs.

Knows nothing of models: a contestant is something that does given work and says how many seconds it took.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from router.loadgen.results import percentile as percentile  # beside the other ways to sum up samples

Item = TypeVar("Item")
Run = Callable[[], float]
"""Does the work once; what it returns is the sample: seconds, or texts a second."""

SETTLE_S = 0.3
"""Threads of torch, oneDNN and ONNX Runtime spin for a while after their work; the next one must not meet them."""

PROGRESS_S = 10.0
"""A benchmark that runs for longer tells how far it is."""


class Contestant(Protocol):
    """One program under test, warm."""

    @property
    def name(self) -> str:
        """As tables show it."""

    def seconds(self, calls: Sequence[Sequence[str]]) -> float:
        """Embed all texts of all calls, one call after the other; the time that took."""


class Ratio(Struct, frozen=True):
    """How many times as fast as the base: the ratio of the medians, and the worst and best pair of one round."""

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether the rounds disagree about who is faster."""
        return self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


def interleave(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    settle_s: float = SETTLE_S,
    is_warm: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Every run once a round, one sample each; who begins changes from round to round, so that drift hits all alike.

    `is_warm`: false runs each once before, uncounted.
    """
    for warm_up in () if is_warm else runs.values():
        warm_up()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in with_progress(range(rounds), "round"):
        for name in _rotated(list(runs), number):
            sleep(settle_s)
            samples[name].append(runs[name]())
    return samples


def with_progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items; every few seconds, a line on stderr tells how far that is and how long it may still take."""
    began_s = told_s = time.perf_counter()
    for number, item in enumerate(items):
        now_s = time.perf_counter()
        if number and now_s - told_s >= PROGRESS_S:
            told_s = now_s
            left_s = (now_s - began_s) / number * (len(items) - number)
            print(f"{what} {number} of {len(items)} done, about {left_s:.0f} s left", file=sys.stderr, flush=True)
        yield item


def _rotated(names: list[str], by: int) -> Iterator[str]:
    start = by % len(names) if names else 0
    yield from names[start:]
    yield from names[:start]


def speedup(samples_s: Sequence[float], base_s: Sequence[float]) -> Ratio:
    """Of seconds: how many times as fast as the base."""
    pairs = [base / own for own, base in zip(samples_s, base_s, strict=True)]
    return Ratio(statistics.median(base_s) / statistics.median(samples_s), min(pairs), max(pairs))


def quotient(samples: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of rates (or of times where more is worse): how many times the base."""
    return speedup(base, samples)
