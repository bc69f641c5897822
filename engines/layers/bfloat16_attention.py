"""Computes attention on a CPU in bfloat16, by oneDNN's products of several heads at once.

torch's kernel for bfloat16 is made for processors with AMX: on one core of an EPYC (Zen 5) products and shares in
float32 take a quarter to a half of its time (`python -m benchmarks.offline.kernels bfloat16-attention`). Products sum in
float32; scores and shares of attention are rounded to bfloat16 once each, which `engines/loading/precision.py` measures
with everything else.
"""

import torch
from torch import Tensor

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers.softmax import LOG2_E, VisibleKeys, shares_by_powers, shares_by_softmax, visible_keys

_SCORES = 2**18
"""Scores at once, of float32: with twice or half as many, texts of 64 to 250 tokens take 1.1 to 1.2 times as long."""

_FEWEST_QUERIES = 64
"""Queries of a block, at the least."""

_WINDOW_QUERIES = 128
"""Queries of a block within a window of fewer keys: all scores outside of windows are for nothing."""


def is_faster(query: Tensor) -> bool:
    """Whether it is faster than torch's kernel for these queries."""
    return query.dtype is torch.bfloat16 and query.device.type == "cpu" and has_fast_bfloat16()


def bfloat16_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, causal: bool = False, window: int | None = None
) -> Tensor:
    """Computes attention of texts of one length, `[n, heads, L, d]`, some heads and queries at a time.

    Args:
        key, value: `[n, kv_heads, M, d]` with `M ≥ L`; heads of the query share them in groups. Where `M > L`, the
            queries are those of the last `L` keys.
        window: exclusive bound of the distance between query and key.
    """
    texts, heads, length, width = query.shape
    num_keys = key.shape[2]
    scale = (width**-0.5 if scaling is None else scaling) * LOG2_E
    if key.shape[1] < heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    q, k, v = (states.reshape(texts * heads, -1, width) for states in (query, key, value))
    num_queries, at_once = _block(texts * heads, length, num_keys, window)
    scratch = _Scratch(at_once * num_queries * num_keys)
    out = torch.empty_like(q)
    for start in range(0, length, num_queries):
        end, behind = min(start + num_queries, length), num_keys - length
        keys = visible_keys(start + behind, end + behind, num_keys, causal=causal, window=window)
        for first in range(0, texts * heads, at_once):
            some, seen = slice(first, first + at_once), slice(keys.first, keys.last)
            shares = scratch.shares(q[some, start:end], k[some, seen], scale, keys)
            _multiply(shares, v[some, seen], out[some, start:end])
    return out.view(texts, heads, length, width)


def _block(rows: int, length: int, num_keys: int, window: int | None) -> tuple[int, int]:
    """Returns the queries and the heads of a block."""
    num_queries = min(length, max(_FEWEST_QUERIES, _SCORES // num_keys))
    if window is not None and window < num_queries:
        num_queries = min(num_queries, max(window, _WINDOW_QUERIES))
    return num_queries, min(rows, max(1, _SCORES // (num_queries * num_keys)))


def _multiply(shares: Tensor, value: Tensor, out: Tensor) -> None:
    if out.is_contiguous():
        torch.bmm(shares, value, out=out)
    else:
        out.copy_(torch.bmm(shares, value))


class _Scratch:
    """Memory for the scores of a block, which every block uses again.

    Args:
        size: scores of the largest block.
    """

    def __init__(self, size: int) -> None:
        self._rounded = torch.empty(size, dtype=torch.bfloat16)
        self._scores = torch.empty(size)

    def shares(self, query: Tensor, key: Tensor, scale: float, keys: VisibleKeys) -> Tensor:
        """Returns the shares of attention `[n, queries, keys]` in bfloat16."""
        shape = (*query.shape[:2], key.shape[1])
        size = shape[0] * shape[1] * shape[2]
        rounded, scores = self._rounded[:size].view(shape), self._scores[:size].view(shape)
        torch.baddbmm(rounded, query, key.transpose(1, 2), beta=0, alpha=scale, out=rounded)
        if not shares_by_powers(scores.copy_(rounded), keys):
            shares_by_softmax(scores.copy_(rounded), keys)
        return rounded.copy_(scores)
