"""Summarizes a load while it runs: totals, percentiles and a timeline per second."""

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct, field


class Sample(Struct, frozen=True):
    """One request: when it was due, its latency from then on, its texts, its status (0: no response).

    `late_s`: part of the latency before the client sent it; if large, the client is the bottleneck.
    """

    due_s: float
    latency_s: float
    num_texts: int
    status: int
    late_s: float = 0.0


class Outcome(Struct, frozen=True, kw_only=True):
    """Result of one phase.

    `client_cores`: cores this client used; `samples` in the order of completion; `errors`: failures by kind, and
    `messages`: the message of the first one of each kind.
    """

    wall_s: float
    client_cores: float
    samples: tuple[Sample, ...]
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def texts_per_s(self) -> float:
        """Throughput of the requests that succeeded."""
        return sum(sample.num_texts for sample in self.samples if sample.status == 200) / self.wall_s

    @property
    def num_failed(self) -> int:
        """Number of requests without a response of status 200."""
        return sum(1 for sample in self.samples if sample.status != 200)

    def latency_s(self, share: float) -> float:
        """Return a percentile of the latencies of requests that succeeded.

        Raises:
            ValueError: none succeeded.
        """
        return percentile([sample.latency_s for sample in self.samples if sample.status == 200], share)


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` (0 to 1) of all do not exceed.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples, so no percentile")
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[min(len(ordered), int(rank)) - 1]


class Latency(Struct, frozen=True):
    """Latency percentiles of the requests that succeeded, in seconds from when each was due."""

    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Figures(Struct, frozen=True, kw_only=True):
    """Totals so far. `tokens_per_s` None: the server does not count tokens; `latency_s` None: nothing succeeded yet."""

    seconds: float
    requests: int
    failed: int
    texts_per_s: float
    tokens_per_s: float | None
    latency_s: Latency | None
    texts_each_s: tuple[int, ...]
    """Texts answered in each completed second."""


class Moment(Struct, frozen=True, kw_only=True):
    """One second of a load, by time of completion."""

    at_s: int
    requests: int
    failed: int
    texts: int
    tokens: int
    latency_s: Latency | None


class _Usage(Struct):
    prompt_tokens: int = 0


class _Body(Struct):
    usage: _Usage | None = None


class _Second:
    def __init__(self) -> None:
        self.failed = self.texts = self.tokens = 0
        self.latencies_s = array("d")


class PhaseStats:
    """Collects the samples of one phase, which began at `started_s` on the samples' clock."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._latencies_s = array("d")
        self._late_s = array("d")
        self._seconds: dict[int, _Second] = {}

    def add(self, sample: Sample, body: bytes) -> None:
        """Add a completed request; of its response only the token count is decoded."""
        done_s = sample.due_s + sample.latency_s - self._started_s
        second = self._seconds.setdefault(max(0, int(done_s)), _Second())
        self._late_s.append(sample.late_s)
        if sample.status != 200:
            second.failed += 1
            return
        self._latencies_s.append(sample.latency_s)
        second.latencies_s.append(sample.latency_s)
        second.texts += sample.num_texts
        second.tokens += _tokens(body)

    def figures(self, now_s: float) -> Figures:
        """Compute the totals up to now."""
        seconds = max(now_s - self._started_s, 1e-9)
        every = self._seconds.values()
        tokens = sum(second.tokens for second in every)
        failed = sum(second.failed for second in every)
        return Figures(
            seconds=seconds,
            requests=len(self._latencies_s) + failed,
            failed=failed,
            texts_per_s=sum(second.texts for second in every) / seconds,
            tokens_per_s=tokens / seconds if tokens else None,
            latency_s=latency(self._latencies_s),
            texts_each_s=tuple(self._texts(at_s) for at_s in range(int(seconds))),
        )

    def timeline(self) -> list[Moment]:
        """Return all seconds, including empty ones."""
        empty = _Second()
        ordered = [self._seconds.get(at_s, empty) for at_s in range(max(self._seconds, default=-1) + 1)]
        return [
            Moment(
                at_s=at_s,
                requests=len(second.latencies_s) + second.failed,
                failed=second.failed,
                texts=second.texts,
                tokens=second.tokens,
                latency_s=latency(second.latencies_s),
            )
            for at_s, second in enumerate(ordered)
        ]

    def late_p99_s(self) -> float:
        """Return the p99 of how late this client sent requests."""
        found = latency(self._late_s)
        return 0.0 if found is None else found.p99

    def _texts(self, at_s: int) -> int:
        second = self._seconds.get(at_s)
        return second.texts if second else 0


def latency(seconds: "array[float] | Sequence[float]") -> Latency | None:
    """Compute percentiles (inverted CDF); None without values."""
    if not len(seconds):
        return None
    # A copy: an array whose buffer is exported cannot grow.
    found = np.percentile(np.array(seconds), (50, 90, 95, 99, 100), method="inverted_cdf")
    return Latency(*map(float, found))


def _tokens(body: bytes) -> int:
    """Read the token count. Vectors are not decoded: 1 µs for one in base64, 0.6 ms for 32 of 384 JSON floats."""
    try:
        usage = msgspec.json.decode(body, type=_Body).usage
    except msgspec.DecodeError:
        return 0
    return 0 if usage is None else usage.prompt_tokens
