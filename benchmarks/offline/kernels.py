"""Measures the kernels that a CPU has, in turns: products with weights, and attention.

    python -m benchmarks.offline.kernels products
    python -m benchmarks.offline.kernels int8-products
    python -m benchmarks.offline.kernels attention --lengths 256 512 1024 2048
    python -m benchmarks.offline.kernels bfloat16-attention

`int8-products`: packed bfloat16 beside int8 with the rounding of its inputs. `bfloat16-attention`: torch's kernel
beside `engines/layers/bfloat16_attention.py`. The others are of float32.
`products`: torch's own (MKL) beside oneDNN with the same weights. `attention`: `scaled_dot_product_attention` beside
blocks of 256 queries by oneDNN's products (`engines/layers/blocked_attention.py`), one text of 12 heads. The engine
uses oneDNN where `engines/layers/products.py` measures it 1.2 times as fast, and blocks where they lead in this table.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, publish, run_command
from engines.layers.bfloat16_attention import bfloat16_attention
from engines.layers.blocked_attention import blocked_attention
from engines.layers.packed_linear import Int8Linear, PackedLinear, quantize_rows
from engines.layers.products import onednn_linear

_SHAPES = ((384, 1536), (768, 3072), (1024, 4096), (3072, 1024))
_HEADS = 12
_WIDTHS = (32, 64, 128)


@torch.inference_mode()
def fastest(runs: Mapping[str, Callable[[], object]], flops: float, rounds: int) -> dict[str, float]:
    """The GFLOP/s of each one's fastest run; one run of each a round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started_s)
    return {name: flops / min(each[1:]) / 1e9 for name, each in seconds.items()}


def measure_products(row_counts: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by shape and library."""
    rates = {}
    for inputs, outputs in _SHAPES:
        weight = torch.randn(outputs, inputs)
        for rows in row_counts:
            tokens = torch.randn(rows, inputs)
            runs = {"MKL": partial(linear, tokens, weight), "oneDNN": partial(onednn_linear, tokens, weight)}
            rates[f"{rows} × {inputs} → {outputs}"] = fastest(runs, 2.0 * rows * inputs * outputs, rounds)
    return rates


def measure_attention(lengths: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by shape and kernel; a causal text has half the arithmetic."""
    rates = {}
    for causal in (False, True):
        for width in _WIDTHS:
            for length in lengths:
                # As parts of one product, as layers have them.
                query, key, value = torch.randn(length, 3, _HEADS, width).permute(1, 2, 0, 3)[:, None]
                runs: dict[str, Callable[[], Any]] = {
                    "torch": partial(scaled_dot_product_attention, query, key, value, is_causal=causal),
                    "blocks": partial(blocked_attention, query, key, value, causal=causal, window=None, scaling=None),
                }
                flops = 4.0 * length * length * width * _HEADS / (2 if causal else 1)
                name = f"{length} tokens, {width} wide{', causal' if causal else ''}"
                rates[name] = fastest(runs, flops, rounds)
    return rates


def measure_int8(row_counts: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by shape and dtype, from and to bfloat16, and of int8 without its rounding and scaling."""
    rates = {}
    for inputs, outputs in ((384, 1152), (384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768)):
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        packed, small = PackedLinear(weight.bfloat16(), bias.bfloat16()), Int8Linear(weight, bias)
        plain = torch.ops.onednn.qlinear_prepack(quantize_rows(weight)[0], [64, inputs])
        scale, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
        for rows in row_counts:
            tokens = torch.randn(rows, inputs).bfloat16()
            levels = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
            bare = partial(
                torch.ops.onednn.qlinear_pointwise,
                levels, 1.0, 128, plain, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "",
            )  # fmt: skip
            runs = {"bfloat16": partial(packed, tokens), "int8": partial(small, tokens), "int8, bare": bare}
            rates[f"{rows} × {inputs} → {outputs}"] = fastest(runs, 2.0 * rows * inputs * outputs, rounds)
    return rates


def measure_bfloat16_attention(lengths: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by shape and kernel, of about 512 tokens."""
    rates = {}
    for width in (32, 64):
        for length in lengths:
            texts = max(1, 512 // length)
            row = torch.randn(texts * length, 3, _HEADS, width).bfloat16().permute(1, 2, 0, 3)
            query, key, value = (part.view(_HEADS, texts, length, width).transpose(0, 1) for part in row)
            runs: dict[str, Callable[[], Any]] = {
                "torch": partial(scaled_dot_product_attention, query, key, value),
                "products": partial(bfloat16_attention, query, key, value, None),
            }
            flops = 4.0 * texts * length * length * width * _HEADS
            rates[f"{texts} × {length} tokens, {width} wide"] = fastest(runs, flops, rounds)
    return rates


def report(
    name: str,
    title: str,
    rates: Mapping[str, Mapping[str, float]],
    watch: Watch,
    rounds: int,
    dtype: str = "float32",
) -> Report:
    """The table: all rates, and the second over the first."""
    kernels = list(next(iter(rates.values())))
    rows = [
        (shape, *(f"{row[kernel]:.0f}" for kernel in kernels), f"{row[kernels[1]] / row[kernels[0]]:.2f}")
        for shape, row in rates.items()
    ]
    return Report(
        name=name,
        title=f"{title}, {dtype}, {torch.get_num_threads()} threads",
        machine=watch.machine,
        settings={"rounds": rounds},
        header=("shape", *(f"{kernel}, GFLOP/s" for kernel in kernels), "ratio"),
        rows=rows,
        samples={shape: dict(row) for shape, row in rates.items()},
        notes=("the fastest of the rounds of each, in turns",),
    )


def _asked(command: str, argv: Sequence[str], option: str, values: Sequence[int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.offline.kernels {command}", description=__doc__)
    parser.add_argument(f"--{option}", type=int, nargs="+", default=values)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    return asked


def main_products(argv: Sequence[str]) -> None:
    """Print the table of products."""
    asked = _asked("products", argv, "rows", (16, 64, 128, 512))
    warn_if_busy((watch := Watch()).machine)
    rates = measure_products(asked.rows, asked.rounds)
    publish(report("kernels-products", "Products with weights", rates, watch, asked.rounds), asked.results)


def main_attention(argv: Sequence[str]) -> None:
    """Print the table of attention."""
    asked = _asked("attention", argv, "lengths", (256, 512, 1024, 2048, 4096, 8192))
    warn_if_busy((watch := Watch()).machine)
    rates = measure_attention(asked.lengths, asked.rounds)
    publish(report("kernels-attention", "Attention of one text, 12 heads", rates, watch, asked.rounds), asked.results)


def main_int8(argv: Sequence[str]) -> None:
    """Print the table of int8 products."""
    asked = _asked("int8-products", argv, "rows", (16, 128, 512))
    warn_if_busy((watch := Watch()).machine)
    rates = measure_int8(asked.rows, asked.rounds)
    title = "Products with weights"
    publish(report("kernels-int8-products", title, rates, watch, asked.rounds, "bfloat16 and int8"), asked.results)


def main_bfloat16_attention(argv: Sequence[str]) -> None:
    """Print the table of attention in bfloat16."""
    asked = _asked("bfloat16-attention", argv, "lengths", (16, 64, 100, 200, 256, 384, 512))
    warn_if_busy((watch := Watch()).machine)
    rates = measure_bfloat16_attention(asked.lengths, asked.rounds)
    title = "Attention, 12 heads"
    publish(report("kernels-bfloat16-attention", title, rates, watch, asked.rounds, "bfloat16"), asked.results)


def main() -> None:
    """Run the command that is asked for."""
    run_command({
        "products": main_products,
        "int8-products": main_int8,
        "attention": main_attention,
        "bfloat16-attention": main_bfloat16_attention,
    })  # fmt: skip


if __name__ == "__main__":
    main()
