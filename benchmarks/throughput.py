"""`python -m benchmarks.throughput`: the offline engine beside sentence-transformers, tokens a second on each workload.

Both embed the same texts in calls of the same size, each in a process of its own, in interleaved rounds. `make bench`.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct

from benchmarks import workloads
from benchmarks.folders import MAX_TOKENS, resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.measure import SETTLE_S, Contestant, Run, interleave, speedup
from benchmarks.peers import BASE, open_workers
from benchmarks.report import RESULTS, Report, publish
from benchmarks.workloads import Count, Workload


class Case(Struct, frozen=True):
    """One line of the table: texts, and how many make one call."""

    name: str
    workload: Workload
    texts_per_call: int

    @property
    def calls(self) -> list[tuple[str, ...]]:
        """The work of one sample."""
        return self.workload.calls(self.texts_per_call)


SHAPES: dict[str, tuple[str, int, int]] = {
    "short": ("short", 64, 8),
    "passages": ("passages", 64, 1),
    "mixed": ("mixed", 64, 1),
    "long": ("long", 64, 1),
    "chinese": ("chinese", 64, 1),
    "mixed-1024": ("mixed", 1024, 1),
}
"""Cases: workload, texts a call, calls a sample (several where one is too quick to be timed)."""


def make_cases(names: Sequence[str], count: Count, scale: float = 1.0) -> list[Case]:
    """The cases of these names; `scale` shrinks the calls for slow models and for tests."""
    cases = []
    for name in names:
        workload, texts, calls = SHAPES[name]
        texts = max(1, round(texts * scale))
        cases.append(Case(name, workloads.make(workload, texts * calls, count), texts))
    return cases


def measure(
    cases: Sequence[Case], contestants: Sequence[Contestant], rounds: int, *, settle_s: float = SETTLE_S
) -> dict[str, dict[str, list[float]]]:
    """Seconds by case and contestant, `rounds` of each. One uncounted round warms up every shape."""
    samples = {}
    for case in cases:
        runs: dict[str, Run] = {one.name: partial(one.seconds, case.calls) for one in contestants}
        samples[case.name] = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
        rates = [
            f"{name} {case.workload.num_tokens / median(times):,.0f}" for name, times in samples[case.name].items()
        ]
        print(f"{case.name}: {', '.join(rates)} tokens/s", flush=True)
    return samples


def rows(
    cases: Sequence[Case], samples: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], base: str
) -> list[tuple[str, ...]]:
    """Table rows: the workload, tokens/s of the base, and the ratio of each of the others to it."""
    return [
        (
            f"{case.name} ({len(case.calls)} × {case.texts_per_call} texts, {case.workload.num_tokens:,} tokens)",
            f"{case.workload.num_tokens / median(samples[case.name][base]):,.0f}",
            *(str(speedup(samples[case.name][name], samples[case.name][base])) for name in names if name != base),
        )
        for case in cases
    ]


def describe(cases: Sequence[Case]) -> dict[str, Any]:
    """What another run must match to be comparable."""
    return {
        case.name: {
            "tokens": case.workload.num_tokens,
            "texts": len(case.workload.texts),
            "texts_per_call": case.texts_per_call,
            "fingerprint": case.workload.fingerprint,
        }
        for case in cases
    }


def run(folder: Path, names: Sequence[str], rounds: int, *, scale: float = 1.0, settle_s: float = SETTLE_S) -> Report:
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
        rows=rows(cases, samples, contestants, BASE.name),
        samples={"cases": describe(cases), "seconds": samples, "contestants": facts},
        notes=(*notes, "ratio of medians, in brackets the worst and the best pair of a round; real tokens only"),
    )


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every offline benchmark may be asked."""
    parser.add_argument("--model", default="minilm", help="minilm, bert-base, xlmr-large, or a folder")
    parser.add_argument("--workloads", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="texts a call, as a part of the usual number")
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    return parser


def main() -> None:
    """Print the table."""
    asked = arguments(argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)).parse_args()
    publish(run(resolve(asked.model), asked.workloads, asked.rounds, scale=asked.scale), asked.results)


if __name__ == "__main__":
    main()
