"""Packed hidden states to vectors, and the Matryoshka cut. Everything here is float32.

The formulas are sentence-transformers' (`sentence_transformer/modules/pooling.py` and `SentenceTransformer.encode`
of 6.2), on a packed row instead of a padded batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from engines.layers.packing import PackedLayout, to_device
from engines.spec import PoolingMode


def pool(
    hidden: Tensor, layout: PackedLayout, modes: Sequence[PoolingMode], prompt_tokens: Sequence[int] | None = None
) -> Tensor:
    """One vector a text, `[n, H × number of modes]`, the modes side by side in the order given.

    Args:
        hidden: `[T, H]`, any float dtype; computed in float32.
        prompt_tokens: how many leading tokens of each text the pooling leaves out, or None for none
            (`include_prompt: false` of instructor-like models).
    """
    texts = _Texts(hidden.float(), layout, prompt_tokens)
    parts = [_MODES[mode](texts) for mode in modes]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _Texts:
    """Hidden states of the tokens that count, and how they fall into texts."""

    def __init__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None) -> None:
        self.hidden, self.layout = hidden, layout
        self.tokens, self.segments, self.positions = hidden, layout.segments, layout.positions
        self.starts = layout.starts
        self.sizes = layout.ends - layout.starts
        if prompt_tokens is not None and any(prompt_tokens):
            self._leave_out(np.array(prompt_tokens, dtype=np.int64))

    def _leave_out(self, prompt: NDArray[np.int64]) -> None:
        # A prompt that swallows the whole text leaves the first token, as sentence-transformers' argmax of an
        # empty mask does for `cls`; its mean is then zero over 1e-9.
        prompt_tokens = to_device(prompt, self.hidden.device)
        fits = self.sizes > prompt_tokens
        self.starts = self.starts + torch.where(fits, prompt_tokens, 0)
        # Counted here: a mask on a GPU would have the host wait for how many it leaves.
        ends = np.cumsum(self.layout.lengths)
        begins = ends - self.layout.lengths + prompt
        kept = to_device(
            np.concatenate([np.arange(*span) for span in zip(begins, ends, strict=True)]), self.hidden.device
        )
        self.tokens = self.hidden[kept]
        self.segments = self.layout.segments[kept]
        self.positions = self.layout.positions[kept]
        self.sizes = (self.sizes - prompt_tokens).clamp(min=0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `[tokens, k]` over each text, `[n, k]`."""
        zeros = values.new_zeros(len(self.layout.starts), values.shape[-1])
        return zeros.index_add_(0, self.segments, values)

    def counts(self) -> Tensor:
        return self.sizes.float().clamp(min=1e-9)[:, None]


def _cls(texts: _Texts) -> Tensor:
    return texts.hidden[texts.starts]


def _last_token(texts: _Texts) -> Tensor:
    return texts.hidden[texts.layout.ends - 1]


def _mean(texts: _Texts) -> Tensor:
    return texts.sum(texts.tokens) / texts.counts()


def _mean_sqrt_len(texts: _Texts) -> Tensor:
    return texts.sum(texts.tokens) / texts.counts().sqrt()


def _weighted_mean(texts: _Texts) -> Tensor:
    weights = (texts.positions + 1).float()[:, None]
    return texts.sum(texts.tokens * weights) / texts.sum(weights).clamp(min=1e-9)


def _max(texts: _Texts) -> Tensor:
    index = texts.segments[:, None].expand_as(texts.tokens)
    lowest = texts.hidden.new_full((len(texts.layout.starts), texts.hidden.shape[-1]), float("-inf"))
    return lowest.scatter_reduce_(0, index, texts.tokens, reduce="amax")


_MODES: dict[PoolingMode, Callable[[_Texts], Tensor]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}


def truncate_and_normalize(vectors: Tensor, *, dimensions: int, normalized: bool, pre_norm: bool) -> Tensor:
    """Cut float32 vectors `[n, D]` to `[n, dimensions]`, then bring them to length one when `normalized`.

    `pre_norm`: a layer norm without weights over the full width comes first when the width is really cut
    (nomic-embed-text-v1.5's model card). OpenAI and its kin normalise *after* the cut; so do we.
    """
    if pre_norm and dimensions < vectors.shape[-1]:
        vectors = layer_norm(vectors, (vectors.shape[-1],))
    vectors = vectors[:, :dimensions]
    return normalize(vectors, dim=-1) if normalized else vectors
