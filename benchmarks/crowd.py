"""`python -m benchmarks.crowd`: eight small models, room for three, 64 clients without a pause, a minute.

Every answer is compared with sentence-transformers'. Exits with 1 when one was wrong or no 200, when the accounting was
over the budget in a sample, or when an eviction was not explained in the event stream. Clients, server and models share
one process here, so that its accounting can be looked at after each step that changes it.
"""

import argparse
import asyncio
import logging
import sys
import tempfile
from pathlib import Path

import structlog

from benchmarks.machine import Watch, warn_if_busy
from benchmarks.report import RESULTS, Report, publish
from engines.types import format_bytes
from tests.testkit.crowd import CLIENTS, ROOM_FOR, Crowd, crowd, unexplained
from tests.testkit.small_memory import build_truths


def run(seconds: float) -> tuple[Report, bool]:
    """Measure; and whether everything was as it must be."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as folder:
        truths = build_truths(Path(folder))
        found = asyncio.run(crowd(truths, Path(folder) / "state", seconds))
    is_good = not found.sampler.overdrafts and not unexplained(found.steps)
    report = Report(
        name="crowd",
        title=f"{len(truths)} models, room for {ROOM_FOR}, {CLIENTS} clients with a Zipf mix, {seconds:g} s",
        machine=watch.machine,
        settings={"seconds": seconds},
        header=("what", "figure"),
        rows=rows(found),
        samples={"asked": dict(found.asked)},
        notes=("every answer was 200, and within 2e-5 of sentence-transformers in every component",),
    )
    return report, is_good


def rows(found: Crowd) -> list[tuple[str, ...]]:
    """The table."""
    sampler, total = found.sampler, sum(found.asked.values())
    return [
        ("requests", f"{total:,}"),
        ("  of the most and of the least wanted model", f"{max(found.asked.values()):,} / {min(found.asked.values())}"),
        ("loads", str(found.count("warming", "ready"))),
        ("evictions", str(found.count("draining", "unloading"))),
        ("  not explained in the event stream", str(len(unexplained(found.steps)))),
        ("looks at the accounting", f"{sampler.num_samples:,}"),
        ("  over the budget", str(len(sampler.overdrafts))),
        ("most bytes in a sample / budget", f"{sampler.most_bytes / found.budget_bytes:.0%}"),
        ("growth of the process", format_bytes(max(0, found.rss_growth_bytes))),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report, is_good = run(asked.seconds)
    publish(report, asked.results)
    if not is_good:
        sys.exit("memory was over the budget, or an eviction was not explained")


if __name__ == "__main__":
    main()
