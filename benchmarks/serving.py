"""`python -m benchmarks.serving [URL]`: load on any OpenAI-compatible embeddings server, closed and open, percentiles.

Without a URL our own server is started with MiniLM and default settings. Closed: so many clients, each waiting for its
answer; open: so many requests a second at random moments, whether or not the server keeps up.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.folders import resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.report import RESULTS, Report, publish
from benchmarks.servers import own, serving, write_registry
from router import loadgen as load
from router.loadgen import Outcome, Phase
from router.loadgen.http_client import Request, Target, encode

HEADER = (
    "load", "texts/s", "requests", "failed", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "max ms", "client, cores",
)  # fmt: skip


def num_requests(texts_per_request: int) -> int:
    """Different requests, sent again and again: so many that no two under way at once are the same."""
    return max(64, 512 // texts_per_request)


def make_requests(
    target: Target, folder: Path, workload: str, texts_per_request: int, encoding_format: str = "base64"
) -> list[Request]:
    """Requests of one workload, of lengths as the model in `folder` counts them."""
    num_texts = num_requests(texts_per_request) * texts_per_request
    texts = workloads.make(workload, num_texts, workloads.counter(folder))
    return [encode(target, call, encoding_format) for call in texts.calls(texts_per_request)]


def measure(target: Target, requests: Sequence[Request], phase: Phase, seconds: float) -> Outcome:
    """One phase."""
    return load.run(lambda: load.send(target, requests, phase, until=load.after_s(seconds)))


def row(name: str, outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    has_any = outcome.num_failed < len(outcome.samples)
    latencies = [f"{1000 * outcome.latency_s(share):.1f}" if has_any else "–" for share in (0.5, 0.9, 0.95, 0.99, 1.0)]
    return (
        name,
        f"{outcome.texts_per_s:,.1f}",
        str(len(outcome.samples)),
        str(outcome.num_failed),
        *latencies,
        f"{outcome.client_cores:.2f}",
    )


def summary(outcome: Outcome) -> dict[str, Any]:
    """What of an outcome is kept."""
    succeeded = [sample.latency_s for sample in outcome.samples if sample.status == 200]
    return {
        "texts_per_s": outcome.texts_per_s,
        "wall_s": outcome.wall_s,
        "client_cores": outcome.client_cores,
        "errors": outcome.errors,
        "latencies_s": [round(latency, 6) for latency in succeeded],
    }


def run(target: Target, requests: Sequence[Request], phases: Sequence[Phase], seconds: float, about: str) -> Report:
    """All phases, after one second that is not counted."""
    watch = Watch()
    warn_if_busy(watch.machine)
    measure(target, requests, phases[0], min(1.0, seconds))
    outcomes = [(str(phase), measure(target, requests, phase, seconds)) for phase in phases]
    errors = {kind: count for _, outcome in outcomes for kind, count in outcome.errors.items()}
    return Report(
        name="serving",
        title=f"HTTP, {about}",
        machine=watch.machine,
        settings={"url": target.url, "model": target.model, "seconds": seconds},
        header=HEADER,
        rows=[row(name, outcome) for name, outcome in outcomes],
        samples={name: summary(outcome) for name, outcome in outcomes},
        notes=tuple(f"failed with {kind}: {count}" for kind, count in errors.items()),
    )


@contextmanager
def own_server(folder: Path, model: str = "minilm") -> Iterator[Target]:
    """Our server with one model and default settings."""
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {model: folder})
        with serving(own(registry, model)) as server:
            yield server.target


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("url", nargs="?", help="of the server; left out, ours is started with MiniLM")
    parser.add_argument("--model", default="minilm", help="as the server calls it")
    parser.add_argument("--api-key")
    parser.add_argument("--tokenizer", default="minilm", help="folder whose tokenizer measures the texts")
    parser.add_argument("--workload", default="short", choices=workloads.NAMES)
    parser.add_argument("--texts", type=int, default=1, help="texts a request")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32, 64], help="closed loads")
    parser.add_argument("--per-second", type=float, nargs="*", default=[], help="open loads, requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--format", default="base64", choices=["base64", "float"])
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    asked = _arguments()
    folder = resolve(asked.tokenizer)
    phases = [Phase(clients=number) for number in asked.clients] + [Phase(per_s=rate) for rate in asked.per_second]

    def measured(target: Target) -> Report:
        requests = make_requests(target, folder, asked.workload, asked.texts, asked.format)
        return run(target, requests, phases, asked.seconds, f"{asked.texts} × {asked.workload}, {asked.format}")

    if asked.url:
        report = measured(Target(asked.url, asked.model, asked.api_key))
    else:
        with own_server(folder, asked.model) as target:
            report = measured(target)
    publish(report, asked.results)


if __name__ == "__main__":
    main()
