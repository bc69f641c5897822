"""Measures what sharing costs: queries beside a bulk request (`queries`), and two models on one device (`models`).

    python -m benchmarks.http.sharing queries
    python -m benchmarks.http.sharing queries --flex
    python -m benchmarks.http.sharing queries --batch
    python -m benchmarks.http.sharing models --models minilm minilm
    python -m benchmarks.http.sharing rerank

`queries`: single queries arrive at random moments, first alone and then while a request of 2,048 texts runs; the bulk
request runs alone too. Over HTTP, default settings, interleaved rounds. With `--flex` the bulk request asks for idle
capacity only (`service_tier: "flex"`); with `--batch` the texts are the lines of a batch
of the Files API. `models`: each model alone, then both at once,
in one process without HTTP; the shares are seconds of the device. With models of different sizes the sum is of parts:
what each reaches beside the other over what it reaches alone. `rerank`: an embedding model and a reranker, both in
memory: small requests for either, alone and then while the other has a bulk request.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import httpx
import msgspec
from msgspec import Struct, structs

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, interleave, percentile, quotient, with_progress
from benchmarks.lib.peers import interpreter
from benchmarks.lib.report import Report, add_save_option, publish, run_command
from benchmarks.lib.servers import make_requests, own, own_server, serving, summary, write_registry
from benchmarks.lib.worker import Worker
from benchmarks.offline import rerank as rerankers
from router import loadgen as load
from router.batches.records import UNFINISHED
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode
from router.loadgen.results import Sample

BULK_TEXTS = 2048
PER_S = 5.0
IDLE_S = 20.0
_POLL_S = 0.05

Kind = Literal["bulk", "flex", "batch"]
_TITLES: Mapping[Kind, str] = {"bulk": "bulk request", "flex": "flex request", "batch": "batch"}


class Round(Struct, frozen=True):
    """The outcomes of one round: queries alone, bulk alone, and both at once."""

    idle: Outcome
    alone: Outcome
    queries: Outcome
    bulk: Outcome


Bulk = Callable[[], Coroutine[Any, Any, Outcome]]
"""Runs the bulk work once."""


def requested(target: Target, bulk: Request) -> Bulk:
    """Return the bulk work of one large request."""
    return lambda: load.closed(target, [bulk], 1, until=load.after(1))


def batched(target: Target, texts: Sequence[str]) -> Bulk:
    """Return the bulk work of one batch, with a line for each text. The file is uploaded now."""
    body = {"model": target.model, "encoding_format": "base64"}
    lines = (
        {"custom_id": f"{at}", "method": "POST", "url": "/v1/embeddings", "body": body | {"input": text}}
        for at, text in enumerate(texts)
    )
    rows = b"\n".join(map(msgspec.json.encode, lines))
    made = httpx.post(f"{target.url}/v1/files", files={"file": rows}, data={"purpose": "batch"}, timeout=60)
    wanted = {"input_file_id": made.raise_for_status().json()["id"], "endpoint": "/v1/embeddings"}

    async def run() -> Outcome:
        async with httpx.AsyncClient(base_url=target.url, timeout=60) as client:
            began_s = time.perf_counter()
            batch = (await client.post("/v1/batches", json=wanted)).raise_for_status().json()
            while batch["status"] in UNFINISHED:
                await asyncio.sleep(_POLL_S)
                batch = (await client.get(f"/v1/batches/{batch['id']}")).raise_for_status().json()
            wall_s = time.perf_counter() - began_s
        is_whole = batch["status"] == "completed" and batch["request_counts"]["completed"] == len(texts)
        sample = Sample(due_s=0.0, latency_s=wall_s, num_texts=len(texts), status=200 if is_whole else 0)
        return Outcome(wall_s=wall_s, client_cores=0.0, samples=(sample,))

    return run


def measure(target: Target, bulk: Bulk, queries: Sequence[Request], per_s: float, idle_s: float) -> Round:
    """Measure one round.

    Raises:
        OSError: a request failed.
    """
    idle = load.run(lambda: load.opened(target, queries, per_s, until=load.after_s(idle_s)))
    alone = load.run(bulk)
    beside, both = load.run(lambda: _both(target, bulk, queries, per_s))
    for outcome in (idle, alone, beside, both):
        if outcome.num_failed or not outcome.samples:
            raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return Round(idle, alone, beside, both)


async def _both(target: Target, bulk: Bulk, queries: Sequence[Request], per_s: float) -> tuple[Outcome, Outcome]:
    """Send queries for as long as the bulk work runs."""
    running = asyncio.create_task(bulk())
    beside = await load.opened(target, queries, per_s, until=lambda sent, _gone_s: running.done() and sent > 0)
    return beside, await running


def rows_of_queries(rounds: Sequence[Round]) -> list[tuple[str, ...]]:
    """Return table rows: latencies of all rounds together, medians of the speeds."""
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


def run_queries(  # noqa: PLR0913  # the workload of one measurement
    folder: Path,
    workload: str,
    num_texts: int,
    rounds: int,
    *,
    per_s: float = PER_S,
    idle_s: float = IDLE_S,
    kind: Kind = "bulk",
) -> Report:
    """Measure queries beside a bulk request, on a model folder; the bulk may use only what the queries leave idle."""
    watch = Watch()
    warn_if_busy(watch.machine)
    texts = workloads.make(workload, num_texts, workloads.counter(folder)).texts
    with tempfile.TemporaryDirectory() as data, own_server(folder, DATA_DIR=data) as target:
        tier = {"service_tier": "flex"} if kind == "flex" else {}
        bulk = batched(target, texts) if kind == "batch" else requested(target, encode(target, texts, **tier))
        queries = make_requests(target, folder, "short", 1)
        load.run(lambda: load.closed(target, [encode(target, texts[:64]), *queries], 1, until=load.after(20)))
        found = [measure(target, bulk, queries, per_s, idle_s) for _ in with_progress(range(rounds), "round")]
        machine = watch.machine
    return Report(
        name="fairness" if kind == "bulk" else f"fairness-{kind}",
        title=f"Queries beside a {_TITLES[kind]} of {num_texts} × {workload}",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "queries a second": per_s, "idle s": idle_s},
        header=("what", "samples", "p50 ms", "p95 ms", "p99 ms"),
        rows=rows_of_queries(found),
        samples={
            "rounds": [
                {name: summary(getattr(one, name)) for name in ("idle", "alone", "queries", "bulk")} for one in found
            ]
        },
        notes=("latency counts from the moment a query was due; queries arrive at random, whatever the server does",),
    )


def main_queries(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.sharing queries", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--workload", default="passages", choices=workloads.NAMES, help="of the bulk request")
    parser.add_argument("--texts", type=int, default=BULK_TEXTS, help="of the bulk request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-second", type=float, default=PER_S)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_S)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--flex", action="store_true", help="the bulk request has service_tier: flex")
    kinds.add_argument("--batch", action="store_true", help="the bulk work is a batch of the Files API")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run_queries(
        resolve(asked.model), asked.workload, asked.texts, asked.rounds, per_s=asked.per_second,
        idle_s=asked.idle_seconds, kind="flex" if asked.flex else "batch" if asked.batch else "bulk",
    )  # fmt: skip
    publish(report, asked.results)


TEXTS_PER_REQUEST = 32
CLIENTS = 4


def run_models(
    folders: Sequence[Path],
    workload: str,
    seconds: float,
    rounds: int,
    *,
    texts: int = TEXTS_PER_REQUEST,
    settle_s: float = SETTLE_S,
) -> Report:
    """Measure two model folders, perhaps the same one twice."""
    watch = Watch()
    warn_if_busy(watch.machine)
    calls = workloads.make(workload, 8 * texts, workloads.counter(folders[0])).calls(texts)
    answers: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "both": []}
    with Worker("pair", "pair.py", [str(folder) for folder in folders], python=interpreter(None)) as pair:
        pair.wait_until_warm()

        def use(name: str, engines: Sequence[int]) -> float:
            answers[name].append(pair.ask(engines=list(engines), calls=calls, clients=CLIENTS, seconds=seconds))
            return float(sum(answers[name][-1]["texts_per_s"]))

        runs = {
            "first": lambda: use("first", [0]),
            "second": lambda: use("second", [1]),
            "both": lambda: use("both", [0, 1]),
        }
        interleave(runs, rounds, settle_s=settle_s)
        machine = watch.machine
    names = [folder.name for folder in folders]
    return Report(
        name=f"two-models-{'-'.join(names)}",
        title=f"Two models on one device, {CLIENTS} clients each, {texts} × {workload} a request",
        machine=machine,
        settings={"models": names, "rounds": rounds, "seconds": seconds},
        header=("", f"{names[0]} (1)", f"{names[1]} (2)", "sum"),
        rows=rows_of_models(answers),
        samples=answers,
        notes=("the time is that of the device's turns; the sum is of parts of each one's lone speed",),
    )


def rows_of_models(answers: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return table rows: speeds alone and together, parts and their sum, shares of time."""
    alone = [median(one["texts_per_s"][0] for one in answers[name]) for name in ("first", "second")]
    both = [median(one["texts_per_s"][at] for one in answers["both"]) for at in (0, 1)]
    parts = [own / lone for own, lone in zip(both, alone, strict=True)]
    shares = [median(one["device_s"][at] / sum(one["device_s"]) for one in answers["both"]) for at in (0, 1)]
    return [
        ("alone, texts/s", *(f"{rate:,.1f}" for rate in alone), ""),
        ("together, texts/s", *(f"{rate:,.1f}" for rate in both), f"{sum(both):,.1f}"),
        ("part of its lone speed", *(f"{100 * part:.0f} %" for part in parts), f"{100 * sum(parts):.0f} %"),
        ("share of the time", *(f"{100 * share:.0f} %" for share in shares), ""),
    ]


def main_models(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.sharing models", description=__doc__)
    parser.add_argument("--models", nargs=2, default=["minilm", "minilm"])
    parser.add_argument("--workload", default="mixed", choices=workloads.NAMES)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=5)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    folders = [resolve(model) for model in asked.models]
    publish(run_models(folders, asked.workload, asked.seconds, asked.rounds), asked.results)


class Beside(Struct, frozen=True):
    """One round for one model: its small requests alone, beside a bulk request for the other, and that bulk request."""

    idle: Outcome
    beside: Outcome
    bulk: Outcome


def run_rerank(
    embedder: Path, reranker: Path, num_texts: int, rounds: int, *, per_s: float = PER_S, idle_s: float = IDLE_S
) -> Report:
    """Measure single texts to embed beside a bulk to rerank, and a query with ten documents beside a bulk to embed."""
    watch = Watch()
    warn_if_busy(watch.machine)
    counter = workloads.counter(embedder)
    bulk = workloads.make("passages", num_texts, counter).texts
    small = workloads.make("short", 8 * 11, counter).calls(11)
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {"embedder": embedder, "reranker": reranker})
        with serving(own(registry, "embedder")) as server:
            embed = server.target
            rank = structs.replace(embed, model="reranker", route="rerank")
            requests = {
                "embed": ([encode(embed, call[:1]) for call in small], encode(rank, bulk)),
                "rerank": ([encode(rank, call) for call in small], encode(embed, bulk)),
            }
            every = [request for queries, large in requests.values() for request in (large, *queries)]
            load.run(lambda: load.closed(embed, every, 1, until=load.after(len(every))))
            found = {
                name: [_beside(embed, *requests[name], per_s, idle_s) for _ in with_progress(range(rounds), name)]
                for name in requests
            }
            machine = watch.machine
    return Report(
        name="sharing-rerank",
        title=f"An embedding model and a reranker; the bulk request has {num_texts} × passages",
        machine=machine,
        settings={
            "models": [embedder.name, reranker.name], "rounds": rounds, "requests a second": per_s, "idle s": idle_s,
        },
        header=("what", "samples", "p50 ms", "p95 ms", "p99 ms"),
        rows=[row for name in found for row in _rows_beside(name, found[name])],
        samples={
            name: [{part: summary(getattr(one, part)) for part in ("idle", "beside", "bulk")} for one in of_name]
            for name, of_name in found.items()
        },
        notes=("latency counts from the moment a request was due; a small rerank request has ten short documents",),
    )  # fmt: skip


def _beside(target: Target, queries: Sequence[Request], bulk: Request, per_s: float, idle_s: float) -> Beside:
    idle = load.run(lambda: load.opened(target, queries, per_s, until=load.after_s(idle_s)))
    beside, both = load.run(lambda: _both(target, requested(target, bulk), queries, per_s))
    for outcome in (idle, beside, both):
        if outcome.num_failed or not outcome.samples:
            raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return Beside(idle, beside, both)


def _rows_beside(name: str, rounds: Sequence[Beside]) -> list[tuple[str, ...]]:
    idle = [sample.latency_s for one in rounds for sample in one.idle.samples]
    busy = [sample.latency_s for one in rounds for sample in one.beside.samples]
    other = "rerank" if name == "embed" else "embed"
    return [
        _latencies(f"{name}, nothing else runs", idle),
        _latencies(f"{name}, beside a bulk request to {other}", busy),
        ("ratio", "", *(f"{percentile(busy, at) / percentile(idle, at):.2f}" for at in (0.5, 0.95, 0.99))),
    ]


def main_rerank(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.sharing rerank", description=__doc__)
    parser.add_argument("--size", default="minilm", choices=tuple(rerankers.SIZES), help="of the reranker")
    parser.add_argument("--texts", type=int, default=BULK_TEXTS, help="of the bulk request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-second", type=float, default=PER_S)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_S)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    folders = resolve("minilm"), rerankers.build(asked.size)
    report = run_rerank(*folders, asked.texts, asked.rounds, per_s=asked.per_second, idle_s=asked.idle_seconds)
    publish(report, asked.results)


def main() -> None:
    """Run the requested command."""
    run_command({"queries": main_queries, "models": main_models, "rerank": main_rerank})


if __name__ == "__main__":
    main()
