"""Checks that a server neither grows nor errs under mixed load, after many loads, and with too many models.

    python -m benchmarks.lifecycle.endurance soak
    python -m benchmarks.lifecycle.endurance cycles
    python -m benchmarks.lifecycle.endurance crowd
    python -m benchmarks.lifecycle.endurance batches

`soak`: twenty minutes. Four models in a memory for two, so that models are loaded and evicted all the time;
clients with short texts, long ones and bulk; requests with mistakes; an operator who moves models. Every answer's
status is counted, and the server's memory, threads and open files are compared before, meanwhile and after.
`cycles`: a model is loaded, used and evicted 200 times in a server process. Its resident memory is read after each
eviction, and after the tenth it may not move by more than 5 %.
`crowd`: a minute; eight small models, memory for three, 64 clients without a pause. Every answer is compared with
sentence-transformers'. The accounting may never exceed the budget, and each eviction must be explained in the event
stream. Clients, server and models share one process, so that its accounting can be read after each step.
`batches`: 200 × kill -9 of the server, its worker or both while they run a batch of 20,000 lines; see `batch_kills`.
Each exits with 1 when something is not as it should be.
"""

import argparse
import asyncio
import http.client
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
import psutil
import structlog
from msgspec import Struct, structs

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import with_progress
from benchmarks.lib.report import Report, add_save_option, publish, run_command
from benchmarks.lib.servers import Server, own, serving, write_registry
from benchmarks.lib.small_memory import CLIENTS, NUM_RESIDENT, Crowd, build_truths, crowd, unexplained
from benchmarks.lifecycle.batch_kills import run_kills
from benchmarks.lifecycle.cold_start import ready
from engines.types import format_bytes
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode

HOME, OTHERS = ("one", "two"), ("three", "four")
MODELS = HOME + OTHERS
"""Memory fits two. Most requests are for the first two; some are for the others, and evict one of them."""
RSS_SHARE = 0.03
"""Allowed growth of memory from the first quarter after the warm-up to the last."""
_SAMPLE_S = 1.0
_REST_S = 1.0
_PRINT_EVERY = 60
_SAVE_EVERY = 10
_DRAWS = 16
_MAX_BODY = "1MiB"


class Kind(Struct, frozen=True):
    """One part of the load: `clients` that each wait for their answers, or `per_s` requests a second.

    `expected`: the statuses that are right.
    """

    name: str
    requests: Sequence[Request]
    expected: frozenset[int]
    clients: int = 0
    per_s: float = 0.0

    async def run(self, target: Target, seconds: float) -> Outcome:
        """Send requests for `seconds`."""
        until = load.after_s(seconds)
        if self.clients:
            return await load.closed(target, self.requests, self.clients, until=until)
        return await load.opened(target, self.requests, self.per_s, until=until)

    def unexpected(self, outcome: Outcome) -> Counter[int]:
        """Count the answers with unexpected statuses; 0 stands for no answer."""
        return Counter(sample.status for sample in outcome.samples if sample.status not in self.expected)


class Sample(Struct, frozen=True):
    """The state of the server's process at one moment."""

    at_s: float
    rss_bytes: int
    threads: int
    files: int


class Verdict(Struct, frozen=True):
    """Values before and after. Memory: medians of the load's first and last quarter. Threads and files: at rest."""

    rss_bytes: tuple[float, float]
    threads: tuple[int, int]
    files: tuple[int, int]

    @property
    def rss_growth(self) -> float:
        """Return the growth relative to the value before."""
        return self.rss_bytes[1] / self.rss_bytes[0] - 1

    def faults(self, rss_share: float, spare_threads: int = 0) -> Iterator[str]:
        """Yield a message for each value that has grown by more than allowed."""
        if self.rss_growth > rss_share:
            yield f"the memory grew by {100 * self.rss_growth:.1f} %, and {100 * rss_share:g} % is allowed"
        if self.threads[1] > self.threads[0] + spare_threads:
            yield f"the threads went from {self.threads[0]} to {self.threads[1]}"
        if self.files[1] > self.files[0]:
            yield f"the open files went from {self.files[0]} to {self.files[1]}"


def judge(rest: tuple[Sample, Sample], samples: Sequence[Sample]) -> Verdict:
    """Compare the server at rest before and after the load, and the first and last quarter of the load.

    Raises:
        ValueError: fewer than four samples.
    """
    size = len(samples) // 4
    if size < 1:
        raise ValueError(f"{len(samples)} samples are too few")
    return Verdict(
        rss_bytes=(
            median(sample.rss_bytes for sample in samples[:size]),
            median(sample.rss_bytes for sample in samples[-size:]),
        ),
        threads=(rest[0].threads, rest[1].threads),
        files=(rest[0].files, rest[1].files),
    )


def make_load(target: Target, folder: Path) -> list[Kind]:
    """Return all kinds of requests, which run at once."""
    count = workloads.counter(folder)
    fine = frozenset({200})

    def texts(workload: str, per_request: int, encoding: str = "base64", models: Sequence[str] = HOME) -> list[Request]:
        made = workloads.make(workload, _DRAWS * min(per_request, 32), count).texts
        calls = [[made[(at * 7 + n) % len(made)] for n in range(per_request)] for at in range(_DRAWS)]
        to = [structs.replace(target, model=models[at % len(models)]) for at in range(_DRAWS)]
        return [encode(one, call, encoding) for one, call in zip(to, calls, strict=True)]

    return [
        Kind("single short texts", texts("short", 1), fine, clients=6),
        Kind("8 mixed texts", texts("mixed", 8), fine, clients=2),
        Kind("2 long texts", texts("long", 2), fine, clients=1),
        Kind("256 texts, JSON floats", texts("short", 256, "float"), fine, clients=1),
        Kind("models that are not in memory", texts("short", 1, models=OTHERS), fine, per_s=0.1),
        Kind("mistakes", mistakes(target), frozenset({400, 404, 405, 413}), per_s=10.0),
        Kind("an operator", moves(target), frozenset({200, 202, 409}), per_s=0.1),
    ]


def mistakes(target: Target) -> list[Request]:
    """Return requests that must be refused, each for another reason."""
    well = {"model": MODELS[0], "input": "x"}
    bodies: list[object] = [
        {**well, "input": ""}, {**well, "input": []}, {**well, "input": ["x"] * 2049}, {**well, "input": 5},
        {**well, "model": "nothing"}, {**well, "dimensions": 17}, {**well, "encoding_format": "hex"},
        {**well, "input_type": "nothing"}, {**well, "input": [99_999_999]}, {**well, "input": "word " * 300_000},
        {**well, "input": "word " * 2000, "truncate": "error"},
    ]  # fmt: skip
    found = [post(target, "/v1/embeddings", msgspec.json.encode(body)) for body in bodies]
    found += [post(target, "/v1/embeddings", content) for content in (b"{", b"", b"\xff", b"[" * 50_000)]
    return [*found, post(target, "/v1/nothing", b"{}"), post(target, "/v1/models", b"{}")]


def moves(target: Target) -> list[Request]:
    """Return an operator's requests: preload models and evict them, regardless of traffic."""
    evict = msgspec.json.encode({"timeout": 5})
    return [
        request
        for model in (*MODELS[1:], MODELS[0])
        for request in (
            post(target, f"/admin/models/{model}/preload", b'{"wait": false}'),
            post(target, f"/admin/models/{model}/evict", evict),
        )
    ]


def post(target: Target, path: str, body: bytes) -> Request:
    """Return a POST as bytes."""
    host, port = target.address
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return Request(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, 0)


def read_process(process: psutil.Process, at_s: float = 0.0) -> Sample:
    """Read the process's current state."""
    with process.oneshot():
        return Sample(round(at_s, 1), process.memory_info().rss, process.num_threads(), process.num_fds())


async def everything(server: Server, kinds: Sequence[Kind], seconds: float) -> tuple[list[Outcome], list[Sample]]:
    """Run all kinds at once; return their outcomes, and a sample of the process for every second."""
    samples: list[Sample] = []
    process, began_s = psutil.Process(server.pid), time.monotonic()

    async def watch() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            samples.append(read_process(process, time.monotonic() - began_s))
            if len(samples) % _PRINT_EVERY == 0:
                progress = f"{samples[-1].at_s:.0f} of {seconds:.0f} s, {samples[-1].rss_bytes / 2**20:,.0f} MiB"
                print(progress, file=sys.stderr, flush=True)

    watching = asyncio.create_task(watch())
    outcomes = await asyncio.gather(*(kind.run(server.target, seconds) for kind in kinds))
    watching.cancel()
    return outcomes, samples


def at_rest(server: Server) -> Sample:
    """Read the process's state after its clients' connections are closed."""
    time.sleep(_REST_S)
    return read_process(psutil.Process(server.pid))


def fetch_json(target: Target, path: str) -> Any:
    """Return the JSON of a GET."""
    connection = http.client.HTTPConnection(*target.address, timeout=60)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def memory_for(folder: Path, num_models: int) -> str:
    """Return a budget for `num_models` of the models, as a server measures them."""
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODELS[0]: folder})
        with serving(own(registry, MODELS[0])) as server:
            slot = fetch_json(server.target, f"/admin/models/{MODELS[0]}")
    return str(num_models * slot["weight_bytes"] + int(1.5 * slot["workspace_bytes"]))


def run_soak(
    folder: Path,
    seconds: float,
    warm_up_s: float,
    *,
    rss_share: float = RSS_SHARE,
    spare_threads: int = 0,
    budget: str = "",
) -> tuple[Report, list[str]]:
    """Return the report and all faults. The warm-up is the same load and is not judged.

    Args:
        rss_share, spare_threads: allowed growth, for warm-ups too short to start everything that is started once.
        budget: of the server's memory; measured unless given.
    """
    surroundings = Watch()
    warn_if_busy(surroundings.machine)
    budget = budget or memory_for(folder, len(HOME))
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", dict.fromkeys(MODELS, folder), preload=False)
        with serving(own(registry, MODELS[0], MEMORY_BUDGET=budget, MAX_BODY_BYTES=_MAX_BODY)) as server:
            kinds = make_load(server.target, folder)
            warm_up, _ = load.run(lambda: everything(server, kinds, warm_up_s))
            before = at_rest(server)
            outcomes, samples = load.run(lambda: everything(server, kinds, seconds))
            verdict = judge((before, at_rest(server)), samples)
            slots = fetch_json(server.target, "/admin/models")["data"]
    wrong = [
        f"{kind.name}: {count} × {status or 'no answer'}"
        for kind, outcome in zip(kinds * 2, warm_up + outcomes, strict=True)
        for status, count in kind.unexpected(outcome).items()
    ]
    wrong += verdict.faults(rss_share, spare_threads)
    report = Report(
        name="soak",
        title=f"{seconds:g} s of mixed load, mistakes and evictions",
        machine=surroundings.machine,
        settings={"model": folder.name, "seconds": seconds, "warm-up": warm_up_s, "budget": budget},
        header=("", "requests", "unexpected", "p50 ms", "p99 ms", "max ms"),
        rows=[_row(kind, outcome) for kind, outcome in zip(kinds, outcomes, strict=True)],
        samples={
            "process": [structs.asdict(one) for one in samples[::_SAVE_EVERY]],
            "verdict": structs.asdict(verdict),
        },
        notes=(*_facts(verdict, samples), _movements(slots), *(f"WRONG: {one}" for one in wrong)),
    )
    return report, wrong


def _row(kind: Kind, outcome: Outcome) -> tuple[str, ...]:
    times = sorted(sample.latency_s for sample in outcome.samples) or [0.0]
    shares = (times[len(times) // 2], times[int(0.99 * (len(times) - 1))], times[-1])
    counts = (str(len(outcome.samples)), str(kind.unexpected(outcome).total()))
    return (kind.name, *counts, *(f"{1000 * time_s:.0f}" for time_s in shares))


def _facts(verdict: Verdict, samples: Sequence[Sample]) -> tuple[str, ...]:
    first, last = (size / 2**20 for size in verdict.rss_bytes)
    most = max(sample.rss_bytes for sample in samples) / 2**20
    return (
        f"memory (RSS): {first:.0f} MiB in the first quarter, {last:.0f} MiB in the last "
        f"({100 * verdict.rss_growth:+.1f} %), {most:.0f} MiB at most",
        f"at rest before and after: {verdict.threads[0]} and {verdict.threads[1]} threads, "
        f"{verdict.files[0]} and {verdict.files[1]} open files",
    )


def _movements(slots: Sequence[dict[str, Any]]) -> str:
    return f"loads: {sum(slot['loads'] for slot in slots)}, evictions: {sum(slot['evictions'] for slot in slots)}"


def main_soak(argv: Sequence[str]) -> None:
    """Print the table; exit with 1 when there are faults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.endurance soak", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--warm-up", type=float, help="seconds before; a fifth of the others, unless given")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    warm_up_s = asked.seconds / 5 if asked.warm_up is None else asked.warm_up
    report, wrong = run_soak(resolve(asked.model), asked.seconds, warm_up_s)
    publish(report, asked.results)
    raise SystemExit(1 if wrong else 0)


MODEL = "cycled"
SETTLED = 10
LIMIT = 0.05


def cycle(client: httpx.Client, process: psutil.Process) -> int:
    """Load, use and evict the model; return the process's resident bytes afterwards.

    Raises:
        httpx.HTTPStatusError: any of the three was refused.
    """
    client.post("/v1/embeddings", json={"model": MODEL, "input": ["a text", "another one"]}).raise_for_status()
    client.post(f"/admin/models/{MODEL}/evict").raise_for_status()
    return int(process.memory_info().rss)


def spread(rss_bytes: list[int]) -> float:
    """Return how far memory moved after the first `SETTLED` cycles, relative to its size then."""
    base = rss_bytes[SETTLED - 1]
    return max(abs(rss - base) for rss in rss_bytes[SETTLED - 1 :]) / base


def run_cycles(folder: Path, cycles: int) -> Report:
    """Measure a model folder."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder}, preload=False)
        with (
            serving(own(registry, MODEL), first=ready) as server,
            httpx.Client(base_url=server.target.url, timeout=60) as client,
        ):
            process = psutil.Process(server.pid)
            found = [cycle(client, process) for _ in with_progress(range(cycles), "cycle")]
            machine = watch.machine
    moved = spread(found)
    return Report(
        name=f"cycles-{folder.name}",
        title=f"{folder.name} loaded, used and evicted {cycles} times",
        machine=machine,
        settings={"model": folder.name, "cycles": cycles},
        header=("resident memory of the server", "bytes"),
        rows=[
            ("after the first cycle", format_bytes(found[0])),
            (f"after cycle {SETTLED}", format_bytes(found[SETTLED - 1])),
            (f"median of the last {SETTLED}", format_bytes(round(median(found[-SETTLED:])))),
            (f"after cycle {cycles}", format_bytes(found[-1])),
            (f"largest after cycle {SETTLED}", format_bytes(max(found[SETTLED - 1 :]))),
        ],
        samples={"rss_bytes": found, "spread": moved},
        notes=(f"moved by {moved:.1%} at the most after cycle {SETTLED} (wanted: {LIMIT:.0%})",),
    )


def main_cycles(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.endurance cycles", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--cycles", type=int, default=200)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run_cycles(resolve(asked.model), asked.cycles)
    publish(report, asked.results)
    if report.samples["spread"] > LIMIT:
        sys.exit(f"the server's memory moved by more than {LIMIT:.0%}")


def run_crowd(seconds: float) -> tuple[Report, bool]:
    """Run the crowd; return the report, and whether it has no fault."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as folder:
        truths = build_truths(Path(folder))
        found = asyncio.run(crowd(truths, Path(folder) / "state", seconds))
    is_good = not found.sampler.overdrafts and not unexplained(found.steps)
    report = Report(
        name="crowd",
        title=f"{len(truths)} models, memory for {NUM_RESIDENT}, {CLIENTS} clients with a Zipf mix, {seconds:g} s",
        machine=watch.machine,
        settings={"seconds": seconds},
        header=("what", "figure"),
        rows=rows_of_crowd(found),
        samples={"asked": dict(found.asked)},
        notes=("every answer was 200, and within 2e-5 of sentence-transformers in every component",),
    )
    return report, is_good


def rows_of_crowd(found: Crowd) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
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


def main_crowd(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.endurance crowd", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report, is_good = run_crowd(asked.seconds)
    publish(report, asked.results)
    if not is_good:
        sys.exit("memory was over the budget, or an eviction was not explained")


def main_batches(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.endurance batches", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=11)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report, faults = run_kills(asked.kills, asked.lines, asked.seed)
    publish(report, asked.results)
    raise SystemExit(1 if faults else 0)


def main() -> None:
    """Run the requested command."""
    run_command({"soak": main_soak, "cycles": main_cycles, "crowd": main_crowd, "batches": main_batches})


if __name__ == "__main__":
    main()
