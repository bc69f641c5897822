"""Computes sparse outputs from a dense vector: the latents of an autoencoder of which few are kept (CSR).

sentence-transformers' `SparseAutoEncoder` of 6.2, after Wen et al., *Beyond Matryoshka: Revisiting Sparse Coding for
Adaptive Representation* (https://arxiv.org/abs/2503.01776): `relu` of the `k` largest of `W (x - b) + c`, where `x` is
the vector of a text, with `normalized` brought to mean zero and standard deviation one.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from engines.layers.packing import PackedLayout
from engines.models.head import TOKENS, EmbeddingHead
from engines.models.outputs import Side, SparseRows
from engines.models.splade import nonzero_entries

_EPSILON = 1e-5
"""Added to the standard deviation."""


class AutoEncoderWeights(NamedTuple):
    """The weights of an autoencoder's first half, float32: `bias` `[D]`, `matrix` `[L, D]`, `latent_bias` `[L]`."""

    bias: Tensor
    matrix: Tensor
    latent_bias: Tensor


class AutoEncoderHead:
    """Turns hidden states into the latents of each text (`engines.models.outputs.SparseHead`).

    Args:
        dense: gives the vectors of texts.
        latents: of the autoencoder.
        normalized: whether each vector is brought to mean zero and standard deviation one first.
        max_active: the most latents of a text, the largest.

    Attributes:
        vocab_size, weights, token_bytes: see `SparseHead`; each latent is an entry.
    """

    def __init__(self, dense: EmbeddingHead, latents: AutoEncoderWeights, max_active: int, *, normalized: bool) -> None:
        self._dense, self._latents, self._max_active, self._normalized = dense, latents, max_active, normalized
        self.vocab_size = len(latents.latent_bias)
        self.weights: list[Tensor] = [*dense.weights, *latents]
        self.token_bytes = 8 * self.vocab_size + 4 * dense.widths[TOKENS]  # of texts of one token

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> SparseRows:
        """See `SparseHead`."""
        return nonzero_entries(self.all_weights(hidden, layout, ids, side), self._max_active)

    def all_weights(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> Tensor:
        """See `SparseHead`."""
        x = self._dense(hidden, layout)
        if self._normalized:
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / (x.std(dim=-1, keepdim=True) + _EPSILON)
        bias, matrix, latent_bias = self._latents
        return linear(x - bias, matrix, latent_bias).relu()
