"""Measures the share of the machine's matrix-product peak that the offline engine reaches.

    python -m benchmarks.offline.ceiling
    python -m benchmarks.offline.ceiling --dtype bfloat16

The peak is measured in the same run, round by round, at the model's own layer shapes: bare products of that dtype and
nothing else. What is missing to 100 % is everything else that a forward pass, tokenisation and pooling do. The
arithmetic is counted from config.json: linear layers and attention of real tokens, a multiply-add as two operations.
What is not a matrix product (embeddings, norms, activations, softmax, pooling) is not counted.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, interleave
from benchmarks.lib.peers import OURS, interpreter, own_worker
from benchmarks.lib.report import Report, publish
from benchmarks.lib.worker import Worker
from benchmarks.offline.throughput import Case, arguments, describe, make_cases
from engines.affinity import num_usable_cores
from engines.spec import Dtype


class Shape(Struct, frozen=True):
    """The linear layers of one block as (in, out), the number of blocks, and the width of the queries."""

    linears: tuple[tuple[int, int], ...]
    num_layers: int
    query_width: int

    @property
    def linear_flops(self) -> int:
        """Return the operations of the linear layers for one token, through all blocks."""
        return 2 * self.num_layers * sum(rows * columns for rows, columns in self.linears)

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the operations for texts of these lengths: linear layers, and attention within each text."""
        attention = 4 * self.num_layers * self.query_width
        return self.linear_flops * sum(lengths) + attention * sum(length * length for length in lengths)


def read_shape(folder: Path) -> Shape:
    """Read the shape of the model in a folder: BERT-like models, and decoders with grouped queries and a gated layer.

    Raises:
        KeyError: config.json lacks one of the sizes.
    """
    config = json.loads((folder / "config.json").read_text())
    hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    keys = head * config.get("num_key_value_heads", heads)
    query = head * heads
    is_gated = config.get("hidden_act") in ("silu", "gelu_pytorch_tanh") and "num_key_value_heads" in config
    widening = [(hidden, inner)] * (2 if is_gated else 1)
    linears = [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden), *widening, (inner, hidden)]
    return Shape(tuple(linears), config["num_hidden_layers"], query)


ROWS = (256, 512, 1024, 2048)
PEAK_S = 1.0


def peak(worker: Worker, shape: Shape, seconds: float = PEAK_S, dtype: str = "float32") -> float:
    """Measure the FLOP/s of bare matrix products, at the best of several numbers of rows."""
    linears = [list(linear) for linear in shape.linears]
    rates = worker.ask(op="rates", linears=linears, rows=ROWS, seconds=seconds, dtype=dtype)["rates"]
    return float(max(rates.values()))


def measure(
    cases: Sequence[Case],
    shape: Shape,
    engine: Worker,
    measure_peak: Callable[[], float],
    rounds: int,
    *,
    settle_s: float,
) -> dict[str, dict[str, list[float]]]:
    """Return FLOP/s by case: of the engine, and of the bare products."""
    samples = {}
    for case in cases:
        flops, calls = shape.flops(case.workload.tokens), case.calls
        engine.seconds(calls)
        samples[case.name] = interleave(
            {
                "peak": measure_peak,
                "engine": lambda flops=flops, calls=calls: flops / engine.seconds(calls),  # type: ignore[misc]  # as in throughput.measure
            },
            rounds,
            settle_s=settle_s,
        )
    return samples


def rows(
    cases: Sequence[Case], samples: Mapping[str, Mapping[str, Sequence[float]]], shape: Shape
) -> list[tuple[str, ...]]:
    """Return table rows: the operations of a token, the engine's speed, the peak, and the share."""
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


def run(  # noqa: PLR0913  # as a benchmark is asked for
    folder: Path,
    names: Sequence[str],
    rounds: int,
    *,
    scale: float = 1.0,
    settle_s: float = SETTLE_S,
    peak_s: float = PEAK_S,
    dtype: Dtype = "float32",
) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    shape, cases = read_shape(folder), make_cases(names, workloads.counter(folder), scale)
    cores = num_usable_cores()
    # float32 is what `auto` is on a CPU, and trees that know no other have no argument for it
    own = own_worker(folder, dtype=None if dtype == "float32" else dtype)
    with own as engine, Worker("gemm", "gemm.py", [str(cores)], python=interpreter(None)) as gemm:
        engine.wait_until_warm()
        gemm.wait_until_warm()
        measure_peak = partial(peak, gemm, shape, peak_s, dtype)
        samples = measure(cases, shape, engine, measure_peak, rounds, settle_s=settle_s)
        machine = watch.machine
    return Report(
        name=f"ceiling-{folder.name}" if dtype == "float32" else f"ceiling-{folder.name}-{dtype}",
        title=f"Share of the matrix-product peak, {folder.name}, {dtype}, {cores} threads",
        machine=machine,
        settings={"model": folder.name, "dtype": dtype, "rounds": rounds, "scale": scale},
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
    parser = arguments(argparse.ArgumentParser(prog="python -m benchmarks.offline.ceiling", description=__doc__))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    asked = parser.parse_args()
    report = run(resolve(asked.model), asked.workloads, asked.rounds, scale=asked.scale, dtype=asked.dtype)
    publish(report, asked.results)


if __name__ == "__main__":
    main()
