"""`python -m benchmarks.compare`: the offline engine beside every peer, on every workload, in one table and one plot.

Peers run in environments of their own (`python -m benchmarks.peers` makes them); each embeds the same texts in calls
of the same size, round by round. That all compute the same vectors is checked first, and how far each is from
sentence-transformers stands in the table: a fast program that computes something else is no faster.
`compare_http.py` has the servers.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import plot, workloads
from benchmarks.folders import MAX_TOKENS, resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.measure import SETTLE_S, speedup
from benchmarks.peers import BASE, OURS, PEERS, Peer, open_workers
from benchmarks.report import Report, publish
from benchmarks.throughput import Case, arguments, describe, make_cases, measure
from benchmarks.worker import Worker
from benchmarks.workloads import Count

NOTES = (
    f"ratio of medians to {BASE.name}, in brackets the worst and the best pair of a round",
    "off by: the largest difference of any component of the (unit-length) vectors from the base's; 1e-6 is rounding, "
    "1e-4 an approximated activation function, 1e-3 bfloat16",
)


def deviations(workers: Sequence[Worker], count: Count) -> dict[str, float]:
    """How far each one's vectors are from the base's: the largest difference of a component."""
    texts = [text for name in workloads.NAMES for text in workloads.make(name, 3, count, seed=11).texts]
    vectors = {worker.name: worker.vectors(texts) for worker in workers}
    return {name: float(np.abs(found - vectors[BASE.name]).max()) for name, found in vectors.items()}


def rows(
    cases: Sequence[Case],
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    off_by: Mapping[str, float],
) -> list[tuple[str, ...]]:
    """Table rows: one for each program, its ratio to the base on each workload."""
    lines = []
    for name, deviation in off_by.items():
        ratios = [str(speedup(samples[case.name][name], samples[case.name][BASE.name])) for case in cases]
        if name == BASE.name:
            rates = [case.workload.num_tokens / median(samples[case.name][name]) for case in cases]
            ratios = [f"1 = {rate:,.0f} tokens/s" for rate in rates]
        lines.append((name, *ratios, f"{deviation:.0e}"))
    return lines


def run(
    folder: Path,
    names: Sequence[str],
    rounds: int,
    *,
    peers: Sequence[Peer] = PEERS,
    scale: float = 1.0,
    settle_s: float = SETTLE_S,
) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    count = workloads.counter(folder)
    cases = make_cases(names, count, scale)
    with open_workers(folder, peers) as (workers, notes):
        off_by = deviations(workers, count)
        samples = measure(cases, workers, rounds, settle_s=settle_s)
        packages = {worker.name: _packages(worker) for worker in workers}
        machine = watch.machine
    return Report(
        name=f"compare-{folder.name}",
        title=f"Offline throughput beside the peers, {folder.name}, up to {MAX_TOKENS} tokens a text",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "scale": scale},
        header=("program", *(f"{case.name} ({case.texts_per_call} a call)" for case in cases), "off by"),
        rows=rows(cases, samples, off_by),
        samples={"cases": describe(cases), "seconds": samples, "off_by": off_by},
        notes=(*NOTES, *notes, *(f"{name}: {versions}" for name, versions in packages.items() if versions)),
    )


def draw(report: Report, path: Path) -> None:
    """Bars: each program's ratio to the base, ours first."""
    samples = report.samples["seconds"]
    programs = sorted(report.samples["off_by"], key=lambda name: name != OURS)
    series = {
        name: [speedup(samples[case][name], samples[case][BASE.name]).value for case in samples] for name in programs
    }
    plot.bars(path, f"{report.title}; 1 = {BASE.name}", list(samples), series)


def _packages(worker: Worker) -> str:
    """The versions that matter: what the program is made of."""
    found: dict[str, str] = worker.facts.get("packages", {})
    shown = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "infinity-emb")
    return ", ".join(f"{name} {found[name]}" for name in shown if name in found)


def main() -> None:
    """Print the table, and draw it."""
    parser = arguments(argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__))
    parser.add_argument("--peers", nargs="+", choices=[peer.kind for peer in PEERS], help="some of them")
    asked = parser.parse_args()
    wanted = {BASE.kind, *(asked.peers or [peer.kind for peer in PEERS])}
    chosen = [peer for peer in PEERS if peer.kind in wanted]
    report = run(resolve(asked.model), asked.workloads, asked.rounds, peers=chosen, scale=asked.scale)
    publish(report, asked.results)
    if asked.results is not None and plot.is_available():
        draw(report, asked.results / f"{report.name}.svg")


if __name__ == "__main__":
    main()
