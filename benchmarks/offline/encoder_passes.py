"""Measures bare passes of an encoder in each dtype, in turns, on one thread and on two that share the interpreter.

    OMP_NUM_THREADS=1 python -m benchmarks.offline.encoder_passes --model minilm --workload passages

Texts run in rows of up to 512 tokens, as the engine makes them, without queue, tokenizer and pool. Of each dtype the
fastest round counts; `ratio` is the median of the rounds' ratios to the first dtype.
"""

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, publish
from engines.device.cpu_features import fast_dtypes
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import Ids
from engines.loading.builders import build
from engines.loading.folder import read_folder
from engines.models.base import EncoderConfig
from engines.spec import ModelSpec

ROW_TOKENS = 512
ROWS = 8
Row = Sequence[Ids]


def rows_of(texts: Sequence[Ids]) -> list[Row]:
    """Texts in rows, each sorted by length."""
    rows: list[list[Ids]] = [[]]
    for ids in texts:
        if sum(map(len, rows[-1])) + len(ids) > ROW_TOKENS:
            rows.append([])
        rows[-1].append(ids)
    return [sorted(row, key=len) for row in rows[:ROWS]]


def run_rows(encoder: Callable[[Row], object], rows: Sequence[Row], num_threads: int) -> float:
    """The seconds that so many threads take, each for all rows."""

    def work() -> None:
        torch.set_num_threads(1)
        for row in rows:
            encoder(row)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.encoder_passes", description=__doc__)
    parser.add_argument("--model", default="minilm", help="minilm, bert-base, xlmr-large, or a folder")
    parser.add_argument("--workload", default="passages", choices=workloads.NAMES)
    parser.add_argument("--dtypes", nargs="+", default=list(fast_dtypes()))
    parser.add_argument("--rounds", type=int, default=10)
    add_save_option(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warn_if_busy((watch := Watch()).machine)
    path = resolve(asked.model)
    encoders: dict[str, Any] = {}
    for dtype in asked.dtypes:
        spec: Any = {"model_id": "m", "source": str(path), "dtype": dtype}
        encoders[dtype], tokenizer, *_ = build(read_folder(path), ModelSpec(**spec), EncoderConfig())
        encoders[dtype].switch_to(encoders[dtype].candidate_paths()[0])
    num_texts = 400 if asked.workload == "short" else 64
    texts = workloads.make(asked.workload, num_texts, workloads.counter(path)).texts
    rows = rows_of([tokenizer.encode((text,), PromptTemplate(), "end").ids[0] for text in texts])
    num_tokens = sum(len(ids) for row in rows for ids in row)
    cells: list[tuple[str, ...]] = []
    samples: dict[str, dict[str, list[float]]] = {}
    for num_threads in (1, 2):
        seconds: dict[str, list[float]] = {dtype: [] for dtype in encoders}
        for _ in range(asked.rounds + 1):
            for dtype, encoder in encoders.items():
                seconds[dtype].append(run_rows(encoder, rows, num_threads))
        samples[f"{num_threads} threads"] = seconds
        for dtype, times in seconds.items():
            ratio = median(a / b for a, b in zip(seconds[asked.dtypes[0]][1:], times[1:], strict=True))
            cells.append((str(num_threads), dtype, f"{num_threads * num_tokens / min(times[1:]):,.0f}", f"{ratio:.2f}"))
    publish(
        Report(
            name=f"encoder-passes-{path.name}",
            title=f"Passes of the encoder, {path.name}, {asked.workload}",
            machine=watch.machine,
            settings={"model": path.name, "workload": asked.workload, "rounds": asked.rounds},
            header=("threads", "dtype", "tokens/s", "ratio"),
            rows=cells,
            samples=samples,
            notes=("one round does not count",),
        ),
        asked.results,
    )


if __name__ == "__main__":
    main()
