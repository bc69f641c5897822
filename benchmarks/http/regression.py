"""Measures whether the working tree serves faster or slower over HTTP than another commit.

    python -m benchmarks.http.regression --against HEAD [--dtype bfloat16] [--busy] [--cases passages:1:1 long:1:1]

Both servers are up at once and measured one at a time, round by round, with default settings: single short texts from
1, 8, 32, 64 and 256 clients, and 32 mixed texts a request from 8; closed loops. Other cases are named by workload,
texts of a request and clients. `--busy` keeps one core busy meanwhile.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from msgspec import Struct, structs

from benchmarks.http.compare import Case, measure
from benchmarks.lib import workloads
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


class Comparison(Struct, frozen=True):
    """What is compared, and how.

    Attributes:
        commit: the tree to compare with.
        seconds: of each load in each round.
        is_busy: whether another process keeps one core busy.
    """

    commit: str
    rounds: int
    seconds: float
    cases: tuple[Case, ...]
    dtype: str
    is_busy: bool


@contextmanager
def busy_core(is_wanted: bool) -> Iterator[None]:
    """Keep one core busy, if that is wanted, until the block ends."""
    if not is_wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(folder: Path, asked: Comparison) -> Report:
    """Measure a model folder on both trees."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft, tempfile.TemporaryDirectory() as tree:
        before = unpack(asked.commit, Path(tree))
        registry = write_registry(Path(draft) / "registry.yaml", {"minilm": folder})
        registry.write_text(f"{registry.read_text()}    dtype: {asked.dtype}\n")
        new, old = plan_of(ROOT, NOW, registry), plan_of(Path(tree), before, registry)
        with serving(new) as now, serving(old) as then, busy_core(asked.is_busy):
            samples = {}
            for case in asked.cases:
                samples[case], _ = measure(case, [now, then], folder, asked.rounds, asked.seconds)
                print(f"{case}: {quotient(samples[case][NOW], samples[case][before])}", flush=True)
            machine = watch.machine
    beside = ", one core busy" if asked.is_busy else ""
    return Report(
        name="regression-http",
        title=f"{NOW} against {before}, over HTTP, {asked.dtype}{beside}",
        machine=machine,
        settings={
            "model": folder.name, "rounds": asked.rounds, "seconds": asked.seconds, "dtype": asked.dtype,
            "busy": asked.is_busy,
        },
        header=("load", f"{before}, texts/s", f"{NOW}, texts/s", "ratio"),
        rows=[row(case, by, before) for case, by in samples.items()],
        samples={str(case): by for case, by in samples.items()},
        notes=("ratio of medians, in brackets the worst and the best round: if 1 is between, they tie",),
    )  # fmt: skip


def read_case(text: str) -> Case:
    """Read `WORKLOAD:TEXTS:CLIENTS`.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    workload, *counts = text.split(":")
    if workload not in workloads.NAMES or len(counts) != 2 or not all(count.isdigit() for count in counts):
        raise argparse.ArgumentTypeError(f"{text}: name a workload, texts of a request and clients, as long:1:2")
    return Case(workload, int(counts[0]), int(counts[1]))


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
    parser.add_argument("--cases", nargs="+", type=read_case, default=CASES, help="WORKLOAD:TEXTS:CLIENTS")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    comparison = Comparison(
        asked.against, asked.rounds, asked.seconds, tuple(asked.cases), asked.dtype, is_busy=asked.busy
    )
    publish(run(resolve(asked.model), comparison), asked.results)


if __name__ == "__main__":
    main()
