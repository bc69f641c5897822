"""Compares one text over HTTP with the bare forward pass of the same text.

    python -m benchmarks.http.single

One client sends single texts, one after the other; in turns, a worker runs the encoder alone on the same token ids,
with the same model, path and number of threads. The difference is what connection, API, pool, tokenizer, queue and
wake-ups take. Medians of each round.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Run, interleave, percentile, quotient
from benchmarks.lib.peers import interpreter
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import own_server
from benchmarks.lib.worker import Worker
from router import loadgen as load
from router.loadgen.http_client import Target, encode

GOAL = 1.25
"""The most that a text over HTTP may take, in forward passes."""

_HTTP, _FORWARD = "HTTP", "forward"
_TEXTS = 8


def over_http(target: Target, texts: Sequence[str], num_requests: int) -> float:
    """Return the median seconds of a request of one client.

    Raises:
        OSError: a request failed.
    """
    requests = [encode(target, [text]) for text in texts]
    outcome = load.run(lambda: load.closed(target, requests, 1, until=load.after(num_requests)))
    if outcome.num_failed:
        raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return percentile([sample.latency_s for sample in outcome.samples], 0.5)


def bare(worker: Worker, texts: Sequence[str], num_passes: int) -> float:
    """Return the median seconds of a forward pass."""
    rounds = -(-num_passes // len(texts))
    return percentile(worker.ask(op="forward", texts=list(texts) * rounds)["seconds"], 0.5)


def row(workload: str, found: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """Return one row of the table, from the median seconds of each round."""
    http_s, forward_s = median(found[_HTTP]), median(found[_FORWARD])
    ratio = quotient(found[_HTTP], found[_FORWARD])
    return (
        workload,
        f"{1000 * forward_s:.2f}",
        f"{1000 * http_s:.2f}",
        str(ratio),
        f"{1000 * (http_s - forward_s):.2f}",
    )


def run(model: str, names: Sequence[str], rounds: int, num_requests: int, *, settle_s: float = SETTLE_S) -> Report:
    """Measure a model on each workload."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    rows: list[tuple[str, ...]] = []
    samples = {}
    script = [str(folder)]
    with Worker(_FORWARD, "forward.py", script, python=interpreter(None)) as worker, own_server(folder) as target:
        worker.wait_until_warm()
        for name in names:
            texts = workloads.make(name, _TEXTS, workloads.counter(folder)).texts
            runs: dict[str, Run] = {
                _HTTP: partial(over_http, target, texts, num_requests),
                _FORWARD: partial(bare, worker, texts, num_requests),
            }
            found = samples[name] = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
            rows.append(row(name, found))
        machine = watch.machine
    return Report(
        name="http-single",
        title=f"One text over HTTP beside its forward pass, {folder.name}, one client",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "requests": num_requests, "goal": GOAL},
        header=("workload", "forward, p50 ms", "HTTP, p50 ms", "HTTP over forward", "difference, ms"),
        rows=rows,
        samples=samples,
        notes=(f"wanted: {GOAL} at the most; the client runs on the same cores",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.single", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--workloads", nargs="+", default=["short", "passages"], choices=workloads.NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=200, help="of each sample")
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    publish(run(asked.model, asked.workloads, asked.rounds, asked.requests), asked.results)


if __name__ == "__main__":
    main()
