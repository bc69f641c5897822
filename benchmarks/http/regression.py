"""Measures whether the working tree serves faster or slower over HTTP than another commit.

    python -m benchmarks.http.regression --against HEAD

Both servers are up at once and measured one at a time, round by round, with default settings: single short texts from
1, 8, 32, 64 and 256 clients, and 32 mixed texts a request from 8; closed loops.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from msgspec import structs

from benchmarks.http.compare import Case, measure
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import ROOT, Watch, warn_if_busy
from benchmarks.lib.measure import quotient
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import Plan, own, serving, write_registry
from benchmarks.offline.regression import NOW, unpack

CASES = (*(Case("short", 1, clients) for clients in (1, 8, 32, 64, 256)), Case("mixed", 32, 8))


def plan_of(tree: Path, name: str, registry: Path) -> Plan:
    """Return how to start the server of a tree."""
    return structs.replace(own(registry, "minilm", PYTHONPATH=str(tree)), name=name, folder=tree)


def row(case: Case, samples: Mapping[str, Sequence[float]], before: str) -> tuple[str, ...]:
    """Return one row of the table: texts a second of both, and their ratio with the worst and best round."""
    return (
        str(case),
        f"{median(samples[before]):,.1f}",
        f"{median(samples[NOW]):,.1f}",
        str(quotient(samples[NOW], samples[before])),
    )


def run(folder: Path, commit: str, rounds: int, seconds: float) -> Report:
    """Measure a model folder on both trees."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft, tempfile.TemporaryDirectory() as tree:
        before = unpack(commit, Path(tree))
        registry = write_registry(Path(draft) / "registry.yaml", {"minilm": folder})
        new, old = plan_of(ROOT, NOW, registry), plan_of(Path(tree), before, registry)
        with serving(new) as now, serving(old) as then:
            samples = {}
            for case in CASES:
                samples[case], _ = measure(case, [now, then], folder, rounds, seconds)
                print(f"{case}: {quotient(samples[case][NOW], samples[case][before])}", flush=True)
            machine = watch.machine
    return Report(
        name="regression-http",
        title=f"{NOW} against {before}, over HTTP",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "seconds": seconds},
        header=("load", f"{before}, texts/s", f"{NOW}, texts/s", "ratio"),
        rows=[row(case, by, before) for case, by in samples.items()],
        samples={str(case): by for case, by in samples.items()},
        notes=("ratio of medians, in brackets the worst and the best round: if 1 is between, they tie",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--against", default="HEAD", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load in each round")
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.against, asked.rounds, asked.seconds), asked.results)


if __name__ == "__main__":
    main()
