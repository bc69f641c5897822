"""Computes sparse outputs whose entries are a text's own tokens: bge-m3's lexical weights, and tables of weights."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from engines.inputs.tokenizer import Ids
from engines.layers.packing import PackedLayout, to_device
from engines.models.base import SinglePathEncoder
from engines.models.outputs import RawOutputs, Side, SparseRows, Wanted
from engines.models.splade import nonzero_entries


class LexicalHead:
    """Weighs the tokens of a text (`engines.models.outputs.SparseHead`): `max(relu(w · hidden + b))` over the places of
    a token; special tokens are left out. FlagEmbedding's `M3Embedder` (`_process_token_weights`).

    Args:
        weight: float32 `[1, H]`.
        bias: float32 `[1]`.
        vocab_size: the number of tokens.
        dropped: tokens that are left out.

    Attributes:
        vocab_size, weights, token_bytes: see `SparseHead`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, vocab_size: int, dropped: Sequence[int]) -> None:
        self._weight, self._bias = weight, bias
        self.vocab_size = vocab_size
        self._is_dropped = torch.zeros(vocab_size, dtype=torch.bool, device=weight.device)
        self._is_dropped[list(dropped)] = True
        self.weights = [weight, self._is_dropped] + ([] if bias is None else [bias])
        self.token_bytes = 4 * weight.shape[1] + 64  # hidden states in float32, and keys

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> SparseRows:
        """See `SparseHead`."""
        weights = linear(hidden.float(), self._weight, self._bias)[:, 0].relu()
        return token_entries(weights.masked_fill(self._is_dropped[ids], 0.0), layout, ids, self.vocab_size)

    def all_weights(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> Tensor:
        """See `SparseHead`."""
        rows = self(hidden, layout, ids, side)
        texts = torch.repeat_interleave(torch.arange(len(rows.counts), device=ids.device), rows.counts)
        whole = rows.weights.new_zeros(len(rows.counts), self.vocab_size)
        whole[texts, rows.entries.long()] = rows.weights
        return whole


def token_entries(weights: Tensor, layout: PackedLayout, ids: Tensor, vocab_size: int) -> SparseRows:
    """Returns the distinct tokens of each text with the largest of their weights `[T]`, where that is not zero."""
    keys, places = torch.unique(layout.segments * vocab_size + ids, return_inverse=True)
    found = weights.new_full((len(keys),), -torch.inf).scatter_reduce_(0, places, weights, reduce="amax")
    is_kept = found != 0
    keys = keys[is_kept]
    counts = torch.bincount(keys // vocab_size, minlength=len(layout.lengths))
    return SparseRows(counts, (keys % vocab_size).int(), found[is_kept])


class LexicalTable(SinglePathEncoder):
    """Gives the distinct tokens of a text with weights from a table, without a transformer: sentence-transformers'
    `SparseStaticEmbedding` (`engines.models.outputs.OutputsEncoder`).

    Args:
        table: float32 `[vocabulary]` on the device.
        max_active: the most entries of a text, of the largest magnitude; None is any number.
    """

    def __init__(self, table: Tensor, device: torch.device, max_active: int | None = None) -> None:
        self._table, self._device, self._max_active = table, device, max_active
        self.dimensions = self.vocab_size = len(table)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Returns the weights of all entries, `[n, vocabulary]`, which the check at load compares."""
        rows = self._table.new_zeros(len(texts), len(self._table))
        for row, ids in zip(rows, texts, strict=True):
            row[ids] = self._table[ids]
        return rows

    @torch.inference_mode()
    def run_outputs(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None, wanted: Wanted) -> RawOutputs:
        """See `OutputsEncoder`."""
        if self._max_active is not None:
            parts = [nonzero_entries(self([ids]), self._max_active) for ids in texts]
            return RawOutputs(sparse=SparseRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))))
        kept = [index for index, ids in enumerate(texts) if len(ids)]
        counts = torch.zeros(len(texts), dtype=torch.int64, device=self._device)
        if not kept:
            return RawOutputs(sparse=SparseRows(counts, counts[:0].int(), self._table[:0]))
        layout = PackedLayout([len(texts[index]) for index in kept], self._device)
        ids = to_device(np.concatenate([texts[index] for index in kept]), self._device)
        rows = token_entries(self._table[ids], layout, ids, len(self._table))
        counts[kept] = rows.counts
        return RawOutputs(sparse=rows._replace(counts=counts))

    def tensors(self) -> list[Tensor]:
        """See `LoadedEncoder`."""
        return [self._table]

    def token_bytes(self) -> int:
        """See `LoadedEncoder`: keys, places and weights; and a row of the check for a text of few tokens."""
        return 64 + 4 * len(self._table)
