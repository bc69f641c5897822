"""Runs products whose weights alone are quantised: int8 on GPUs and beside int4, and int4 on CPUs.

`Int8WeightLinear` keeps a byte a weight with a scale for each output, and multiplies in the dtype of its inputs.

`Int4Linear` keeps four bits a weight, with a scale and a centre for each 32 of a row, as torch's kernel for CPUs reads
them. That kernel multiplies each weight anew for each token: one core of an EPYC (Zen 5), 1024 × 4096, takes 0.36 ms
for 8 tokens and 11.6 ms for 256, where packed bfloat16 takes 0.17 and 4.1. From `_FEW_ROWS` tokens on the weights are
unpacked to bfloat16 instead, 1.35 ms, and multiplied by oneDNN.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers.packed_linear import Product

GROUP = 32
"""Weights of a row that share a scale and a centre."""

_BLOCK = 64
"""Outputs whose weights torch's kernel packs together: a byte holds those of an output and of the one 32 behind it."""

_LEVELS, _MIDDLE = 15, 8

_FEW_ROWS = 56
"""Below so many tokens torch's kernel is faster than unpacking."""

_SHRINKS, _FITS = (1.0, 0.9), 3
"""Spans that the search for a group's scale begins with, as parts of the group's own, and its steps from each."""

_ROWS_AT_ONCE = 1024
"""Outputs whose scales are searched together, so that the search holds some tens of megabytes only."""


class Int8WeightLinear(Product):
    """A product of int8 weights and inputs in 16 or 32 bits.

    Args:
        weight: `[out, in]`, int8, with `scale` `[out]`, float32.
        bias: `[out]`.
        dtype: of inputs and outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, torch.int8)
        self._rounded: Tensor
        self._scale: Tensor
        self._bias: Tensor | None
        # Buffers, so that they are counted, moved and parked with the model's own tensors.
        self.register_buffer("_rounded", weight, persistent=False)
        self.register_buffer("_scale", scale.to(dtype) if dtype is torch.float16 else scale, persistent=False)
        self.register_buffer("_bias", None if bias is None else bias.detach().to(dtype), persistent=False)

    def multiply(self, x: Tensor) -> Tensor:
        """See `Product`."""
        weight = self._rounded.to(x.dtype)
        if x.dtype is torch.float16:  # sums of levels overflow
            return linear(x, weight.mul_(self._scale[:, None]), self._bias)
        found = linear(x, weight).mul_(self._scale)
        return found if self._bias is None else found.add_(self._bias)


class Int4Linear(Product):
    """A product of int4 weights and bfloat16 inputs, on a CPU.

    Args:
        packed: uint8 `[out, in / 2]`, and `scales`, bfloat16 `[in / 32, out, 2]`, both of `quantize_groups`.
        bias: `[out]`.

    Attributes:
        few_rows: below so many tokens weights are not unpacked.
    """

    def __init__(self, packed: Tensor, bias: Tensor | None, scales: Tensor) -> None:
        num_outputs, half = packed.shape
        super().__init__(torch.empty(num_outputs, 2 * half, device="meta"), torch.bfloat16)
        self._packed, self._scales = packed, scales
        self._bias = None if bias is None else bias.detach().bfloat16()
        self.few_rows = _FEW_ROWS
        self.size_bytes = packed.nbytes + scales.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """See `Product`."""
        narrow = x.bfloat16()
        found: Tensor
        if len(x) < self.few_rows:
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow.contiguous(), self._packed, GROUP, self._scales)
        else:
            found = narrow @ _unpack(self._packed, self._scales, torch.bfloat16)
        return (found if self._bias is None else found.add_(self._bias)).to(x.dtype)


def fits_int4(weight: Tensor) -> bool:
    """Whether a matrix `[out, in]` can be kept in int4."""
    return not (len(weight) % _BLOCK or weight.shape[1] % GROUP)


@torch.inference_mode()
def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix `[out, in]` to 4 bits, with a scale and a centre for each `GROUP` of a row.

    Rounding to the nearest level and fitting scale and centre to the levels by least squares alternate, from the span
    of the group and from a smaller one, and the best step is kept: the error is 0.92 of that of the span alone.

    Returns:
        What `Int4Linear` takes: levels uint8 `[out, in / 2]`; scales and centres, bfloat16 `[in / GROUP, out, 2]`.
    """
    parts = [_fit(part.detach().float().view(len(part), -1, GROUP)) for part in torch.split(weight, _ROWS_AT_ONCE)]
    levels = torch.cat([part[0] for part in parts]).flatten(1)
    scales = torch.cat([part[1] for part in parts]).transpose(0, 1).contiguous()
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return packed, scales


def dequantize_groups(packed: Tensor, scales: Tensor) -> Tensor:
    """Returns the float32 matrix `[out, in]` of what `quantize_groups` returns."""
    return _unpack(packed, scales, torch.float32).T.contiguous()


def _fit(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Returns levels int32 `[n, groups, GROUP]` of such weights, and scales with centres, bfloat16 `[n, groups, 2]`."""
    low, high, mean = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), groups.mean(-1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    scale, centre = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        half = (high - low) * (shrink / 2)
        step, base = 2 * half / _LEVELS, (low + high) / 2 - half
        for _ in range(_FITS):
            step = step.clamp_(min=1e-8).bfloat16().float()
            middle = (base + _MIDDLE * step).bfloat16().float()
            levels = _levels(groups, step, middle)
            error = torch.addcmul(middle, levels - _MIDDLE, step).sub_(groups).square_().sum(-1, keepdim=True)
            is_better = error < best
            pairs = (error, best), (step, scale), (middle, centre)
            best, scale, centre = (torch.where(is_better, new, old) for new, old in pairs)
            spread = levels - levels.mean(-1, keepdim=True)
            varied = spread.square().sum(-1, keepdim=True).clamp_(min=1e-6)
            step = (spread * (groups - mean)).sum(-1, keepdim=True) / varied
            base = mean - step * levels.mean(-1, keepdim=True)
    return _levels(groups, scale, centre).int(), torch.cat([scale, centre], -1).bfloat16()


def _levels(groups: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    return ((groups - centre) / scale).add_(_MIDDLE).round_().clamp_(0, _LEVELS)


def _unpack(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the transposed matrix `[in, out]` in a dtype."""
    outputs, inputs = len(packed), 2 * packed.shape[1]
    blocks = packed.view(outputs // _BLOCK, inputs, _BLOCK // 2).transpose(0, 1)
    levels = torch.empty(inputs, outputs // _BLOCK, 2, _BLOCK // 2, dtype=dtype)
    for half, part in enumerate((blocks & _LEVELS, blocks >> 4)):
        levels[:, :, half] = part.view(torch.int8).sub_(_MIDDLE)
    steps, centres = scales.to(dtype).transpose(1, 2).contiguous().unbind(1)
    return torch.addcmul(centres[:, None], levels.view(-1, GROUP, outputs), steps[:, None]).view(inputs, outputs)


@cache
def can_multiply_int4() -> bool:
    """Whether this CPU multiplies bfloat16 fast, and the installed torch packs and multiplies int4 as is known here."""
    if not has_fast_bfloat16():
        return False
    levels = torch.arange(2 * _BLOCK * 2 * GROUP).mul(7).remainder(11).int().view(2 * _BLOCK, -1)
    scales = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(2, 2 * _BLOCK, 2).contiguous()
    x = torch.eye(2 * GROUP, dtype=torch.bfloat16)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)
    except (RuntimeError, AttributeError, NotImplementedError):  # not public: another release may change them
        return False
    return torch.equal(found.T.int(), levels) and torch.equal(dequantize_groups(packed, scales).int(), levels)
