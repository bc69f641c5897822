"""`python -m benchmarks.over_http`: what is left of the offline engine's speed when the same work comes over HTTP.

The same requests (32 mixed texts, base64) go to our server from eight clients, and to the engine in a process without
a server, eight at a time, round by round. The client runs on the same cores, and its share is said.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import workloads
from benchmarks.folders import resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.measure import SETTLE_S, Run, interleave, quotient
from benchmarks.peers import own_worker
from benchmarks.report import RESULTS, Report, publish
from benchmarks.serving import own_server
from benchmarks.worker import Worker
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode

CLIENTS = 8
TEXTS = 32


def over_http(target: Target, requests: Sequence[Request], clients: int) -> Outcome:
    """All requests once.

    Raises:
        OSError: one failed.
    """
    outcome = load.run(lambda: load.closed(target, requests, clients, until=load.after(len(requests))))
    if outcome.num_failed:
        raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return outcome


def offline(engine: Worker, calls: Sequence[Sequence[str]], clients: int) -> float:
    """Texts a second without a server."""
    seconds = float(engine.ask(op="time", calls=list(calls), concurrency=clients)["seconds"])
    return sum(map(len, calls)) / seconds


def run(folder: Path, workload: str, texts: int, num_calls: int, rounds: int, *, settle_s: float = SETTLE_S) -> Report:
    """Measure a model folder."""
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_http", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--workload", default="mixed", choices=workloads.NAMES)
    parser.add_argument("--texts", type=int, default=TEXTS, help="texts a request")
    parser.add_argument("--requests", type=int, default=24, help="requests a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.workload, asked.texts, asked.requests, asked.rounds), asked.results)


if __name__ == "__main__":
    main()
