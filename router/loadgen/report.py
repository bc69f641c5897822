"""What a run of `embedyard bench` found, as it is kept in JSON. Durations are in seconds."""

import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from router.loadgen.phases import Phase
from router.loadgen.results import Figures, Latency, Moment, Outcome, Tally


class Failure(Struct, frozen=True):
    """Failures of one kind, and what was said of the first of them."""

    count: int
    message: str


class Measured(Struct, frozen=True, kw_only=True):
    """One phase.

    `client_cores`: cores this client kept busy; `client_late_p99_s`: how late it was with one request in a hundred.
    Where the one nears 1, or the other the latencies, the client was measured and not the server.
    """

    load: str
    clients: int
    requests_per_s: float
    seconds: float
    requests: int
    failed: int
    texts_per_s: float
    tokens_per_s: float | None
    latency_s: Latency | None
    failures: dict[str, Failure]
    client_cores: float
    client_late_p99_s: float
    timeline: list[Moment]

    @property
    def is_clients_own(self) -> bool:
        """Whether these figures are the client's limits rather than the server's."""
        p50_s = self.latency_s.p50 if self.latency_s else 0.0
        return self.client_cores > 0.9 or self.client_late_p99_s > max(0.02, p50_s)


class Report(Struct, frozen=True, kw_only=True):
    """A run. `dimensions`: of the vectors that came; `words` None: the texts came from a file.

    `is_whole`: false when Ctrl+C ended it early.

    `embedyard`: the version that measured, which need not be that of the server.
    """

    url: str
    model: str
    dimensions: int
    texts_per_request: int
    words: int | None
    started_at: str
    embedyard: str
    is_whole: bool
    phases: list[Measured]


def summed_up(phase: Phase, outcome: Outcome, tally: Tally) -> Measured:
    """One phase that is over."""
    figures: Figures = tally.figures(time.perf_counter())
    return Measured(
        load=str(phase),
        clients=phase.clients,
        requests_per_s=phase.per_s,
        seconds=figures.seconds,
        requests=figures.requests,
        failed=figures.failed,
        texts_per_s=figures.texts_per_s,
        tokens_per_s=figures.tokens_per_s,
        latency_s=figures.latency_s,
        failures={kind: Failure(n, outcome.messages.get(kind, "")) for kind, n in outcome.errors.items()},
        client_cores=outcome.client_cores,
        client_late_p99_s=tally.late_p99_s(),
        timeline=tally.timeline(),
    )


def now() -> str:
    """For `started_at`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def as_json(report: Report) -> str:
    """For people, too."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def save(report: Report, path: Path) -> None:
    """Write it.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(report) + "\n", encoding="utf-8")
