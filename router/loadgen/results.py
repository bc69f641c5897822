"""What a load comes to while it runs: totals, percentiles and every second by itself. Fed with samples as they come."""

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct, field


class Sample(Struct, frozen=True):
    """One request's life: when it was due, how long its answer took from then on, its texts, its status (0: none).

    `late_s`: of the latency, how long it took this client to begin: much of it, and the client is the bottleneck.
    """

    due_s: float
    latency_s: float
    num_texts: int
    status: int
    late_s: float = 0.0


class Outcome(Struct, frozen=True, kw_only=True):
    """What a phase of load found.

    `client_cores`: cores this client kept busy; `samples` in the order of completion; `errors`: failures by kind, and
    `messages`: what was said of the first one of each kind.
    """

    wall_s: float
    client_cores: float
    samples: tuple[Sample, ...]
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def texts_per_s(self) -> float:
        """Of the requests that succeeded."""
        return sum(sample.num_texts for sample in self.samples if sample.status == 200) / self.wall_s

    @property
    def num_failed(self) -> int:
        """Requests without an answer of status 200."""
        return sum(1 for sample in self.samples if sample.status != 200)

    def latency_s(self, share: float) -> float:
        """Percentile of the latencies of requests that succeeded.

        Raises:
            ValueError: none did.
        """
        return percentile([sample.latency_s for sample in self.samples if sample.status == 200], share)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` (0 to 1) of all do not exceed.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples, so no percentile")
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[min(len(ordered), int(rank)) - 1]


class Latency(Struct, frozen=True):
    """Percentiles of the requests that succeeded, in seconds, counted from when each was due."""

    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Figures(Struct, frozen=True, kw_only=True):
    """A load so far. `tokens_per_s` None: this server does not count them; `latency_s` None: nothing succeeded yet."""

    seconds: float
    requests: int
    failed: int
    texts_per_s: float
    tokens_per_s: float | None
    latency_s: Latency | None
    texts_each_s: tuple[int, ...]
    """Texts answered in each second that is over."""


class Moment(Struct, frozen=True, kw_only=True):
    """One second of a load, by when the answers came."""

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


class Tally:
    """Counts the samples of one phase, which begins at `started_s` of the samples' clock."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._latencies_s = array("d")
        self._late_s = array("d")
        self._seconds: dict[int, _Second] = {}

    def add(self, sample: Sample, body: bytes) -> None:
        """One request that is done; of its answer only the count of tokens is read."""
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
        """Everything up to now."""
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
        """Second by second, those in which nothing came included."""
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
        """How late this client itself was with one request in a hundred."""
        found = latency(self._late_s)
        return 0.0 if found is None else found.p99

    def _texts(self, at_s: int) -> int:
        second = self._seconds.get(at_s)
        return second.texts if second else 0


def latency(seconds: "array[float] | Sequence[float]") -> Latency | None:
    """Percentiles: the smallest value that so large a share does not exceed. None of nothing."""
    if not len(seconds):
        return None
    # A copy: an array whose buffer is on loan cannot grow.
    found = np.percentile(np.array(seconds), (50, 90, 95, 99, 100), method="inverted_cdf")
    return Latency(*map(float, found))


def _tokens(body: bytes) -> int:
    """Vectors are skipped, not decoded: a microsecond for one in base64, 0.6 ms for 32 of 384 floats in JSON."""
    try:
        usage = msgspec.json.decode(body, type=_Body).usage
    except msgspec.DecodeError:
        return 0
    return 0 if usage is None else usage.prompt_tokens
