"""Computes attention of long texts on a CPU in blocks of queries, by oneDNN's products; float32.

torch's kernel calls MKL for blocks of 32 to 256 queries; on processors on which oneDNN multiplies faster
(`engines/layers/products.py`), a block of 256 queries against all of its keys, one head at a time, takes 0.5 to 0.9 of
its time from some length on. `is_faster` is made from the table of `python -m benchmarks.offline.kernels attention`.
"""

import torch
from torch import Tensor

from engines.layers.products import onednn_is_faster, onednn_linear

BLOCK = 256
"""Queries of a block: its scores against 2,048 keys are 2 MiB."""


_LONG, _SHORTER = 512, 256
_NARROWEST = 32


def is_faster(query: Tensor, *, causal: bool, window: int | None) -> bool:
    """Whether blocks are faster than torch's kernel for queries `[..., L, d]`: by the benchmark's table.

    Within a window of fewer keys than a block has queries they are not, since most of a block's scores are hidden.
    """
    if not can_run(query) or (window is not None and window < BLOCK):
        return False
    length, width = query.shape[-2:]
    return length >= (_SHORTER if width >= 128 or (width >= 64 and not causal) else _LONG) and onednn_is_faster()


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
    scale = width**-0.5 if scaling is None else scaling
    out = query.new_empty(texts, length, heads, width)
    key, value = key.contiguous(), value.contiguous()
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        first, last, hidden = _visible_keys(
            start + num_keys - length, end + num_keys - length, num_keys, causal, window
        )
        for text in range(texts):
            for head in range(heads):
                keys, values = (states[text, head // group, first:last] for states in (key, value))
                scores = onednn_linear(query[text, head, start:end] * scale, keys)
                if hidden is not None:
                    scores[:, -hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
                torch.softmax(scores, dim=-1, out=scores)
                out[text, start:end, head] = onednn_linear(scores, values.t())
    return out.transpose(1, 2)


def _visible_keys(
    start: int, end: int, num_keys: int, causal: bool, window: int | None
) -> tuple[int, int, Tensor | None]:
    """Returns the range of keys that the queries at positions `start` to `end` attend to, and which of the last of
    these are hidden from which query, bool `[end - start, ≤ keys]`; None where all see all."""
    last = end if causal else num_keys
    if window is None or window >= num_keys:
        if not causal:
            return 0, last, None
        return 0, last, torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
    first = max(0, start - window + 1)
    last = last if causal else min(num_keys, end + window - 1)
    ahead = torch.arange(first, last)[None, :] - torch.arange(start, end)[:, None]
    return first, last, (ahead <= -window) | (ahead >= (1 if causal else window))
