"""`python -m benchmarks.ceiling`: what share of the machine's matrix-product peak the offline engine reaches.

The peak is measured in the same run, round by round, at the model's own layer shapes: bare float32 products and
nothing else. What is missing to 100 % is everything else that a forward pass, tokenising and pooling do.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import workloads
from benchmarks.flops import Shape, read_shape
from benchmarks.folders import resolve
from benchmarks.machine import Watch, usable_cores, warn_if_busy
from benchmarks.measure import SETTLE_S, interleave
from benchmarks.peers import OURS, interpreter, own_worker
from benchmarks.report import Report, publish
from benchmarks.throughput import Case, arguments, describe, make_cases
from benchmarks.worker import Worker

ROWS = (256, 512, 1024, 2048)
PEAK_S = 1.0


def peak(worker: Worker, shape: Shape, seconds: float = PEAK_S) -> float:
    """FLOP/s of bare matrix products now, at the best of several numbers of rows."""
    linears = [list(linear) for linear in shape.linears]
    rates = worker.ask(op="rates", linears=linears, rows=ROWS, seconds=seconds)["rates"]
    return float(max(rates.values()))


def measure(  # noqa: PLR0913  # who is measured, on what, and how often
    cases: Sequence[Case], shape: Shape, engine: Worker, gemm: Worker, rounds: int, *, settle_s: float, peak_s: float
) -> dict[str, dict[str, list[float]]]:
    """FLOP/s by case: of the engine, and of the bare products beside it."""
    samples = {}
    for case in cases:
        flops, calls = shape.flops(case.workload.tokens), case.calls
        engine.seconds(calls)
        samples[case.name] = interleave(
            {
                "peak": lambda: peak(gemm, shape, peak_s),
                "engine": lambda flops=flops, calls=calls: flops / engine.seconds(calls),  # type: ignore[misc]  # as in throughput.measure
            },
            rounds,
            settle_s=settle_s,
        )
    return samples


def rows(
    cases: Sequence[Case], samples: Mapping[str, Mapping[str, Sequence[float]]], shape: Shape
) -> list[tuple[str, ...]]:
    """Table rows: the arithmetic of a token, the engine's speed, the peak, and the share."""
    lines: list[tuple[str, ...]] = []
    for case in cases:
        engine, ceiling = samples[case.name]["engine"], samples[case.name]["peak"]
        shares = [own / best for own, best in zip(engine, ceiling, strict=True)]
        per_token = shape.flops(case.workload.tokens) / case.workload.num_tokens
        lines.append(
            (
                case.name,
                f"{per_token / 1e6:.1f}",
                f"{median(engine) / per_token:,.0f}",
                f"{median(engine) / 1e9:.0f}",
                f"{median(ceiling) / 1e9:.0f}",
                f"{100 * median(shares):.0f} % ({100 * min(shares):.0f}–{100 * max(shares):.0f})",
            )
        )
    return lines


def run(
    folder: Path,
    names: Sequence[str],
    rounds: int,
    *,
    scale: float = 1.0,
    settle_s: float = SETTLE_S,
    peak_s: float = PEAK_S,
) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    shape, cases = read_shape(folder), make_cases(names, workloads.counter(folder), scale)
    cores = usable_cores()
    with own_worker(folder) as engine, Worker("gemm", "gemm.py", [str(cores)], python=interpreter(None)) as gemm:
        engine.wait_until_warm()
        gemm.wait_until_warm()
        samples = measure(cases, shape, engine, gemm, rounds, settle_s=settle_s, peak_s=peak_s)
        machine = watch.machine
    return Report(
        name=f"ceiling-{folder.name}",
        title=f"Share of the matrix-product peak, {folder.name}, float32, {cores} threads",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "scale": scale},
        header=("workload", "MFLOP a token", f"{OURS}, tokens/s", "GFLOP/s", "peak GFLOP/s", "share"),
        rows=rows(cases, samples, shape),
        samples={"cases": describe(cases), "flops_per_s": samples},
        notes=(
            f"the peak: this model's linear layers as bare products of {', '.join(map(str, ROWS))} rows, the best of "
            "them, in the same round; the share: median of the rounds, in brackets worst and best",
        ),
    )


def main() -> None:
    """Print the table."""
    asked = arguments(argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)).parse_args()
    publish(run(resolve(asked.model), asked.workloads, asked.rounds, scale=asked.scale), asked.results)


if __name__ == "__main__":
    main()
