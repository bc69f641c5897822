"""What a phase of load found, request by request, and what it comes to. Knows nothing of how it was sent."""

from collections.abc import Sequence

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
