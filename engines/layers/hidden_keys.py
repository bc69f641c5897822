"""Computes attention of packed texts whose last tokens are attended to by none, not even by themselves.

ColBERT fills a query up with such tokens: each attends to the query, and is scored (arXiv:2004.12832, section 3.2). In
a padded batch the attention mask leaves them out; here a mask of each text does.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engines.layers.packing import PackedLayout, to_device


def attend_to_visible(  # noqa: PLR0913  # the tensors, their layout, and the four options that shape the scores
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    causal: bool,
    window: int | None,
    position_bias: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Computes attention inside each text of a packed row, to its first `layout.num_visible` tokens only.

    Args:
        query: `[1, heads, T, d]`; `key`, `value`: `[1, kv_heads, T, d]`.
        window: exclusive bound of the distance between query and key.
        position_bias: `[1, heads, ≥ L, ≥ L]`, a function of `i - j` only.

    Returns:
        `[1, T, heads, d]`.
    """
    assert layout.num_visible is not None, "the caller has asked"
    rows, first = [], 0
    for group in layout.groups:
        q, k, v = (_texts(states, group.start, group.count, group.length) for states in (query, key, value))
        num_visible = layout.num_visible[first : first + group.count]
        first += group.count
        if position_bias is None and window is None and min(num_visible) == group.length:
            out = scaled_dot_product_attention(
                q, k, v, scale=scaling, is_causal=causal and group.length > 1, enable_gqa=q.shape[1] != k.shape[1]
            )
            rows.append(out.transpose(1, 2).flatten(0, 1))
            continue
        visible = _visible(num_visible, group.length, causal, window, q.device)
        mask = visible
        if position_bias is not None:
            bias = position_bias[..., : group.length, : group.length]
            mask = bias.expand(group.count, -1, -1, -1).masked_fill(~visible, float("-inf"))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        rows.append(out.transpose(1, 2).flatten(0, 1))
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]


def _texts(states: Tensor, start: int, count: int, length: int) -> Tensor:
    _, heads, _, width = states.shape
    return states[0, :, start : start + count * length].view(heads, count, length, width).transpose(0, 1)


def _visible(num_visible: Sequence[int], length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Returns where a query attends to a key, bool `[count, 1, L, L]`."""
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    allowed = torch.ones_like(ahead, dtype=torch.bool) if window is None else ahead.abs() < window
    if causal:
        allowed = allowed & (ahead <= 0)
    sizes = to_device(np.array(num_visible, dtype=np.int64), device)
    return (place[None, :] < sizes[:, None])[:, None, None, :] & allowed
