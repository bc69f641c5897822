"""`python -m benchmarks.two_models`: two models under equal load on one device: what sharing costs, and who gets what.

Each model alone, then both at once, in interleaved rounds; the shares are seconds of the device's lane. With models of
different sizes the sum is of parts: what each reaches beside the other over what it reaches alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import workloads
from benchmarks.folders import resolve
from benchmarks.machine import Watch, warn_if_busy
from benchmarks.measure import SETTLE_S, interleave
from benchmarks.peers import interpreter
from benchmarks.report import RESULTS, Report, publish
from benchmarks.worker import Worker

TEXTS = 32
CLIENTS = 4


def run(
    folders: Sequence[Path],
    workload: str,
    seconds: float,
    rounds: int,
    *,
    texts: int = TEXTS,
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
        rows=rows(answers),
        samples=answers,
        notes=("the time is that of the device's turns; the sum is of parts of each one's lone speed",),
    )


def rows(answers: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Table rows: speeds alone and together, parts and their sum, shares of time."""
    alone = [median(one["texts_per_s"][0] for one in answers[name]) for name in ("first", "second")]
    both = [median(one["texts_per_s"][at] for one in answers["both"]) for at in (0, 1)]
    parts = [own / lone for own, lone in zip(both, alone, strict=True)]
    shares = [median(one["lane_s"][at] / sum(one["lane_s"]) for one in answers["both"]) for at in (0, 1)]
    return [
        ("alone, texts/s", *(f"{rate:,.1f}" for rate in alone), ""),
        ("together, texts/s", *(f"{rate:,.1f}" for rate in both), f"{sum(both):,.1f}"),
        ("part of its lone speed", *(f"{100 * part:.0f} %" for part in parts), f"{100 * sum(parts):.0f} %"),
        ("share of the time", *(f"{100 * share:.0f} %" for share in shares), ""),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_models", description=__doc__)
    parser.add_argument("--models", nargs=2, default=["minilm", "minilm"])
    parser.add_argument("--workload", default="mixed", choices=workloads.NAMES)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    folders = [resolve(model) for model in asked.models]
    publish(run(folders, asked.workload, asked.seconds, asked.rounds), asked.results)


if __name__ == "__main__":
    main()
