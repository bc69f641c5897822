"""Runs bare float32 matrix products as a worker: the machine's peak in the minutes in which the engine is measured.

`gemm.py THREADS`. A question holds the linear layers of one block, `[[in, out], …]`, and row counts to try.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

lines: Any = importlib.import_module("lines")  # a script: its own folder is on the path


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def rate(linears: Sequence[Sequence[int]], rows: int, seconds: float) -> float:
    """Return the FLOP/s of one block's linear layers on `rows` tokens, one product directly after the other.

    By the faster of two libraries.
    """
    return max(_rate(linears, rows, seconds / 2, product) for product in (_mkl, _onednn))


def _rate(linears: Sequence[Sequence[int]], rows: int, seconds: float, product: Product) -> float:
    layers = [
        (torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs))
        for inputs, outputs in linears
    ]
    flops = sum(2 * rows * inputs * outputs for inputs, outputs in linears)
    _block(layers, product)
    turns, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        _block(layers, product)
        turns += 1
    return flops * turns / spent


def _block(layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], product: Product) -> None:
    for tokens, weight, out in layers:
        product(tokens, weight, out)


def _mkl(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(tokens, weight.t(), out=out)


def _onednn(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.mkldnn._linear_pointwise(tokens, weight, None, "none", [], "")


@torch.inference_mode()
def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question: `rates` returns FLOP/s by number of rows."""
    each_s = question["seconds"] / len(question["rows"])
    return {"rates": {str(rows): rate(question["linears"], rows, each_s) for rows in question["rows"]}}


if __name__ == "__main__":
    say = lines.open_answers()
    torch.set_num_threads(int(sys.argv[1]))
    lines.serve(say, {"threads": torch.get_num_threads()}, answer)
