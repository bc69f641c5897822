"""Holds the steps of int8 products as functions of TorchScript: one call of each from Python, without the interpreter's
lock between their operators.

A prototype that held the static product too ran MiniLM's passages 1.08 times as fast on one thread (18,902 against
17,499 tokens/s, the fastest of 10 rounds on a quiet machine). TorchScript is deprecated, but its successor needs a
compiler on the machine that serves. Where it is not there, products run step by step.
"""

from functools import cache
from typing import Any

import torch

_SOURCE = """
def multiply_by_token(
    x: Tensor, levels: Tensor, step: Tensor, lowest: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor,
    row_sums: Tensor, bias: Optional[Tensor], other: Optional[Tensor]
) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    found = torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, 0, weight, scale, zeros, None, 1.0, 0, 6, "none", none, ""
    )
    if other is None:
        found = found.mul_(step)
    else:
        found = torch.addcmul(other, found, step)
    found = found.addcmul_(lowest + x.sum([1], True).mul_(0), row_sums)
    if bias is not None:
        found = found.add_(bias)
    return found

def static_levels(
    x: Tensor, factor: Tensor, shift: Tensor, channels: Tensor, offsets: Tensor, bounds: Tensor, half: float
) -> Tuple[Tensor, bool]:
    tokens, width = x.shape
    wide = torch.empty([tokens, width + len(channels)], dtype=x.dtype)
    torch.addcmul(shift, x, factor, out=wide[:, :width])
    torch.clamp(x.index_select(1, channels).add_(offsets), -half, half, out=wide[:, width:])
    levels = torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max(wide, bounds.expand([tokens, 2]))
    least, largest = torch.aminmax(levels[:, :width])
    return levels, int(least) > 0 and int(largest) < 255
"""


@cache
def int8_script() -> Any | None:
    """Returns the functions of the source, compiled; None where the installed torch cannot."""
    try:
        return torch.jit.CompilationUnit(_SOURCE)
    except (RuntimeError, AttributeError):
        return None
