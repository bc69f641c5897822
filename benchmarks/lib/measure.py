"""Compares programs: interleaved rounds (A B A B …), medians, ratios of medians, and the spread of pairs.

It is independent of models: a contestant does given work and returns the seconds that it took.
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
"""Does the work once and returns the sample: seconds, or texts a second."""

SETTLE_S = 0.3
"""Pause between two runs: threads of torch, oneDNN and ONNX Runtime spin for a while after their work."""

PROGRESS_S = 10.0
"""Interval of progress lines."""


class Contestant(Protocol):
    """One program under test, warm."""

    @property
    def name(self) -> str:
        """Return the name shown in tables."""

    def seconds(self, calls: Sequence[Sequence[str]]) -> float:
        """Embed all texts of all calls, one call after the other, and return the seconds."""


class Ratio(Struct, frozen=True):
    """Speed relative to the base: the ratio of the medians, and the worst and best pair of one round."""

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Tell whether the rounds disagree about which is faster."""
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
    """Take one sample of every run per round; the order rotates, so that drift of the machine affects all alike.

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
    """Yield the items; every `PROGRESS_S`, print progress and an estimate of the remaining time to stderr."""
    began_s = printed_s = time.perf_counter()
    for number, item in enumerate(items):
        now_s = time.perf_counter()
        if number and now_s - printed_s >= PROGRESS_S:
            printed_s = now_s
            left_s = (now_s - began_s) / number * (len(items) - number)
            print(f"{what} {number} of {len(items)} done, about {left_s:.0f} s left", file=sys.stderr, flush=True)
        yield item


def _rotated(names: list[str], by: int) -> Iterator[str]:
    start = by % len(names) if names else 0
    yield from names[start:]
    yield from names[:start]


def speedup(samples_s: Sequence[float], base_s: Sequence[float]) -> Ratio:
    """Return the speed relative to the base, from seconds."""
    pairs = [base / own for own, base in zip(samples_s, base_s, strict=True)]
    return Ratio(statistics.median(base_s) / statistics.median(samples_s), min(pairs), max(pairs))


def quotient(samples: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the ratio to the base, from rates (or from times, where a larger ratio is worse)."""
    return speedup(base, samples)
