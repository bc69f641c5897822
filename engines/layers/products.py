"""Multiplies by weights with the faster of torch's two libraries on this CPU, in float32.

torch multiplies float32 matrices with MKL, whose AVX-512 kernels run on Intel's processors only: on an AMD EPYC with
AVX-512 (Zen 5) it reaches 100 GFLOP/s on one core, and oneDNN, which torch ships as well, 225 with the same weights in
the same place (`python -m benchmarks.offline.kernels products`). oneDNN computes in float32 too: results differ by
rounding. The faster one is found once for a process, by measuring.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.device.torch_runtime import reserve_for_onnxruntime
from engines.layers.packing import PackedState

_WORTHWHILE = 1.2
"""oneDNN must be this many times as fast: where both have the same kernels, MKL stays."""


_ROUNDS = 5


_ROW_STEPS = ((32, 4), (128, 8), (512, 16), (2**63, 32))
"""Rows up to the first are a multiple of the second."""


_ROWS, _WIDTH = 128, 768
"""The measured product: 151 MFLOP, 1 ms."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x @ weight.T + bias`, `[..., K]` and `[N, K]` to `[..., N]`, in the dtype of `x`."""
    is_plain = x.dtype is torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
    if is_plain and onednn_is_faster():
        return onednn_linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def rounded_rows(num_rows: int) -> int:
    """Returns the number of rows that a product of so many should have in oneDNN.

    oneDNN makes a kernel for each number of rows of each product, which takes 0.2 to 0.5 ms and 0.6 MB, and keeps few.
    No row reads another in a product or a norm.
    """
    step = next(step for most, step in _ROW_STEPS if num_rows <= most)
    return -(-num_rows // step) * step


def apply(part: nn.Module, x: Tensor) -> Tensor:
    """Applies a linear layer by `linear`, or what replaced it (`engines/layers/packed_linear.py`)."""
    if type(part) is nn.Linear:
        return linear(x, part.weight, part.bias)
    found: Tensor = part(x)
    return found


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `linear` by oneDNN; float32 on a CPU.

    The weight must be contiguous, or the transpose of a contiguous one: for other strides oneDNN has no fast kernel
    (three hundred times slower).
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 clearly faster than MKL here, and right. Takes 20 ms, once for a process."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(rows, _WIDTH, generator=generator) for rows in (_ROWS, _WIDTH))
    try:
        with torch.inference_mode(), reserve_for_onnxruntime():
            is_right = torch.allclose(onednn_linear(x, weight), functional.linear(x, weight), rtol=1e-4, atol=1e-3)
            usual_s, onednn_s = _fastest_s(functional.linear, onednn_linear, x, weight)
    except (RuntimeError, NotImplementedError):  # the operator is not public: another release may change it
        return False
    return is_right and usual_s > _WORTHWHILE * onednn_s


def _fastest_s(first: Callable[..., Any], second: Callable[..., Any], *args: Tensor) -> tuple[float, float]:
    """Returns the shortest seconds of each of two functions, in turns, because neighbours may take the core."""
    seconds = [[_seconds(function, args) for function in (first, second)] for _ in range(_ROUNDS)]
    return min(row[0] for row in seconds), min(row[1] for row in seconds)


def _seconds(function: Callable[..., Any], args: tuple[Tensor, ...]) -> float:
    start_s = time.perf_counter()
    function(*args)
    return time.perf_counter() - start_s


def replace_products(model: nn.Module, state: PackedState) -> None:
    """Makes the linear layers of `model` use `linear` in packed rows; outside of these they run as before."""
    for module in model.modules():
        if type(module) is nn.Linear:
            _replace(module, state)


def _replace(module: nn.Linear, state: PackedState) -> None:
    plain: Callable[[Tensor], Tensor] = module.forward

    def forward(input: Tensor) -> Tensor:
        return plain(input) if state.layout is None else linear(input, module.weight, module.bias)

    module.forward = forward  # type: ignore[method-assign]  # as fused layers do
