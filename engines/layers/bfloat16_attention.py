"""Computes attention of short and middling texts on a CPU in bfloat16, by oneDNN's products of all heads at once.

torch's kernel for bfloat16 is made for long texts: with 100 tokens and 12 heads it takes 0.34 ms (32 wide) and 0.52 ms
(64 wide) on one core of an EPYC (Zen 5), two products and a softmax in float32 0.19 and 0.22 ms
(`python -m benchmarks.offline.kernels bfloat16-attention`). Products sum in float32; scores and shares of attention are
rounded to bfloat16 once each, which `engines/loading/precision.py` measures with everything else.
"""

import torch
from torch import Tensor

from engines.device.cpu_features import has_fast_bfloat16

MAX_TOKENS = 512
"""Measured up to here; the scores of one head then take 1.5 MB."""

_SCORES = 2**17
"""Scores at once, so that they stay in a core's cache."""


def is_faster(query: Tensor, *, causal: bool, window: int | None) -> bool:
    """Whether it is faster for queries `[n, heads, L, d]`, which attend to all tokens of their text."""
    is_plain = query.dtype is torch.bfloat16 and query.device.type == "cpu" and not causal and window is None
    return is_plain and query.shape[2] <= MAX_TOKENS and has_fast_bfloat16()


def bfloat16_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Computes attention of texts of one length, `[n, heads, L, d]`, some heads at a time.

    Args:
        key, value: `[n, kv_heads, L, d]`; heads of the query share them in groups.
    """
    texts, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    if key.shape[1] < heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    q, k, v = (states.reshape(-1, length, width) for states in (query, key, value))
    out, at_once = torch.empty_like(q), max(1, _SCORES // length**2)
    for first in range(0, texts * heads, at_once):
        some = slice(first, first + at_once)
        scores = torch.bmm(q[some], k[some].transpose(1, 2)).float()
        shares = torch.softmax(scores.mul_(scale), dim=-1).to(query.dtype)
        torch.bmm(shares, v[some], out=out[some])
    return out.view(texts, heads, length, width)
