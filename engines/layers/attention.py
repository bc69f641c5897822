"""Computes attention on packed rows: all texts of a batch in one row, attention inside each text only, no padding.

A packed row is `[1, T]`: the texts of a batch, sorted by length, one behind the other. Linear layers, norms and
activations see real tokens only. Attention is the one operation that combines tokens, and it runs once per distinct
length: texts of equal length lie side by side, so a view `[n, heads, length, head_dim]` of the row is a plain batch.

`packed_attention` is registered with transformers under the name `PACKED`, without a mask function: so no mask is made,
and the position ids are not read to make one, for which the host would wait for a GPU. No list decides whether an
architecture can run packed: `engines/models/verification.py` compares its vectors with those of the reference forward
when the model loads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engines.layers import bfloat16_attention
from engines.layers.blocked_attention import blocked_attention, can_run, is_faster
from engines.layers.hidden_keys import attend_to_visible
from engines.layers.packing import LengthGroup, PackedLayout, WindowMasks
from engines.layers.varlen import VarlenKernel, Window, choose_kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]  # checked before use

PACKED = "embedyard_packed"

# Queries of a windowed layer run in blocks of this many, each against the keys within its window: the cost of a long
# text then grows with its length, not with the square of it.
_BLOCK = 128
_WHOLE = 2 * _BLOCK

_VARLEN = {("cuda", torch.float16), ("cuda", torch.bfloat16)}


def packed_attention(  # noqa: PLR0913  # the signature is transformers'
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Computes attention inside each text of a packed row. Called through transformers' attention interface.

    Args:
        query: `[1, heads, T, d]`; `key`, `value`: `[1, kv_heads, T, d]`.
        attention_mask: always None, as no mask function is registered with this one.
        sliding_window: exclusive bound: token `i` attends to token `j` only if `|i - j| < sliding_window`.
        position_bias: `[1, heads, ≥ L, ≥ L]`, a function of `i - j` only: its top left corner is the bias of a shorter
            text.

    Returns:
        `[1, T, heads, d]`, and no attention weights.

    Raises:
        NotImplementedError: the model changes the scores in a way that is not supported here.
    """
    _reject_unsupported(attention_mask, unused)
    causal = resolve_causal(module, is_causal)
    if packed_layout.num_visible is not None:
        attended = attend_to_visible(
            query, key, value, packed_layout, causal=causal, window=sliding_window, position_bias=position_bias,
            scaling=scaling,
        )  # fmt: skip
        return attended, None
    kernel = _kernel(query.device, query.dtype) if position_bias is None else None
    flash_window = _flash_window(sliding_window, causal)
    if kernel is not None and kernel.supports(query, value, scaling, flash_window):
        return kernel(query, key, value, packed_layout, scaling, flash_window), None
    is_grouped = packed_layout.prefix is None and position_bias is None
    if is_grouped and bfloat16_attention.is_faster(query):
        attended = bfloat16_attention.attend_groups(
            query, key, value, packed_layout.groups, scaling, causal=causal, window=sliding_window
        )
        return attended[None], None
    attend = partial(
        _attend, causal=causal, window=sliding_window, position_bias=position_bias, scaling=scaling,
        masks=packed_layout.masks, in_blocks=packed_layout.in_blocks,
    )  # fmt: skip
    if packed_layout.prefix is not None:
        return _with_prefix(attend, query, key, value, packed_layout.prefix, packed_layout.groups), None
    rows = [attend(*(_texts(states, group) for states in (query, key, value))) for group in packed_layout.groups]
    return (rows[0] if len(rows) == 1 else torch.cat(rows))[None], None


def single_query_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, *, scaling: float | None, window: int | None
) -> Tensor:
    """Computes attention of one token of each text, which attends to its whole text: any token where attention is not
    causal, else the last.

    Args:
        query: `[1, heads, n, d]`, of these tokens; `key`, `value`: `[1, kv_heads, T, d]`, of all tokens.
        window: exclusive bound of the distance between query and key; of last tokens only.

    Returns:
        `[n, heads, d]`.
    """
    rows, first = [], 0
    for group in layout.groups:
        q = query[0, :, first : first + group.count].transpose(0, 1)[:, :, None]
        k, v = (_after_prefix(states, layout.prefix, group) for states in (key, value))
        if window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
        rows.append(scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0])
        first += group.count
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _with_prefix(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: LengthGroup,
    groups: Sequence[LengthGroup],
) -> Tensor:
    """Computes causal attention of a row that begins with the tokens that all of its texts share, `[1, T, heads, d]`.

    Raises:
        NotImplementedError: the attention is not causal: shared tokens would depend on what follows them.
    """
    if not attend.keywords["causal"]:  # type: ignore[attr-defined]  # a partial
        raise NotImplementedError("texts share no tokens where attention is not causal")
    rows = [attend(*(_texts(states, prefix) for states in (query, key, value)))]
    for group in groups:
        k, v = (_after_prefix(states, prefix, group) for states in (key, value))
        rows.append(attend(_texts(query, group), k, v))
    return torch.cat(rows)[None]


def _after_prefix(states: Tensor, prefix: LengthGroup | None, group: LengthGroup) -> Tensor:
    """Returns the texts of a group, `[count, heads, P + L, d]`, each behind the tokens of the prefix, if any."""
    texts = _texts(states, group)
    if prefix is None:
        return texts
    return torch.cat([_texts(states, prefix).expand(group.count, -1, -1, -1), texts], dim=2)


def _reject_unsupported(attention_mask: Tensor | None, options: Mapping[str, Any]) -> None:
    features = {
        "a mask of the model's own": attention_mask,
        "soft-capped scores": options.get("softcap"),
        "attention sinks": options.get("s_aux"),
    }
    for feature, value in features.items():
        if value is not None:
            raise NotImplementedError(f"its attention has {feature}, for which there is no packed form")


def resolve_causal(module: torch.nn.Module, requested: bool | None) -> bool:
    """Returns whether attention is causal: as the call requests, else as the layer states.

    A config may override a layer that is causal (`is_causal: false` of Qwen2 embedders).
    """
    if requested is not None:
        return requested
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True)) and getattr(config, "is_causal", True) is not False


def _texts(states: Tensor, group: LengthGroup) -> Tensor:
    """Returns the texts of a group as a view `[count, heads, L, d]` of `[1, heads, T, d]`."""
    _, heads, _, width = states.shape
    return states[0, :, group.start : group.end].view(heads, group.count, group.length, width).transpose(0, 1)


def _attend(  # noqa: PLR0913  # the tensors, the four options that shape the scores, and their masks
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    position_bias: Tensor | None,
    scaling: float | None,
    masks: WindowMasks,
    in_blocks: bool,
) -> Tensor:
    """Computes attention of texts of one length: `[count, heads, L, d]` each to `[count × L, heads, d]`.

    With more keys than queries, the queries are those of the last keys.
    """
    length, num_keys = q.shape[2], k.shape[2]
    if position_bias is None and (is_faster(q, window=window) or (in_blocks and can_run(q))):
        out = blocked_attention(q, k, v, causal=causal, window=window, scaling=scaling)
        return out.transpose(1, 2).flatten(0, 1)
    if position_bias is None and bfloat16_attention.is_faster(q):
        out = bfloat16_attention.bfloat16_attention(q, k, v, scaling, causal=causal, window=window)
        return out.transpose(1, 2).flatten(0, 1)
    sdpa = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    if position_bias is not None:
        out = sdpa(q, k, v, attn_mask=_masked_bias(position_bias[..., :length, :length], causal, window))
    elif num_keys > length:
        out = sdpa(q, k, v, attn_mask=_suffix_mask(length, num_keys, window, q.device))
    elif window is not None and window < length:
        out = _windowed(sdpa, q, k, v, masks.get(partial(band, causal, window, q.device)), window)
    else:
        out = sdpa(q, k, v, is_causal=causal and length > 1)
    # The CPU kernel writes [n, L, heads, d] and returns a transposed view: this flatten copies nothing.
    return out.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=16)
def _suffix_mask(length: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Returns the causal mask of queries that belong to the last of more keys, bool `[L, keys]`: True where visible."""
    ahead = (
        torch.arange(num_keys, device=device)[None, :]
        - torch.arange(num_keys - length, num_keys, device=device)[:, None]
    )
    visible = ahead <= 0
    return visible if window is None else visible & (ahead > -window)


def _windowed(sdpa: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, window: int) -> Tensor:
    """Computes attention within a window: one call for a short text, one for each block of queries for a long one.

    Args:
        allowed: see `band`.
    """
    length, radius = q.shape[2], window - 1
    ahead = allowed.shape[1] - _WHOLE - radius
    if length <= _WHOLE:
        return sdpa(q, k, v, attn_mask=allowed[:length, radius : radius + length])
    blocks = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        first, last = max(0, start - radius), min(length, end + ahead)
        shift = radius - (start - first)
        mask = allowed[: end - start, shift : shift + last - first]
        blocks.append(sdpa(q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], attn_mask=mask))
    return torch.cat(blocks, dim=2)


def band(causal: bool, window: int, device: torch.device) -> Tensor:
    """Returns the mask of a window, bool `[256, radius + 256 + ahead]`: `radius = window - 1`, and `ahead` is 0 when
    causal, else `radius`.

    True at `[i, radius + j]` where query `i` attends to key `j`: `0 ≤ i - j < window` when causal, else
    `|i - j| < window`. Only `i - j` counts, so the mask of any block of up to 256 queries is a part of it, and it is as
    large for a window of 32,768 as 17 MB (a square of the window would be 2 GiB).
    """
    radius = window - 1
    ahead = 0 if causal else radius
    full = torch.ones(_WHOLE, radius + _WHOLE + ahead, dtype=torch.bool, device=device)
    return full.tril_(radius + ahead).triu_()


def _masked_bias(bias: Tensor, causal: bool, window: int | None) -> Tensor:
    """Returns a position bias `[1, heads, L, L]` with minus infinity where a query does not attend to a key."""
    if not causal and window is None:
        return bias
    positions = torch.arange(bias.shape[-1], device=bias.device)
    distance = positions[:, None] - positions[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    return bias.masked_fill(hidden, float("-inf"))


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel computes the attention of a whole row; with a position bias it never does."""
    return _kernel(device, dtype) is not None


def _kernel(device: torch.device, dtype: torch.dtype) -> VarlenKernel | None:
    return choose_kernel(varlen_attn, device) if (device.type, dtype) in _VARLEN else None


def _flash_window(sliding_window: int | None, causal: bool) -> Window:
    """Converts our exclusive window to flash attention's inclusive (left, right) one; -1 is unbounded."""
    radius = -1 if sliding_window is None else sliding_window - 1
    return (radius, 0 if causal else radius)


AttentionInterface.register(PACKED, packed_attention)
