"""Measures the offline engine beside sentence-transformers (`base`) or beside every peer (`peers`).

    python -m benchmarks.offline.throughput base --workloads short mixed
    python -m benchmarks.offline.throughput peers

All programs embed the same texts in calls of the same size, each in a process of its own, in interleaved rounds. Peers
run in environments of their own (`python -m benchmarks.lib.peers` makes them). `peers` first checks that all compute
the same vectors, and its table shows how far each is from sentence-transformers: a fast program that computes something
else is no faster. `benchmarks.http.compare` measures the servers.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.folders import MAX_TOKENS, resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Contestant, Run, interleave, speedup
from benchmarks.lib.peers import BASE, OURS, PEERS, Peer, open_workers
from benchmarks.lib.report import Report, add_save_option, can_draw, draw_bars, publish, run_command
from benchmarks.lib.worker import Worker
from benchmarks.lib.workloads import Count, Workload


class Case(Struct, frozen=True):
    """One row of the table: texts, and their number per call."""

    name: str
    workload: Workload
    texts_per_call: int

    @property
    def calls(self) -> list[tuple[str, ...]]:
        """Return the calls of one sample."""
        return self.workload.calls(self.texts_per_call)


SHAPES: dict[str, tuple[str, int, int]] = {
    "short": ("short", 64, 8),
    "passages": ("passages", 64, 1),
    "mixed": ("mixed", 64, 1),
    "long": ("long", 64, 1),
    "chinese": ("chinese", 64, 1),
    "queries": ("queries", 64, 1),
    "mixed-1024": ("mixed", 1024, 1),
}
"""Cases: workload, texts a call, calls a sample (several where one is too quick to be timed)."""


USUAL = [name for name in SHAPES if name != workloads.QUERIES]
"""The cases of every table; `queries` share an instruction, which only decoders compute once."""


def make_cases(names: Sequence[str], count: Count, scale: float = 1.0) -> list[Case]:
    """Make the cases of these names; `scale` shrinks the calls for slow models and for tests."""
    cases = []
    for name in names:
        workload, texts, calls = SHAPES[name]
        texts = max(1, round(texts * scale))
        cases.append(Case(name, workloads.make(workload, texts * calls, count), texts))
    return cases


def measure(
    cases: Sequence[Case], contestants: Sequence[Contestant], rounds: int, *, settle_s: float = SETTLE_S
) -> dict[str, dict[str, list[float]]]:
    """Return seconds by case and contestant, `rounds` of each. One uncounted round warms up every shape."""
    samples = {}
    for case in cases:
        runs: dict[str, Run] = {one.name: partial(one.seconds, case.calls) for one in contestants}
        samples[case.name] = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
        rates = [
            f"{name} {case.workload.num_tokens / median(times):,.0f}" for name, times in samples[case.name].items()
        ]
        print(f"{case.name}: {', '.join(rates)} tokens/s", flush=True)
    return samples


def rows_beside_base(
    cases: Sequence[Case], samples: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], base: str
) -> list[tuple[str, ...]]:
    """Return table rows: the workload, tokens/s of the base, and the ratio of each of the others to it."""
    return [
        (
            f"{case.name} ({len(case.calls)} × {case.texts_per_call} texts, {case.workload.num_tokens:,} tokens)",
            f"{case.workload.num_tokens / median(samples[case.name][base]):,.0f}",
            *(str(speedup(samples[case.name][name], samples[case.name][base])) for name in names if name != base),
        )
        for case in cases
    ]


def describe(cases: Sequence[Case]) -> dict[str, Any]:
    """Return the facts that must agree for two runs to be comparable."""
    return {
        case.name: {
            "tokens": case.workload.num_tokens,
            "texts": len(case.workload.texts),
            "texts_per_call": case.texts_per_call,
            "fingerprint": case.workload.fingerprint,
        }
        for case in cases
    }


def run_beside_base(
    folder: Path, names: Sequence[str], rounds: int, *, scale: float = 1.0, settle_s: float = SETTLE_S
) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    cases = make_cases(names, workloads.counter(folder), scale)
    with open_workers(folder, [BASE]) as (workers, notes):
        samples = measure(cases, workers, rounds, settle_s=settle_s)
        machine = watch.machine
        facts = {worker.name: worker.facts for worker in workers}
    contestants = [worker.name for worker in workers]
    return Report(
        name=f"throughput-{folder.name}",
        title=f"Offline throughput, {folder.name}, float32, up to {MAX_TOKENS} tokens a text",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "scale": scale},
        header=("workload", f"{BASE.name}, tokens/s", *(f"{name}, ×" for name in contestants if name != BASE.name)),
        rows=rows_beside_base(cases, samples, contestants, BASE.name),
        samples={"cases": describe(cases), "seconds": samples, "contestants": facts},
        notes=(*notes, "ratio of medians, in brackets the worst and the best pair of a round; real tokens only"),
    )


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that all offline benchmarks have."""
    parser.add_argument("--model", default="minilm", help="a name in benchmarks/lib/folders.py, or a folder")
    parser.add_argument("--workloads", nargs="+", default=USUAL, choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="texts a call, as a part of the usual number")
    add_save_option(parser)
    return parser


def main_base(argv: Sequence[str]) -> None:
    """Print the table."""
    asked = arguments(
        argparse.ArgumentParser(prog="python -m benchmarks.offline.throughput base", description=__doc__)
    ).parse_args(argv)
    publish(run_beside_base(resolve(asked.model), asked.workloads, asked.rounds, scale=asked.scale), asked.results)


NOTES = (
    f"ratio of medians to {BASE.name}, in brackets the worst and the best pair of a round",
    "off by: the largest difference of any component of the (unit-length) vectors from the base's; 1e-6 is rounding, "
    "1e-4 an approximated activation function, 1e-3 bfloat16",
)


def deviations(workers: Sequence[Worker], count: Count) -> dict[str, float]:
    """Return the largest difference of a component of each worker's vectors from the base's."""
    texts = [text for name in workloads.NAMES for text in workloads.make(name, 3, count, seed=11).texts]
    vectors = {worker.name: worker.vectors(texts) for worker in workers}
    return {name: float(np.abs(found - vectors[BASE.name]).max()) for name, found in vectors.items()}


def rows_beside_peers(
    cases: Sequence[Case],
    samples: Mapping[str, Mapping[str, Sequence[float]]],
    off_by: Mapping[str, float],
) -> list[tuple[str, ...]]:
    """Return one table row for each program: its ratio to the base on each workload."""
    lines = []
    for name, deviation in off_by.items():
        ratios = [str(speedup(samples[case.name][name], samples[case.name][BASE.name])) for case in cases]
        if name == BASE.name:
            rates = [case.workload.num_tokens / median(samples[case.name][name]) for case in cases]
            ratios = [f"1 = {rate:,.0f} tokens/s" for rate in rates]
        lines.append((name, *ratios, f"{deviation:.0e}"))
    return lines


def run_beside_peers(
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
        rows=rows_beside_peers(cases, samples, off_by),
        samples={"cases": describe(cases), "seconds": samples, "off_by": off_by},
        notes=(*NOTES, *notes, *(f"{name}: {versions}" for name, versions in packages.items() if versions)),
    )


def draw(report: Report, path: Path) -> None:
    """Draw each program's ratio to the base as bars, ours first."""
    samples = report.samples["seconds"]
    programs = sorted(report.samples["off_by"], key=lambda name: name != OURS)
    series = {
        name: [speedup(samples[case][name], samples[case][BASE.name]).value for case in samples] for name in programs
    }
    draw_bars(path, f"{report.title}; 1 = {BASE.name}", list(samples), series)


def _packages(worker: Worker) -> str:
    """Return the versions of the packages that decide the program's speed."""
    found: dict[str, str] = worker.facts.get("packages", {})
    shown = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "infinity-emb",
             "llama-cpp-python")  # fmt: skip
    return ", ".join(f"{name} {found[name]}" for name in shown if name in found)


def main_peers(argv: Sequence[str]) -> None:
    """Print the table and draw it."""
    parser = arguments(
        argparse.ArgumentParser(prog="python -m benchmarks.offline.throughput peers", description=__doc__)
    )
    parser.add_argument("--peers", nargs="+", choices=[peer.kind for peer in PEERS], help="some of them")
    asked = parser.parse_args(argv)
    wanted = {BASE.kind, *(asked.peers or [peer.kind for peer in PEERS])}
    chosen = [peer for peer in PEERS if peer.kind in wanted]
    report = run_beside_peers(resolve(asked.model), asked.workloads, asked.rounds, peers=chosen, scale=asked.scale)
    publish(report, asked.results)
    if asked.results is not None and can_draw():
        draw(report, asked.results / f"{report.name}.svg")


def main() -> None:
    """Run the requested command."""
    run_command({"base": main_base, "peers": main_peers})


if __name__ == "__main__":
    main()
