"""Computes attention of long texts on a CPU in blocks of queries, by oneDNN's products; float32.

torch's kernel calls MKL for blocks of 32 to 256 queries; on processors on which oneDNN multiplies faster
(`engines/layers/products.py`), a block of 256 queries against all of its keys, one head at a time, takes 0.5 to 0.9 of
its time from some length on. `is_faster` is made from the table of `python -m benchmarks.offline.kernels attention`.
"""

import torch
from torch import Tensor

from engines.layers.products import onednn_is_faster, onednn_linear
from engines.layers.softmax import LOG2_E, VisibleKeys, shares_by_powers, shares_by_softmax, visible_keys

BLOCK = 256
"""Queries of a block: its scores against 2,048 keys are 2 MiB."""


_LONG, _SHORTER = 256, 192
_NARROWEST = 32


def is_faster(query: Tensor, *, window: int | None) -> bool:
    """Whether blocks are faster than torch's kernel for queries `[..., L, d]`: by the benchmark's table.

    Within a window of fewer keys than a block has queries they are not, since most of a block's scores are hidden.
    """
    if not can_run(query) or (window is not None and window < BLOCK):
        return False
    length, width = query.shape[-2:]
    return length >= (_SHORTER if width >= 128 else _LONG) and onednn_is_faster()


def can_run(query: Tensor) -> bool:
    """Whether blocks support these queries."""
    return query.dtype is torch.float32 and query.device.type == "cpu" and query.shape[-1] >= _NARROWEST


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Computes attention, each text of a batch and each head of it alone.

    Args:
        query: `[n, heads, L, d]`; `key`, `value`: `[n, kv_heads, M, d]` with `M ≥ L`: where `M > L`, the queries are
            those of the last `L` keys.
        window: exclusive bound of the distance between query and key.

    Returns:
        `[n, heads, L, d]`, a view of `[n, L, heads, d]`.
    """
    texts, heads, length, width = query.shape
    num_keys, group = key.shape[2], heads // key.shape[1]
    scale = (width**-0.5 if scaling is None else scaling) * LOG2_E
    out = query.new_empty(texts, length, heads, width)
    key, value = key.contiguous(), value.contiguous()
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        keys = visible_keys(start + num_keys - length, end + num_keys - length, num_keys, causal=causal, window=window)
        for text in range(texts):
            for head in range(heads):
                k, v = (states[text, head // group, keys.first : keys.last] for states in (key, value))
                shares = _shares(query[text, head, start:end] * scale, k, keys)
                out[text, start:end, head] = onednn_linear(shares, v.t())
    return out.transpose(1, 2)


def _shares(query: Tensor, key: Tensor, keys: VisibleKeys) -> Tensor:
    """Returns the shares of attention `[queries, keys]`."""
    scores = onednn_linear(query, key)
    return scores if shares_by_powers(scores, keys) else shares_by_softmax(onednn_linear(query, key), keys)
