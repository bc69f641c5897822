"""Compares a product of reduced precision with plain arithmetic on the same rounded weights.

All paths of a model run the same products, so that a wrong one shows in no comparison of paths. The inputs here need no
rounding (integers from -127 to 128, times a power of two), which leaves the rounding of outputs only: an error of 2 %
in the scale of one output shows.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from engines.errors import SelfCheckFailed
from engines.layers.packed_linear import Product

_ROWS = 8

_LEVELS = 127

_FACTOR = 1024.0
"""Makes the sums so much larger than any bias that the rounding of both together hides nothing."""

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error of an output over all rows, by the dtype of outputs: bfloat16 rounds by up to 4e-3."""


@torch.inference_mode()
def check_product(
    product: Product, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, is_rounded: bool = False
) -> None:
    """Checks a product whose inputs and outputs have a dtype.

    Args:
        weight: that it was made from, `[out, in]`; `bias`: `[out]`.
        is_rounded: whether the weight is one that the product holds, in float32, and not the one before.

    Raises:
        SelfCheckFailed: it computes something else.
    """
    x = _inputs(product.in_features).to(weight.device)
    at_zero = product.multiply(torch.zeros_like(x[:1], dtype=dtype)).float()
    found = product.multiply(x.to(dtype)).float() - at_zero
    far = _relative_error(found, linear(x, weight if is_rounded else _rounded(weight, product.weight.dtype)))
    if bias is not None:
        far = max(far, _relative_error(at_zero, bias.detach().float()[None]))
    if not far <= _TOLERANCE[dtype]:
        raise SelfCheckFailed(
            f"a product of weights in {str(product.weight.dtype).removeprefix('torch.')} is {far:.1e} from plain "
            f"arithmetic, more than {_TOLERANCE[dtype]:.0e}: set `dtype: float32` in the registry"
        )


def _inputs(width: int) -> Tensor:
    """Returns `[8, width]` of integers times a power of two, which span 255 in each row."""
    x = torch.randint(-_LEVELS, _LEVELS + 2, (_ROWS, width), generator=torch.Generator().manual_seed(1)).float()
    x[:, 0], x[:, -1] = -_LEVELS, _LEVELS + 1
    return x * _FACTOR


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns float32 weights as their dtype holds them: int8 with the largest of each row as 127."""
    wide = weight.detach().float()
    if dtype is not torch.int8:
        return wide
    step = (wide.abs().amax(1, keepdim=True) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / step).round() * step


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Returns the worst over the columns of two `[n, out]`."""
    scale = wanted.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found - wanted).norm(dim=0) / scale).max())
