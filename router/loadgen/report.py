"""`Report`: the results of a run of `embedyard bench`, as written in JSON. Durations are in seconds."""

import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from router.loadgen.http_client import Route
from router.loadgen.phases import Phase
from router.loadgen.results import Figures, Latency, Moment, Outcome, PhaseStats


class Failure(Struct, frozen=True):
    """Number of failures of one kind, and the message of the first one."""

    count: int
    message: str


class Measured(Struct, frozen=True, kw_only=True):
    """Results of one phase.

    `client_cores`: cores this client used; `client_late_p99_s`: p99 of how late it sent requests. When the former is
    near 1, or the latter near the latencies, the client was the bottleneck and not the server.
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
    def is_client_bound(self) -> bool:
        """Whether the client was the bottleneck."""
        p50_s = self.latency_s.p50 if self.latency_s else 0.0
        return self.client_cores > 0.9 or self.client_late_p99_s > max(0.02, p50_s)


class Report(Struct, frozen=True, kw_only=True):
    """Results of a run. `dimensions`: of the received vectors, None for scores; `words` None: texts from a file.

    `is_whole`: false when it was interrupted by Ctrl+C. `embedyard`: version of this client, not of the server.
    """

    url: str
    model: str
    route: Route
    dimensions: int | None
    texts_per_request: int
    words: int | None
    started_at: str
    embedyard: str
    is_whole: bool
    phases: list[Measured]


def summarize(phase: Phase, outcome: Outcome, stats: PhaseStats) -> Measured:
    """Build the results of a completed phase."""
    figures: Figures = stats.figures(time.perf_counter())
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
        client_late_p99_s=stats.late_p99_s(),
        timeline=stats.timeline(),
    )


def now() -> str:
    """Return the current time for `started_at`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def as_json(report: Report) -> str:
    """Encode the report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def save(report: Report, path: Path) -> None:
    """Write the report as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(report) + "\n", encoding="utf-8")
