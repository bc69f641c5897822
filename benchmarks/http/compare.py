"""Compares our server with other servers (`servers`), or with its own engine without HTTP (`offline`).

    python -m benchmarks.http.compare servers
    python -m benchmarks.http.compare offline

`servers`: Infinity and FastAPI + sentence-transformers; single short texts from 1, 8, 32 and 64 clients, and 32 mixed
texts a request from 8; closed loops, all servers up at once and measured one at a time, round by round, with default
settings. `offline`: the same requests (32 mixed texts, base64) go to our server from eight clients, and to the engine
in a process without a server, eight at a time. The client runs on the same cores; its share is in the notes.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Run, interleave, percentile, quotient
from benchmarks.lib.peers import OURS, own_worker
from benchmarks.lib.report import Report, add_save_option, can_draw, draw_lines, publish, run_command
from benchmarks.lib.servers import (
    Plan,
    Server,
    fastapi,
    infinity,
    make_requests,
    own,
    own_server,
    serving,
    write_registry,
)
from benchmarks.lib.worker import Worker, WorkerFailed
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode, vectors

SECONDS = 8.0


class Case(Struct, frozen=True):
    """One row of the table: a workload, texts per request, and clients."""

    workload: str
    texts: int
    clients: int

    def __str__(self) -> str:
        return f"{self.texts} × {self.workload}, {self.clients} clients"


CASES = (*(Case("short", 1, clients) for clients in (1, 8, 32, 64)), Case("mixed", 32, 8))


def plans(folder: Path, draft: Path) -> list[Plan]:
    """Return how to start each server, ours first."""
    registry = write_registry(draft / "registry.yaml", {"minilm": folder})
    return [own(registry, "minilm"), infinity(folder, "torch"), infinity(folder, "optimum"), fastapi(folder)]


@contextmanager
def open_servers(
    wanted: Sequence[Plan], *, first: Callable[[Target], object] | None = None
) -> Iterator[tuple[list[Server], list[str]]]:
    """Start the servers; yield those that start, and a note for each that does not. Ours must start.

    `first`: see `serving`.
    """
    with ExitStack() as stack:
        servers, notes = [], []
        for plan in wanted:
            try:
                servers.append(stack.enter_context(serving(plan, first=first)))
            except WorkerFailed as error:
                if plan.name == OURS:
                    raise
                notes.append(f"left out: {str(error).splitlines()[0]}")
                print(error, file=sys.stderr, flush=True)
        yield servers, notes


def measure(
    case: Case, servers: Sequence[Server], folder: Path, rounds: int, seconds: float, *, settle_s: float = SETTLE_S
) -> tuple[dict[str, list[float]], dict[str, list[Outcome]]]:
    """Return texts a second by server, and the outcomes they come from; one uncounted round warms up."""
    outcomes: dict[str, list[Outcome]] = {server.name: [] for server in servers}
    requests = {server.name: make_requests(server.target, folder, case.workload, case.texts) for server in servers}

    def sample(server: Server) -> float:
        until = load.after_s(seconds)
        outcome = load.run(lambda: load.closed(server.target, requests[server.name], case.clients, until=until))
        outcomes[server.name].append(outcome)
        return outcome.texts_per_s

    runs: dict[str, Run] = {server.name: partial(sample, server) for server in servers}
    samples = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
    return samples, {name: found[1:] for name, found in outcomes.items()}


def row(
    case: Case, samples: Mapping[str, Sequence[float]], outcomes: Mapping[str, Sequence[Outcome]]
) -> tuple[str, ...]:
    """Return one row: speeds, our ratio to the best peer, p95 latencies, failures."""
    best = max((name for name in samples if name != OURS), key=lambda name: median(samples[name]), default=OURS)
    p95 = [f"{1000 * _latency(outcomes[name], 0.95):.0f}" for name in samples]
    failed = sum(outcome.num_failed for found in outcomes.values() for outcome in found)
    return (
        str(case),
        *(f"{median(rates):,.1f}" for rates in samples.values()),
        f"{quotient(samples[OURS], samples[best])}",
        best,
        " / ".join(p95),
        str(failed),
    )


def run_servers(
    folder: Path,
    rounds: int,
    seconds: float,
    *,
    cases: Sequence[Case] = CASES,
    wanted: Sequence[str] | None = None,
    settle_s: float = SETTLE_S,
) -> Report:
    """Measure a model folder on every server, or on the named ones."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft:
        chosen = [plan for plan in plans(folder, Path(draft)) if wanted is None or plan.name in wanted]
        with open_servers(chosen) as (servers, notes):
            off_by = _off_by(servers, folder)
            found = {}
            for case in cases:
                print(f"measuring {case} …", file=sys.stderr, flush=True)
                found[str(case)] = measure(case, servers, folder, rounds, seconds, settle_s=settle_s)
            machine = watch.machine
    names = [server.name for server in servers]
    client = max(outcome.client_cores for _, found_by in found.values() for one in found_by.values() for outcome in one)
    return Report(
        name=f"compare-http-{folder.name}",
        title=f"Over HTTP beside the peers, {folder.name}, closed loops, base64",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "seconds": seconds},
        header=(
            "load",
            *(f"{name}, texts/s" for name in names),
            "ours over the best",
            "the best",
            f"p95 ms, {' / '.join(names)}",
            "failed",
        ),
        rows=[row(case, *found[str(case)]) for case in cases],
        samples={
            "texts_per_s": {name: samples for name, (samples, _) in found.items()},
            "off_by": off_by,
            "start_s": {server.name: server.start_s for server in servers},
        },
        notes=(
            *notes,
            f"the client took at most {client:.2f} of the {machine.cores} cores that the servers have too",
            f"largest difference of a component from {names[0]}: "
            + ", ".join(f"{n} {off:.0e}" for n, off in off_by.items()),
        ),
    )


def draw(report: Report, path: Path) -> None:
    """Draw texts a second over the number of clients, for the cases of single texts."""
    rates = {name: samples for name, samples in report.samples["texts_per_s"].items() if name.startswith("1 ×")}
    if not rates:
        return
    clients = [int(name.split()[-2]) for name in rates]
    servers = next(iter(rates.values()))
    series = {server: [median(samples[server]) for samples in rates.values()] for server in servers}
    draw_lines(path, "Single short texts over HTTP", clients, series)


def _off_by(servers: Sequence[Server], folder: Path) -> dict[str, float]:
    """Return the largest difference of a component of each server's vectors from ours."""
    texts = workloads.make("mixed", 4, workloads.counter(folder), seed=11).texts
    found = {server.name: vectors(server.target, texts) for server in servers}
    return {name: float(np.abs(own_vectors - found[servers[0].name]).max()) for name, own_vectors in found.items()}


def _latency(outcomes: Sequence[Outcome], share: float) -> float:
    return percentile([sample.latency_s for outcome in outcomes for sample in outcome.samples], share)


def main_servers(argv: Sequence[str]) -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.compare servers", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each sample")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run_servers(resolve(asked.model), asked.rounds, asked.seconds)
    publish(report, asked.results)
    if asked.results is not None and can_draw():
        draw(report, asked.results / f"{report.name}.svg")


CLIENTS = 8
TEXTS = 32


def over_http(target: Target, requests: Sequence[Request], clients: int) -> Outcome:
    """Return texts a second of all requests, each sent once.

    Raises:
        OSError: one failed.
    """
    outcome = load.run(lambda: load.closed(target, requests, clients, until=load.after(len(requests))))
    if outcome.num_failed:
        raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return outcome


def offline(engine: Worker, calls: Sequence[Sequence[str]], clients: int) -> float:
    """Return texts a second without a server."""
    seconds = float(engine.ask(op="time", calls=list(calls), concurrency=clients)["seconds"])
    return sum(map(len, calls)) / seconds


def run_offline(
    folder: Path, workload: str, texts: int, num_calls: int, rounds: int, *, settle_s: float = SETTLE_S
) -> Report:
    """Measure a model folder over HTTP and without."""
    watch = Watch()
    warn_if_busy(watch.machine)
    work = workloads.make(workload, texts * num_calls, workloads.counter(folder))
    calls = work.calls(texts)
    with own_worker(folder) as engine, own_server(folder) as target:
        engine.wait_until_warm()
        requests = [encode(target, call) for call in calls]
        outcomes = []

        def http() -> float:
            outcomes.append(over_http(target, requests, CLIENTS))
            return outcomes[-1].texts_per_s

        runs: dict[str, Run] = {"HTTP": http, "offline": partial(offline, engine, calls, CLIENTS)}
        samples = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
        machine = watch.machine
    client = median(outcome.client_cores for outcome in outcomes[1:])
    share = quotient(samples["HTTP"], samples["offline"])
    return Report(
        name="over-http",
        title=f"HTTP over the offline engine, {texts} × {workload}, base64, {CLIENTS} at a time",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "requests": num_calls, "tokens": work.num_tokens},
        header=("", "texts/s", "of offline"),
        rows=[
            ("offline engine", f"{median(samples['offline']):,.1f}", "1"),
            ("over HTTP", f"{median(samples['HTTP']):,.1f}", str(share)),
        ],
        samples={"texts_per_s": samples, "client_cores": [outcome.client_cores for outcome in outcomes[1:]]},
        notes=(f"the client took {client:.2f} of the {machine.cores} cores that the server has too",),
    )


def main_offline(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.compare offline", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--workload", default="mixed", choices=workloads.NAMES)
    parser.add_argument("--texts", type=int, default=TEXTS, help="texts a request")
    parser.add_argument("--requests", type=int, default=24, help="requests a round")
    parser.add_argument("--rounds", type=int, default=5)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    publish(run_offline(resolve(asked.model), asked.workload, asked.texts, asked.requests, asked.rounds), asked.results)


def main() -> None:
    """Run the requested command."""
    run_command({"servers": main_servers, "offline": main_offline})


if __name__ == "__main__":
    main()
