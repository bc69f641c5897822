"""Runs bare float32 matrix products as a worker: the machine's peak in the minutes in which the engine is measured.

`gemm.py THREADS`. A question holds the linear layers of one block, `[[in, out], …]`, and row counts to try.
"""

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

lines: Any = importlib.import_module("lines")  # a script: its own folder is on the path


def rate(linears: Sequence[Sequence[int]], rows: int, seconds: float) -> float:
    """Return the FLOP/s of one block's linear layers on `rows` tokens, one product directly after the other."""
    layers = [
        (torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs))
        for inputs, outputs in linears
    ]
    flops = sum(2 * rows * inputs * outputs for inputs, outputs in linears)
    _block(layers)
    turns, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        _block(layers)
        turns += 1
    return flops * turns / spent


def _block(layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    for tokens, weight, out in layers:
        torch.mm(tokens, weight.t(), out=out)


@torch.inference_mode()
def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question: `rates` returns FLOP/s by number of rows."""
    each_s = question["seconds"] / len(question["rows"])
    return {"rates": {str(rows): rate(question["linears"], rows, each_s) for rows in question["rows"]}}


if __name__ == "__main__":
    say = lines.open_answers()
    torch.set_num_threads(int(sys.argv[1]))
    lines.serve(say, {"threads": torch.get_num_threads()}, answer)
