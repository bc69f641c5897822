"""Compares our server with others on rerankers: Infinity, and FastAPI around CrossEncoder of sentence-transformers.

    python -m benchmarks.http.rerank --model minilm

Eight clients send requests of one query and 100 documents, of mixed lengths (5 to 250 tokens) and of equal ones, to
rerankers of random weights in the sizes of ms-marco-MiniLM-L6 and bge-reranker-base. All servers are up at once, with
their default settings, and are measured one at a time, round by round: each answers the same requests, every one sent
once. First all score the same documents, and a server whose scores differ is not measured. The last columns are by the
processor time of the server, which other programs on the machine change little.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from msgspec import Struct, structs

from benchmarks.http.compare import open_servers
from benchmarks.lib import workloads
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Run, interleave, percentile, quotient
from benchmarks.lib.peers import OURS, interpreter
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import Plan, Server, infinity, own, write_registry
from benchmarks.lib.worker import PEER_SCRIPTS
from benchmarks.offline.rerank import CASES, SIZES, build
from router import loadgen as load
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode, scores

CLIENTS = 8
DOCUMENTS = 100
TOLERANCE = 1e-4
"""Largest difference of a score from ours; all compute in float32."""


class Measured(Struct, frozen=True):
    """One round of one server: what the clients saw, and the core seconds that the server used meanwhile."""

    outcome: Outcome
    core_s: float

    @property
    def per_core_s(self) -> float:
        """Return documents a core second."""
        return self.outcome.texts_per_s * self.outcome.wall_s / self.core_s


def plans(folder: Path, draft: Path) -> list[Plan]:
    """Return how to start each server, ours first."""
    registry = write_registry(draft / "registry.yaml", {"reranker": folder})
    script = str(PEER_SCRIPTS / "fastapi_rerank.py")
    cross_encoder = Plan(
        "FastAPI + CrossEncoder",
        "reranker",
        lambda port: [str(interpreter("fastapi")), script, str(folder), str(port)],
        "fastapi",
    )
    return [own(registry, "reranker"), infinity(folder, "torch"), cross_encoder]


def calls(folder: Path, case: str, num_requests: int, documents: int) -> list[list[str]]:
    """Make requests, each a query and its documents; no two have a text in common."""
    count = workloads.counter(folder)
    queries = workloads.make("short", num_requests, count).texts
    texts = workloads.make(CASES[case], num_requests * documents, count).calls(documents)
    return [[query, *few] for query, few in zip(queries, texts, strict=True)]


def measure(
    servers: Sequence[Server], work: Sequence[Sequence[str]], rounds: int, *, settle_s: float = SETTLE_S
) -> dict[str, list[Measured]]:
    """Return the rounds of each server. One request of each client warms it up, uncounted.

    Raises:
        OSError: a request failed.
    """
    found: dict[str, list[Measured]] = {server.name: [] for server in servers}

    def sample(server: Server, requests: Sequence[Request]) -> float:
        before = server.core_s
        outcome = _send(server.target, requests)
        found[server.name].append(Measured(outcome, server.core_s - before))
        return outcome.texts_per_s

    runs: dict[str, Run] = {}
    for server in servers:
        requests = [encode(server.target, call) for call in work]
        _send(server.target, [encode(server.target, call[:9]) for call in work[:CLIENTS]])
        runs[server.name] = partial(sample, server, requests)
    interleave(runs, rounds, settle_s=settle_s)
    return found


def _send(target: Target, requests: Sequence[Request]) -> Outcome:
    outcome = load.run(lambda: load.closed(target, requests, CLIENTS, until=load.after(len(requests))))
    if outcome.num_failed:
        raise OSError(f"{outcome.num_failed} of {len(outcome.samples)} requests failed: {outcome.errors}")
    return outcome


def row(case: str, found: Mapping[str, Sequence[Measured]]) -> tuple[str, ...]:
    """Return one row: speeds, our ratio to the best peer, p95 latencies; and speeds by processor time, with ours over
    the best."""
    rates = {name: [one.outcome.texts_per_s for one in rounds] for name, rounds in found.items()}
    per_core = {name: [one.per_core_s for one in rounds] for name, rounds in found.items()}
    p95 = [percentile([s.latency_s for one in rounds for s in one.outcome.samples], 0.95) for rounds in found.values()]
    return (
        case,
        *(f"{median(samples):,.1f}" for samples in rates.values()),
        _over_the_best(rates),
        " / ".join(f"{1000 * seconds:,.0f}" for seconds in p95),
        " / ".join(f"{median(samples):,.1f}" for samples in per_core.values()),
        _over_the_best(per_core),
    )


def _over_the_best(samples: Mapping[str, Sequence[float]]) -> str:
    best = max((name for name in samples if name != OURS), key=lambda name: median(samples[name]), default=OURS)
    return str(quotient(samples[OURS], samples[best]))


def differences(servers: Sequence[Server], call: Sequence[str]) -> dict[str, float]:
    """Return the largest difference of a score of each server from ours."""
    found = {server.name: scores(server.target, call[0], call[1:]) for server in servers}
    return {name: max(abs(one - ours) for one, ours in zip(found[name], found[OURS], strict=True)) for name in found}


def run(
    folder: Path, cases: Sequence[str], rounds: int, num_requests: int, documents: int, *, settle_s: float = SETTLE_S
) -> Report:
    """Measure a reranker on every server that is installed."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with (
        tempfile.TemporaryDirectory() as draft,
        open_servers(plans(folder, Path(draft)), first=_first) as (started, notes),
    ):
        servers = [structs.replace(one, target=_reranking(one.target)) for one in started]
        work = {case: calls(folder, case, num_requests, documents) for case in cases}
        off_by = differences(servers, work[cases[0]][0])
        wrong = {name: off for name, off in off_by.items() if not off <= TOLERANCE}
        notes += [f"left out: the scores of {name} are {off:.0e} from ours" for name, off in wrong.items()]
        servers = [server for server in servers if server.name not in wrong]
        found = {}
        for case in cases:
            print(f"measuring {case} …", file=sys.stderr, flush=True)
            found[case] = measure(servers, work[case], rounds, settle_s=settle_s)
        machine = watch.machine
    names = [server.name for server in servers]
    client = max(one.outcome.client_cores for by in found.values() for several in by.values() for one in several)
    return Report(
        name="-".join(
            ["rerank-http", folder.name.removeprefix("reranker-"), *(cases if len(cases) < len(CASES) else [])]
        ),
        title=f"Rerankers over HTTP beside the peers, {folder.name}, one query and {documents} documents a request, "
        f"{CLIENTS} clients",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "requests": num_requests, "documents": documents},
        header=(
            "documents",
            *(f"{name}, documents/s" for name in names),
            "ours over the best",
            f"p95 ms, {' / '.join(names)}",
            "documents a core second",
            "ours over the best",
        ),
        rows=[row(case, by) for case, by in found.items()],
        samples={
            "documents_per_s": {
                c: {n: [o.outcome.texts_per_s for o in s] for n, s in by.items()} for c, by in found.items()
            },
            "documents_per_core_s": {
                c: {n: [o.per_core_s for o in s] for n, s in by.items()} for c, by in found.items()
            },
            "off_by": off_by,
        },
        notes=(
            *notes,
            f"the client took at most {client:.2f} of the {machine.cores} cores that the servers have too",
            f"largest difference of a score from {OURS}: " + ", ".join(f"{n} {off:.0e}" for n, off in off_by.items()),
        ),
    )


def _reranking(target: Target) -> Target:
    return structs.replace(target, route="rerank")


def _first(target: Target) -> None:
    scores(_reranking(target), "Is the server up?", ["The server is up."])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and save it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.rerank", description=__doc__)
    parser.add_argument("--model", default="minilm", choices=tuple(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2 * CLIENTS, help="requests a round")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="documents a request")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run(build(asked.model), asked.cases, asked.rounds, asked.requests, asked.documents)
    publish(report, asked.results)


if __name__ == "__main__":
    main()
