"""Turns hidden states into the vectors of a text's tokens: projection, normalization, and which tokens have one."""

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor
from torch.nn.functional import linear, normalize

from engines.inputs.token_ids import ID_MASK
from engines.layers.packing import PackedLayout, to_device
from engines.models.head import EmbeddingHead
from engines.models.outputs import Side, TokenRows


class ScoringMask(Struct, frozen=True, kw_only=True):
    """Which tokens have a vector, as `MultiVectorMask` of sentence-transformers decides it.

    Args:
        skipped_ids: tokens that have none.
        skipped_on: the sides on which these are left out.
        kept_ids: the only tokens of documents that have one; none for all.
    """

    skipped_ids: tuple[int, ...] = ()
    skipped_on: tuple[Side, ...] = ("document",)
    kept_ids: tuple[int, ...] = ()

    def apply(self, ids: Tensor, side: Side) -> Tensor | None:
        """Returns which of some tokens have a vector, bool `[T]`; None for all."""
        kept: Tensor | None = None
        if self.skipped_ids and side in self.skipped_on:
            kept = ~torch.isin(ids, ids.new_tensor(self.skipped_ids))
        if self.kept_ids and side == "document":
            listed = torch.isin(ids, ids.new_tensor(self.kept_ids))
            kept = listed if kept is None else kept & listed
        return kept


class LateInteractionHead:
    """The vectors of a model of late interaction (`engines.models.outputs.TokenHead`).

    Args:
        chain: projects and normalizes; its target are the vectors of tokens.
        mask: which tokens have a vector.
    """

    def __init__(self, chain: EmbeddingHead, mask: ScoringMask) -> None:
        self._chain, self._mask = chain, mask
        self.width = chain.dimensions
        self.weights = chain.weights

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> TokenRows:
        """See `TokenHead`. Tokens without a vector are not projected."""
        kept = self._mask.apply(ids & ID_MASK, side)
        if kept is None:
            return TokenRows(layout.lengths, self._chain(hidden, layout))
        counts = torch.bincount(layout.segments[kept], minlength=len(layout.lengths)).tolist()
        return TokenRows(counts, self._chain(hidden[kept], layout))


class BehindFirstHead:
    """The vectors of all tokens of a text but the first (`engines.models.outputs.TokenHead`).

    bge-m3's: a linear layer over the hidden states, and each vector brought to length one (FlagEmbedding's
    `EncoderOnlyEmbedderM3ModelForInference`).

    Args:
        weight: `[W, H]`; `bias`: `[W]`; both float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self.width = len(weight)
        self.weights = [weight, bias]

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> TokenRows:
        """See `TokenHead`."""
        behind = hidden[_behind_first(layout)].float()
        vectors = linear(behind, self._weight, self._bias)
        return TokenRows([length - 1 for length in layout.lengths], normalize(vectors, dim=-1))


def _behind_first(layout: PackedLayout) -> Tensor:
    """Returns the places of all tokens but the first of each text; computed on the host, which need not wait."""
    is_first = np.zeros(layout.num_tokens, dtype=bool)
    is_first[np.cumsum([0, *layout.lengths[:-1]])] = True
    return to_device(np.flatnonzero(~is_first), layout.starts.device)
