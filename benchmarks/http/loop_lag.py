"""Measures how late the server's event loop is under full load (`load`), or while a model is loaded (`loading`).

    python -m benchmarks.http.loop_lag load
    python -m benchmarks.http.loop_lag loading --model xlmr-large

`load`: three kinds of clients at once: with single texts, with 32 texts, and with bulk requests whose answers are large
JSON floats. `loading`: each backend in turn, while a host loads and evicts a large model repeatedly. The server is
`embedyard serve` with a clock on its loop (`peers/lag_server.py`).
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.http.backends import NAMES, cold, variables
from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import percentile, with_progress
from benchmarks.lib.report import Report, add_save_option, publish, run_command
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


def run_load(folder: Path, seconds: float, *, bulk_texts: int = 2048, idle_s: float = 5.0) -> Report:
    """Measure a model folder, idle and under full load."""
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


def main_load(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.loop_lag load", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=30.0, help="of full load")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    publish(run_load(resolve(asked.model), asked.seconds), asked.results)


def run_loading(folder: Path, names: Sequence[str], rounds: int) -> Report:
    """Measure a model folder while it is loaded and evicted, on each backend."""
    watch = Watch()
    warn_if_busy(watch.machine)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lags = {name: _lags_of_loads(name, folder, rounds) for name in with_progress(names, "backend")}
    return Report(
        name="backends-lag",
        title=f"Event-loop lag of the router while a host loads {size / 2**30:.2f} GiB",
        machine=watch.machine,
        settings={"model": folder.name, "rounds": rounds},
        header=("backend", "samples", "p50 ms", "p99 ms", "p99.9 ms", "max ms"),
        rows=[_row(name, found) for name, found in lags.items()],
        samples=dict(lags),
    )


def _lags_of_loads(name: str, folder: Path, rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as draft:
        file = Path(draft) / "lags.json"
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder}, preload=False)
        more = variables(name) | {"LAG_FILE": str(file), "MEMORY_BUDGET": "12GiB", "CPU_HOSTS": "1"}
        with serving(own(registry, MODEL, script=[str(PEER_SCRIPTS / "lag_server.py")], **more)) as server:
            marks = []
            for _ in range(rounds):
                began_s = time.monotonic()
                cold(server)
                marks.append((began_s, time.monotonic()))
        woken: list[tuple[float, float]] = json.loads(file.read_text())
    return [lag_s for at_s, lag_s in woken if any(begin <= at_s <= end for begin, end in marks)]


def main_loading(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.loop_lag loading", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--backends", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    publish(run_loading(resolve(asked.model), asked.backends.split(","), asked.rounds), asked.results)


def main() -> None:
    """Run the requested command."""
    run_command({"load": main_load, "loading": main_loading})


if __name__ == "__main__":
    main()
