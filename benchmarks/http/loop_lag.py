"""Measures how late the server's event loop is while the server is under full load.

    python -m benchmarks.http.loop_lag

Full load is three kinds at once: clients with single texts, clients with 32 texts, and bulk requests whose answers are
large JSON floats. The server is `embedyard serve` with a clock on its loop (`peers/lag_server.py`).
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import percentile
from benchmarks.lib.report import RESULTS, Report, publish
from benchmarks.lib.servers import make_requests, own, serving, write_registry
from benchmarks.lib.worker import PEER_SCRIPTS
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode

MODEL = "minilm"
TICK_S = 0.005
"""How often the server's clock ticks."""


class Kind(Struct, frozen=True):
    """One part of the load."""

    name: str
    requests: Sequence[Request]
    clients: int


def make_load(target: Target, folder: Path, bulk_texts: int) -> list[Kind]:
    """Return three kinds of clients, which run at once."""
    texts = workloads.make("short", bulk_texts, workloads.counter(folder)).texts
    return [
        Kind("single texts", make_requests(target, folder, "short", 1), 32),
        Kind("32 mixed texts", make_requests(target, folder, "mixed", 32), 8),
        Kind(f"{bulk_texts} texts, JSON floats", [encode(target, texts, "float")], 2),
    ]


async def all_at_once(target: Target, kinds: Sequence[Kind], seconds: float) -> list[Outcome]:
    """Run every kind of client for `seconds`."""
    until = load.after_s(seconds)
    return await asyncio.gather(*(load.closed(target, kind.requests, kind.clients, until=until) for kind in kinds))


def within(lags: Sequence[tuple[float, float]], start_s: float, end_s: float) -> list[float]:
    """Return the lags in an interval, corrected for missed ticks: a stall of a second delays every tick in it."""
    return [late for woken_s, lag_s in lags if start_s <= woken_s <= end_s for late in _every_tick(lag_s)]


def _every_tick(lag_s: float) -> Iterator[float]:
    yield lag_s
    while (lag_s := lag_s - TICK_S) > 0:
        yield lag_s


def run(folder: Path, seconds: float, *, bulk_texts: int = 2048, idle_s: float = 5.0) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft:
        file = Path(draft) / "lags.json"
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder})
        plan = own(registry, MODEL, script=[str(PEER_SCRIPTS / "lag_server.py")], LAG_FILE=str(file))
        with serving(plan) as server:
            kinds = make_load(server.target, folder, bulk_texts)
            marks = [time.monotonic()]
            time.sleep(idle_s)
            marks.append(time.monotonic())
            outcomes = load.run(lambda: all_at_once(server.target, kinds, seconds))
            marks.append(time.monotonic())
            machine = watch.machine
        lags: list[tuple[float, float]] = json.loads(file.read_text())
    idle, busy = within(lags, marks[0], marks[1]), within(lags, marks[1], marks[2])
    return Report(
        name="loop-lag",
        title="Event-loop lag of the server",
        machine=machine,
        settings={"model": folder.name, "seconds": seconds, "tick ms": 1000 * TICK_S},
        header=("", "samples", "p50 ms", "p99 ms", "p99.9 ms", "max ms"),
        rows=[_row("idle", idle), _row("full load", busy)],
        samples={"idle_s": idle, "busy_s": busy},
        notes=tuple(
            f"{kind.clients} clients with {kind.name}: {outcome.texts_per_s:,.1f} texts/s, {outcome.num_failed} failed"
            for kind, outcome in zip(kinds, outcomes, strict=True)
        ),
    )


def _row(name: str, lags: Sequence[float]) -> tuple[str, ...]:
    return (name, str(len(lags)), *(f"{1000 * percentile(lags, share):.1f}" for share in (0.5, 0.99, 0.999, 1.0)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.loop_lag", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=30.0, help="of full load")
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.seconds), asked.results)


if __name__ == "__main__":
    main()
