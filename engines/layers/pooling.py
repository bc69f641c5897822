"""Pools packed hidden states to vectors, and truncates and normalizes vectors. Everything here is float32.

The formulas are sentence-transformers' (`sentence_transformer/modules/pooling.py` and `SentenceTransformer.encode`
of 6.2), on a packed row instead of a padded batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import layer_norm

from engines.layers.packing import PackedLayout, to_device
from engines.spec import PoolingMode


def pool(
    hidden: Tensor, layout: PackedLayout, modes: Sequence[PoolingMode], prompt_tokens: Sequence[int] | None = None
) -> Tensor:
    """Pools each text to one vector, `[n, H × number of modes]`, the modes side by side in the order given.

    Args:
        hidden: hidden states `[T, H]`, any float dtype; computed in float32.
        prompt_tokens: the number of leading tokens of each text that pooling leaves out; None for none
            (`include_prompt: false` of instructor-like models).
    """
    texts = _PooledTokens(hidden.float(), layout, prompt_tokens)
    parts = [_MODES[mode](texts) for mode in modes]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _PooledTokens:
    """The hidden states of the tokens that are pooled, and the text of each."""

    def __init__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None) -> None:
        self.hidden, self.layout = hidden, layout
        self.tokens, self.segments, self.positions = hidden, layout.segments, layout.positions
        self.starts = layout.starts
        self._prompt: Tensor | None = None
        if prompt_tokens is not None and any(prompt_tokens):
            self._exclude_prompts(np.array(prompt_tokens, dtype=np.int64))

    def _exclude_prompts(self, prompt: NDArray[np.int64]) -> None:
        # A prompt as long as its whole text leaves the first token for `cls`, as sentence-transformers' argmax of an
        # empty mask does; the mean is then zero over 1e-9.
        self._prompt = prompt_tokens = to_device(prompt, self.hidden.device)
        fits = self.layout.ends - self.starts > prompt_tokens
        self.starts = self.starts + torch.where(fits, prompt_tokens, 0)
        # Computed on the host, which would wait for a GPU to count the tokens that a mask keeps.
        ends = np.cumsum(self.layout.lengths)
        begins = ends - self.layout.lengths + prompt
        kept = to_device(
            np.concatenate([np.arange(*span) for span in zip(begins, ends, strict=True)]), self.hidden.device
        )
        self.tokens = self.hidden[kept]
        self.segments = self.layout.segments[kept]
        self.positions = self.layout.positions[kept]

    @property
    def is_one_row(self) -> bool:
        """Whether the row is one text that has tokens, all of which are pooled."""
        return self.starts.shape[0] == 1 and self.hidden.shape[0] > 0 and self._prompt is None

    def sum(self, values: Tensor) -> Tensor:
        """Sums `[tokens, k]` over each text, `[n, k]`."""
        zeros = values.new_zeros(self.starts.shape[0], values.shape[-1])
        return zeros.index_add_(0, self.segments, values)

    def counts(self) -> Tensor:
        """Returns the number of pooled tokens of each text, float32 `[n, 1]`, at least 1e-9."""
        sizes = self.layout.ends - self.layout.starts
        sizes = sizes if self._prompt is None else sizes - self._prompt
        return sizes.float().clamp(min=1e-9)[:, None]


def _cls(texts: _PooledTokens) -> Tensor:
    return texts.hidden[texts.starts]


def _last_token(texts: _PooledTokens) -> Tensor:
    return texts.hidden[texts.layout.ends - 1]


def _mean(texts: _PooledTokens) -> Tensor:
    if texts.is_one_row:  # one kernel instead of seven, which the forward pass has driven out of the caches
        return texts.tokens.mean(0, keepdim=True)
    return texts.sum(texts.tokens) / texts.counts()


def _mean_sqrt_len(texts: _PooledTokens) -> Tensor:
    return texts.sum(texts.tokens) / texts.counts().sqrt()


def _weighted_mean(texts: _PooledTokens) -> Tensor:
    weights = (texts.positions + 1).float()[:, None]
    return texts.sum(texts.tokens * weights) / texts.sum(weights).clamp(min=1e-9)


def _max(texts: _PooledTokens) -> Tensor:
    index = texts.segments[:, None].expand_as(texts.tokens)
    lowest = texts.hidden.new_full((len(texts.layout.starts), texts.hidden.shape[-1]), float("-inf"))
    return lowest.scatter_reduce_(0, index, texts.tokens, reduce="amax")


_MODES: dict[PoolingMode, Callable[[_PooledTokens], Tensor]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}


def normalize(vectors: Tensor) -> Tensor:
    """Scales vectors `[n, D]` to length one, as `torch.nn.functional.normalize` does in nine Python calls."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(1e-12)


def truncate_and_normalize(vectors: Tensor, *, dimensions: int, normalized: bool, pre_norm: bool) -> Tensor:
    """Truncates float32 vectors `[n, D]` to `[n, dimensions]`, then scales them to length one when `normalized`.

    As OpenAI does, it normalizes *after* it truncates.

    Args:
        pre_norm: whether a layer norm without weights over the full width comes first, where `dimensions` is less than
            `D` (nomic-embed-text-v1.5's model card).
    """
    if pre_norm and dimensions < vectors.shape[-1]:
        vectors = layer_norm(vectors, (vectors.shape[-1],))
    if dimensions < vectors.shape[-1]:
        vectors = vectors[:, :dimensions]
    return normalize(vectors) if normalized else vectors
