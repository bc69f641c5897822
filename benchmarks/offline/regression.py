"""Measures whether the working tree is faster or slower than another commit, by default the last (`make bench-diff`).

    python -m benchmarks.offline.regression --against HEAD

The other commit's files go into a temporary folder, and its engine runs beside ours, round by round, driven by the same
script: both are measured on the same machine in the same minutes. Commits before today's packages can be compared, too
(`benchmarks/peers/layouts.py`).
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import ROOT, Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, speedup
from benchmarks.lib.peers import own_worker
from benchmarks.lib.report import Report, publish
from benchmarks.lib.worker import Worker
from benchmarks.offline.throughput import arguments, describe, make_cases, measure, rows_beside_base

NOW = "working tree"
TOLERANCE = 0.95
"""Slower than this, in every round, is a regression; `main` then exits with 1."""


def unpack(commit: str, folder: Path) -> str:
    """Put `engines` and `router` of a commit into a folder, and return the commit's short name.

    Raises:
        ValueError: git finds no such commit.
    """
    ask = ["git", "rev-parse", "--short", f"{commit}^{{commit}}"]
    known = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode:
        raise ValueError(f"git finds no commit {commit!r}: {known.stderr.strip()}")
    archive = subprocess.run(
        ["git", "archive", known.stdout.strip(), "engines", "router"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return known.stdout.strip()


def run(
    folder: Path, names: Sequence[str], rounds: int, commit: str, *, scale: float = 1.0, settle_s: float = SETTLE_S
) -> Report:
    """Measure a model folder on both trees."""
    watch = Watch()
    warn_if_busy(watch.machine)
    cases = make_cases(names, workloads.counter(folder), scale)
    with tempfile.TemporaryDirectory() as draft:
        before = unpack(commit, Path(draft))
        with own_worker(folder, name=NOW) as new, own_worker(folder, name=before, packages=Path(draft)) as old:
            for worker, tree in ((new, ROOT), (old, Path(draft))):
                _check_tree(worker.wait_until_warm(), tree)
            samples = measure(cases, [old, new], rounds, settle_s=settle_s)
            machine = watch.machine
    return Report(
        name=f"diff-{folder.name}",
        title=f"{NOW} against {before}, {folder.name}",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "scale": scale},
        header=("workload", f"{before}, tokens/s", f"{NOW}, ×"),
        rows=rows_beside_base(cases, samples, [before, NOW], before),
        samples={"cases": describe(cases), "seconds": samples, "before": before},
        notes=("ratio of medians, in brackets the worst and the best pair of a round: if 1 is between, they tie",),
    )


def regressions(report: Report) -> list[str]:
    """Return the workloads on which the working tree was slower in every round, and by more than noise."""
    before = report.samples["before"]
    ratios = {case: speedup(times[NOW], times[before]) for case, times in report.samples["seconds"].items()}
    return [f"{case}: {ratio}" for case, ratio in ratios.items() if ratio.high < 1 and ratio.value < TOLERANCE]


def _check_tree(worker: Worker, tree: Path) -> None:
    """Assert that a worker imported `engines` from its tree; else a tree would be compared with itself."""
    found = Path(worker.facts["engines"]).resolve()
    assert found == tree.resolve(), f"{worker.name} runs {found}, not {tree}"


def main() -> None:
    """Print the table; exit with 1 when the working tree is slower."""
    parser = arguments(argparse.ArgumentParser(prog="python -m benchmarks.offline.regression", description=__doc__))
    parser.add_argument("--against", default="HEAD", help="the commit to compare with")
    parser.set_defaults(results=None)
    asked = parser.parse_args()
    report = run(resolve(asked.model), asked.workloads, asked.rounds, asked.against, scale=asked.scale)
    publish(report, asked.results)
    if slower := regressions(report):
        sys.exit("slower than before: " + "; ".join(slower))


if __name__ == "__main__":
    main()
