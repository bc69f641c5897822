"""`python -m benchmarks.fairness`: does one client's bulk job make another's query wait?

Single queries arrive at random moments, first alone and then while a request of 2,048 texts runs; the bulk request
runs alone too. Over HTTP, on our server with default settings, in interleaved rounds. `two_models.py` has the other
half: two models on one device.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from msgspec import Struct

from benchmarks import workloads
from benchmarks.folders import resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.measure import percentile, quotient
from benchmarks.report import RESULTS, Report, publish
from benchmarks.serving import make_requests, own_server, summary
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode

BULK_TEXTS = 2048
PER_S = 5.0
IDLE_S = 20.0


class Round(Struct, frozen=True):
    """The four phases: queries alone, bulk alone, and both at once."""

    idle: Outcome
    alone: Outcome
    queries: Outcome
    bulk: Outcome


def measure(target: Target, bulk: Request, queries: Sequence[Request], per_s: float, idle_s: float) -> Round:
    """One round.

    Raises:
        OSError: a request failed.
    """
    idle = load.run(lambda: load.opened(target, queries, per_s, until=load.after_s(idle_s)))
    alone = load.run(lambda: load.closed(target, [bulk], 1, until=load.after(1)))
    beside, both = load.run(lambda: _both(target, bulk, queries, per_s))
    for outcome in (idle, alone, beside, both):
        if outcome.num_failed or not outcome.samples:
            raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return Round(idle, alone, beside, both)


async def _both(target: Target, bulk: Request, queries: Sequence[Request], per_s: float) -> tuple[Outcome, Outcome]:
    """Queries for as long as the bulk request runs."""
    running = asyncio.create_task(load.closed(target, [bulk], 1, until=load.after(1)))
    beside = await load.opened(target, queries, per_s, until=lambda sent, _gone_s: running.done() and sent > 0)
    return beside, await running


def rows(rounds: Sequence[Round]) -> list[tuple[str, ...]]:
    """Table rows: latencies of all rounds together, speeds by their medians."""
    idle = [sample.latency_s for one in rounds for sample in one.idle.samples]
    busy = [sample.latency_s for one in rounds for sample in one.queries.samples]
    alone, both = [one.alone.texts_per_s for one in rounds], [one.bulk.texts_per_s for one in rounds]
    share = quotient(both, alone)
    return [
        _latencies("single queries, nothing else runs", idle),
        _latencies(f"single queries beside {rounds[0].bulk.samples[0].num_texts} texts", busy),
        ("ratio", "", *(f"{percentile(busy, at) / percentile(idle, at):.2f}" for at in (0.5, 0.95, 0.99))),
        ("bulk alone, texts/s", f"{median(alone):,.1f}", "", "", ""),
        ("bulk beside the queries, texts/s", f"{median(both):,.1f}", "", "", ""),
        ("share of its lone speed", str(share), "", "", ""),
    ]


def _latencies(name: str, samples: Sequence[float]) -> tuple[str, ...]:
    return (name, str(len(samples)), *(f"{1000 * percentile(samples, at):.1f}" for at in (0.5, 0.95, 0.99)))


def run(
    folder: Path, workload: str, num_texts: int, rounds: int, *, per_s: float = PER_S, idle_s: float = IDLE_S
) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    texts = workloads.make(workload, num_texts, workloads.counter(folder)).texts
    with own_server(folder) as target:
        bulk, queries = encode(target, texts), make_requests(target, folder, "short", 1)
        load.run(lambda: load.closed(target, [encode(target, texts[:64]), *queries], 1, until=load.after(20)))
        found = [measure(target, bulk, queries, per_s, idle_s) for _ in range(rounds)]
        machine = watch.machine
    return Report(
        name="fairness",
        title=f"Queries beside a bulk request of {num_texts} × {workload}",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "queries a second": per_s, "idle s": idle_s},
        header=("what", "samples", "p50 ms", "p95 ms", "p99 ms"),
        rows=rows(found),
        samples={
            "rounds": [
                {name: summary(getattr(one, name)) for name in ("idle", "alone", "queries", "bulk")} for one in found
            ]
        },
        notes=("latency counts from the moment a query was due; queries arrive at random, whatever the server does",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--workload", default="passages", choices=workloads.NAMES, help="of the bulk request")
    parser.add_argument("--texts", type=int, default=BULK_TEXTS, help="of the bulk request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-second", type=float, default=PER_S)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    report = run(resolve(asked.model), asked.workload, asked.texts, asked.rounds, per_s=asked.per_second)
    publish(report, asked.results)


if __name__ == "__main__":
    main()
