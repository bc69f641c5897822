"""Runs bare matrix products as a worker: the machine's peak in the minutes in which the engine is measured.

`gemm.py THREADS`. A question holds the linear layers of one block, `[[in, out], …]`, row counts to try, and the dtype.
Weights of reduced dtypes lie in the order of reading, as the engine keeps them.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

lines: Any = importlib.import_module("lines")  # a script: its own folder is on the path


Run = Callable[[], object]
Product = Callable[[int, int, int], Run]
"""Makes the product of so many rows, inputs and outputs."""


def rate(linears: Sequence[Sequence[int]], rows: int, seconds: float, dtype: str = "float32") -> float:
    """Return the FLOP/s of one block's linear layers on `rows` tokens, one product directly after the other.

    By the fastest of the libraries for the dtype.
    """
    products = PRODUCTS[dtype]
    return max(_rate(linears, rows, seconds / len(products), product) for product in products)


def _rate(linears: Sequence[Sequence[int]], rows: int, seconds: float, product: Product) -> float:
    layers = [product(rows, inputs, outputs) for inputs, outputs in linears]
    flops = sum(2 * rows * inputs * outputs for inputs, outputs in linears)
    _block(layers)
    turns, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        _block(layers)
        turns += 1
    return flops * turns / spent


def _block(layers: Sequence[Run]) -> None:
    for run in layers:
        run()


def _mkl(rows: int, inputs: int, outputs: int) -> Run:
    tokens, weight, out = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs)
    return lambda: torch.mm(tokens, weight.t(), out=out)


def _onednn(rows: int, inputs: int, outputs: int) -> Run:
    tokens, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return lambda: torch.ops.mkldnn._linear_pointwise(tokens, weight, None, "none", [], "")


def _bfloat16(rows: int, inputs: int, outputs: int) -> Run:
    tokens, weight = (torch.randn(count, inputs).bfloat16() for count in (rows, outputs))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(tokens, packed, None, "none", [], "")


def _int8(rows: int, inputs: int, outputs: int) -> Run:
    tokens = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inputs])
    scale, zeros, kind = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64), torch.bfloat16
    return lambda: torch.ops.onednn.qlinear_pointwise(
        tokens, 1.0, 128, packed, scale, zeros, None, 1.0, 0, kind, "none", [], ""
    )


PRODUCTS: dict[str, tuple[Product, ...]] = {
    "float32": (_mkl, _onednn), "bfloat16": (_bfloat16,), "int8": (_int8,)
}  # fmt: skip


@torch.inference_mode()
def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one question: `rates` returns FLOP/s by number of rows."""
    each_s, dtype = question["seconds"] / len(question["rows"]), question.get("dtype", "float32")
    return {"rates": {str(rows): rate(question["linears"], rows, each_s, dtype) for rows in question["rows"]}}


if __name__ == "__main__":
    say = lines.open_answers()
    torch.set_num_threads(int(sys.argv[1]))
    lines.serve(say, {"threads": torch.get_num_threads()}, answer)
