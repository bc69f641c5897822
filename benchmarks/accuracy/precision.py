"""Prints what each dtype costs in accuracy and gains in speed, as a Markdown table.

    python -m benchmarks.accuracy.precision --model minilm --rounds 5

Engines of all dtypes run on one thread of one process, in interleaved rounds, on the workloads of the other benchmarks.
Seconds are the process's own on the CPU, so that neighbours on the same cores count less.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import structlog
from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import Kit, cosines, embed
from benchmarks.lib.folders import resolve
from benchmarks.lib.workloads import Workload
from engines.batching.engine import EmbeddingEngine
from engines.device.cpu_features import fast_dtypes

TEXTS = {"short": 256, "passages": 64, "mixed": 64, "long": 16, "chinese": 64}
HEADER = ("workload", "dtype", "tokens/s", "× float32", "worst cosine", "median cosine", "bytes × float32")


class Sample(Struct, frozen=True):
    """One dtype on one workload; `ratio` is the median of the rounds' ratios to float32."""

    workload: str
    dtype: str
    tokens_per_s: float
    ratio: float
    worst: float
    middle: float
    size_ratio: float

    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        return (
            self.workload, self.dtype, f"{self.tokens_per_s:,.0f}", f"{self.ratio:.2f}", f"{self.worst:.5f}",
            f"{self.middle:.5f}", f"{self.size_ratio:.2f}",
        )  # fmt: skip


def compare(engines: dict[str, EmbeddingEngine], work: Workload, rounds: int, file_bytes: int) -> Sequence[Sample]:
    """One line for each dtype; float32 comes first. One uncounted round warms up every shape."""
    texts = list(work.texts)
    vectors = {dtype: embed(engine, texts) for dtype, engine in engines.items()}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in engines}
    for _ in range(rounds):
        for dtype, engine in engines.items():
            begun_s = time.process_time()
            embed(engine, texts)
            seconds[dtype].append(time.process_time() - begun_s)
    found = []
    for dtype, times in seconds.items():
        near = cosines(vectors[dtype], vectors["float32"])
        ratio = median(a / b for a, b in zip(seconds["float32"], times, strict=True))
        size = engines[dtype].weight_bytes / file_bytes
        rate = work.num_tokens / median(times)
        found.append(Sample(work.name, dtype, rate, ratio, float(near.min()), float(np.median(near)), size))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.precision", description=__doc__)
    parser.add_argument("--model", default="minilm", help="minilm, bert-base, xlmr-large, or a folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=list(fast_dtypes()), help="default: those fast on this CPU")
    parser.add_argument("--workloads", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--scale", type=float, default=1.0, help="texts a call, as a part of the usual number")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    folder = resolve(asked.model)
    count = workloads.counter(folder)
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with TemporaryDirectory() as scratch:
        kit = Kit(Path(scratch))
        engines = {dtype: kit.load(folder, dtype=dtype) for dtype in ("float32", *asked.dtypes)}
        print("|", " | ".join(HEADER), "|")
        print("|", " | ".join("---" for _ in HEADER), "|")
        for name in asked.workloads:
            work = workloads.make(name, max(1, round(TEXTS[name] * asked.scale)), count)
            for sample in compare(engines, work, asked.rounds, file_bytes):
                print("|", " | ".join(sample.cells()), "|", flush=True)
        kit.close()


if __name__ == "__main__":
    main()
