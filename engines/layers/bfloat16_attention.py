"""Computes attention on a CPU in bfloat16, by oneDNN's products of several heads at once.

torch's kernel for bfloat16 is made for processors with AMX: on one core of an EPYC (Zen 5) products and shares in
float32 take 0.2 to 0.7 of its time (`python -m benchmarks.offline.kernels bfloat16-attention`). Products sum in
float32; scores and shares are rounded to bfloat16 once each, which `engines/loading/precision.py` measures.

oneDNN makes a kernel for each shape (0.3 ms, and half a megabyte: `engines/__init__.py` bounds their number). Texts are
therefore padded to a few lengths, and cut into blocks of a few sizes: of passages, making kernels took a third of the
time of a pass.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers.packing import SCORES, LengthGroup, rounded_length
from engines.layers.softmax import LOG2_E, VisibleKeys, shares_by_powers, shares_by_softmax, visible_keys

_FEWEST_QUERIES = 64
"""Queries of a block, at the least."""

_WINDOW_QUERIES = 128
"""Queries of a block within a window of fewer keys: all scores outside of windows are for nothing."""


def is_faster(query: Tensor) -> bool:
    """Whether it is faster than torch's kernel for these queries."""
    return query.dtype is torch.bfloat16 and query.device.type == "cpu" and has_fast_bfloat16()


def padded_length(length: int, window: int | None = None) -> int:
    """Returns the length that a text is padded to: no query of the padding may be without any token in its window."""
    padded = rounded_length(length)
    return length if window is not None and padded - length >= window else padded


def attend_groups(  # noqa: PLR0913  # the tensors, their texts, and the three options that shape the scores
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[LengthGroup],
    scaling: float | None,
    *,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Computes attention of a packed row, inside each text.

    Args:
        query: `[1, heads, T, d]`; `key`, `value`: `[1, kv_heads, T, d]`.
        groups: the row's texts, sorted by length.
        window: exclusive bound of the distance between query and key.

    Returns:
        `[T, heads, d]`.
    """
    _, heads, num_tokens, width = query.shape
    out = query.new_empty(num_tokens, heads, width)
    for length, each in groupby(groups, key=lambda group: padded_length(group.length, window)):
        members = list(each)
        q, k, v = (_padded(states, members, length) for states in (query, key, value))
        real = None if causal else _real(members, length)
        found = bfloat16_attention(q, k, v, scaling, causal=causal, window=window, real=real)
        first = 0
        for group in members:
            texts = found[first : first + group.count, :, : group.length]
            out[group.start : group.end].view(group.count, group.length, heads, width).copy_(texts.transpose(1, 2))
            first += group.count
    return out


def bfloat16_attention(  # noqa: PLR0913  # the tensors, and the four options that shape the scores
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    *,
    causal: bool = False,
    window: int | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Computes attention of texts of one length, `[n, heads, L, d]`, some texts, heads and queries at a time.

    Args:
        key, value: `[n, kv_heads, M, d]` with `M ≥ L`; heads of the query share them in groups. Where `M > L`, the
            queries are those of the last `L` keys.
        window: exclusive bound of the distance between query and key.
        real: float32 `[n, M]`, 0 where a key is padding; None where none is, or none that a query sees.
    """
    texts, heads, length, width = query.shape
    num_keys, behind = key.shape[2], key.shape[2] - length
    scale = (width**-0.5 if scaling is None else scaling) * LOG2_E
    if key.shape[1] < heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    q, k, v = (states.reshape(texts * heads, -1, width) for states in (query, key, value))
    if real is not None:
        real = real.repeat_interleave(heads, dim=0)[:, None]
    num_queries = _queries_at_once(length, num_keys, window)
    blocks = list(_blocks(texts, heads, SCORES // (num_queries * num_keys)))
    scratch = _Scratch(max(block.stop - block.start for block in blocks) * num_queries * num_keys)
    out = torch.empty_like(q)
    for start in range(0, length, num_queries):
        end = min(start + num_queries, length)
        keys = visible_keys(start + behind, end + behind, num_keys, causal=causal, window=window)
        seen = slice(keys.first, keys.last)
        for some in blocks:
            block_keys = keys if real is None else keys._replace(real=real[some, :, seen])
            shares = scratch.shares(q[some, start:end], k[some, seen], scale, block_keys)
            _multiply(shares, v[some, seen], out[some, start:end])
    return out.view(texts, heads, length, width)


def _padded(states: Tensor, members: Sequence[LengthGroup], length: int) -> Tensor:
    """Returns texts of `[1, heads, T, d]` as `[n, heads, length, d]`, with zeros behind those that are shorter."""
    heads, width = states.shape[1], states.shape[3]
    out = states.new_empty(sum(group.count for group in members), heads, length, width)
    first = 0
    for group in members:
        texts = states[0, :, group.start : group.end].view(heads, group.count, group.length, width)
        place = out[first : first + group.count]
        place[:, :, : group.length] = texts.transpose(0, 1)
        if group.length < length:
            place[:, :, group.length :] = 0
        first += group.count
    return out


def _real(members: Sequence[LengthGroup], length: int) -> Tensor | None:
    """Returns 1 for tokens and 0 for padding, float32 `[n, length]`; None where there is no padding."""
    if all(group.length == length for group in members):
        return None
    lengths = torch.tensor([group.length for group in members for _ in range(group.count)])
    return (torch.arange(length) < lengths[:, None]).float()


def _queries_at_once(length: int, num_keys: int, window: int | None) -> int:
    num_queries = min(length, max(_FEWEST_QUERIES, SCORES // num_keys))
    is_narrow = window is not None and window < num_queries
    return min(num_queries, max(window, _WINDOW_QUERIES)) if is_narrow and window is not None else num_queries


def _blocks(texts: int, heads: int, most: int) -> Iterator[slice]:
    """Yields the blocks of texts × heads, each of a power of two of texts, or of some heads of one text."""
    if most < heads:
        for text in range(texts):
            for first in range(0, heads, max(1, most)):
                yield slice(text * heads + first, text * heads + min(first + max(1, most), heads))
        return
    first = 0
    while first < texts:
        count = 1 << (min(texts - first, most // heads).bit_length() - 1)
        yield slice(first * heads, (first + count) * heads)
        first += count


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
