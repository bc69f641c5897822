"""Measures the parts of one encoder layer in each dtype, in turns: where a reduced dtype gains, and where it does not.

    python -m benchmarks.offline.layer_parts --model bert-base

512 tokens on one thread: five texts of 100 and one of 12. The shortest of the rounds of each part counts, so that
neighbours on the same cores count less; `sum` adds the parts up (two sums and norms a layer).
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, publish
from engines.device.cpu_features import fast_dtypes
from engines.layers.packing import PackedLayout
from engines.layers.products import apply
from engines.loading.builders import build
from engines.loading.folder import read_folder
from engines.models.base import EncoderConfig
from engines.spec import ModelSpec

LENGTHS = [100] * 5 + [12]
TWICE = ("norm", "residual")
Part = Callable[[], object]


def parts_of(layer: Any, x: torch.Tensor) -> dict[str, Part]:
    """The parts of a fused layer on a row `[T, H]`."""
    layout = PackedLayout(LENGTHS, torch.device("cpu"))

    def joined() -> torch.Tensor:
        found: torch.Tensor = linear(x, layer._weight, layer._bias) if layer._joined is None else layer._joined(x)
        return found

    states = joined()
    norm = layer._first_norm
    behind = norm(x)  # int8 has one step for what a norm gives
    context, inner = layer._attend(states, layout, None), layer._inner(behind)
    return {
        "queries, keys, values": joined,
        "attention": partial(layer._attend, states, layout, None),
        "context": partial(apply, layer._context, context),
        "up and activation": partial(layer._inner, behind),
        "down": partial(apply, layer._down, inner),
        "residual": partial(torch.add, x, x),
        "norm": partial(torch.nn.functional.layer_norm, x, x.shape[-1:], norm.weight, norm.bias, norm.eps),
    }


@torch.inference_mode()
def measure(runs: Mapping[str, Mapping[str, Part]], rounds: int) -> dict[str, dict[str, float]]:
    """The shortest microseconds by part and dtype; one round does not count."""
    found: dict[str, dict[str, float]] = {part: {} for part in next(iter(runs.values()))}
    for index in range(rounds + 1):
        for dtype, parts in runs.items():
            for name, run in parts.items():
                started_s = time.perf_counter()
                run()
                spent_us = (time.perf_counter() - started_s) * 1e6
                if index:
                    found[name][dtype] = min(spent_us, found[name].get(dtype, spent_us))
    found["sum"] = {
        dtype: sum(times[dtype] * (2 if name in TWICE else 1) for name, times in found.items()) for dtype in runs
    }
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.layer_parts", description=__doc__)
    parser.add_argument("--model", default="minilm", help="minilm, bert-base, xlmr-large, or a folder")
    parser.add_argument("--rounds", type=int, default=50)
    add_save_option(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warn_if_busy((watch := Watch()).machine)
    path = resolve(asked.model)
    folder, runs = read_folder(path), {}
    with torch.inference_mode():
        for dtype in ("float32", *fast_dtypes()):
            spec: Any = {"model_id": "m", "source": str(path), "dtype": dtype}
            encoder: Any = build(folder, ModelSpec(**spec), EncoderConfig()).encoder
            kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # what is between the products
            x = encoder._fused[0]._second_norm(torch.randn(sum(LENGTHS), encoder.dimensions).to(kind))
            runs[dtype] = parts_of(encoder._fused[1], x)
    times = measure(runs, asked.rounds)
    publish(
        Report(
            name=f"layer-parts-{path.name}",
            title=f"Parts of one layer, {path.name}, {sum(LENGTHS)} tokens, one thread, microseconds",
            machine=watch.machine,
            settings={"model": path.name, "rounds": asked.rounds},
            header=("part", *runs),
            rows=[(name, *(f"{each[dtype]:,.0f}" for dtype in runs)) for name, each in times.items()],
            samples={name: dict(each) for name, each in times.items()},
            notes=("the shortest of the rounds of each part, in turns",),
        ),
        asked.results,
    )


if __name__ == "__main__":
    main()
