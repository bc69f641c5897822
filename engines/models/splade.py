"""Computes SPLADE's sparse outputs: the logits of a masked language model, pooled over the tokens of each text.

sentence-transformers' `SpladePooling` of 6.2: `max` or `sum` over tokens of `log1p(relu(logit))`, or of `log1p` of that
again. Logits of a batch would take 122 KB a token for 30,522 entries, so that they are computed for some texts and a
block of the vocabulary at a time, and pooled at once. Both functions rise, so that the maximum over tokens is taken of
logits first, and the functions are applied to one number for each entry.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from msgspec import Struct
from torch import Tensor, nn

from engines.errors import UnsupportedModel
from engines.layers.packing import PackedLayout
from engines.layers.products import linear
from engines.models.outputs import MAX_TERMS, Side, SparseRows
from engines.models.score_head import GivenStates

_BLOCK_NUMBERS = 1 << 20
"""Logits that are held at a time: 4 MiB, which stay in a core's cache until they are pooled."""

_LEAST_BLOCK = 256
"""Entries of the smallest block, with which products are still fast."""

_GROUP_NUMBERS = 1 << 21
"""Pooled numbers that are held at a time: of 68 texts with 30,522 entries each."""

_BLOCK_TOKEN_BYTES = 1 << 13
"""Memory of a block for each of 512 tokens."""


class SpladePooling(Struct, frozen=True):
    """How logits become weights.

    Args:
        strategy: what is taken over the tokens of a text.
        logs: how often `log1p` is applied to what `relu` gives.
        max_active: the most entries of a text, the largest; None is any number.
    """

    strategy: Literal["max", "sum"] = "max"
    logs: int = 1
    max_active: int | None = None

    def activate(self, logits: Tensor) -> Tensor:
        """Turns logits into weights, in place."""
        weights = logits.relu_()
        for _ in range(self.logs):
            weights = weights.log1p_()
        return weights


class SpladeHead:
    """Computes the sparse output of each text of a packed row (`engines.models.outputs.SparseHead`).

    Args:
        model: transformers' masked language model. Its decoder is taken out.
        backbone: the attribute of the model that holds its backbone.
        pooling: how logits become weights.
        pause: called between two blocks; it may run other texts.

    Attributes:
        vocab_size, weights, token_bytes: see `SparseHead`.
    """

    def __init__(self, model: Any, backbone: str, pooling: SpladePooling, pause: Callable[[], None]) -> None:
        decoder = model.get_output_embeddings()
        name = next((name for name, part in model.named_modules() if part is decoder), None)
        if type(decoder) is not nn.Linear or name is None:
            raise UnsupportedModel(
                f"the head of {type(model).__name__} does not end with one linear layer; it is not supported"
            )
        self._weight = decoder.weight.detach()
        self._bias = None if decoder.bias is None else decoder.bias.detach()
        model.set_submodule(name, nn.Identity())
        self._transform = copy.copy(model)
        self._transform._modules = {**model._modules, backbone: GivenStates(None, None)}
        self._pooling, self._pause = pooling, pause
        self.vocab_size = len(self._weight)
        own = [self._weight, *([] if self._bias is None else [self._bias])]
        self.weights: list[Tensor] = [*own, *self._transform.parameters(), *self._transform.buffers()]
        width: int = decoder.in_features
        self.token_bytes = 3 * self.vocab_size + _BLOCK_TOKEN_BYTES + 4 * width * self._weight.itemsize

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> SparseRows:
        """See `SparseHead`."""
        states = self._states(hidden)
        parts = [
            self._entries(self._pooled(states[start:end], lengths)) for start, end, lengths in self._groups(layout)
        ]
        return SparseRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def all_weights(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> Tensor:
        """See `SparseHead`."""
        return self._pooled(self._states(hidden), layout.lengths)

    def _states(self, hidden: Tensor) -> Tensor:
        """Returns what the decoder reads, `[T, H]`."""
        states: Tensor = self._transform(
            inputs_embeds=hidden[None],
            attention_mask=torch.ones(1, len(hidden), dtype=torch.int64, device=hidden.device),
        ).logits[0]
        return states

    def _groups(self, layout: PackedLayout) -> Iterator[tuple[int, int, list[int]]]:
        """Yields the tokens of some texts that follow each other, and the lengths of these texts."""
        at_once, start = max(1, _GROUP_NUMBERS // self.vocab_size), 0
        for first in range(0, len(layout.lengths), at_once):
            lengths = layout.lengths[first : first + at_once]
            yield start, start + sum(lengths), lengths
            start += sum(lengths)

    def _pooled(self, states: Tensor, lengths: list[int]) -> Tensor:
        """Returns the weights of all entries for some texts, `[n, vocabulary]`."""
        pooling, groups = self._pooling, PackedLayout(lengths, torch.device("cpu")).groups
        pooled = states.new_empty(len(lengths), self.vocab_size, dtype=torch.float32)
        for start, end in _blocks(self.vocab_size, len(states)):
            self._pause()
            logits = linear(states, self._weight[start:end], None if self._bias is None else self._bias[start:end])
            logits = pooling.activate(logits.float()) if pooling.strategy == "sum" else logits
            row = 0
            for group in groups:
                part = logits[group.start : group.end].view(group.count, group.length, -1)
                found = part.sum(1) if pooling.strategy == "sum" else part.amax(1)
                pooled[row : row + group.count, start:end] = found
                row += group.count
        return pooled if pooling.strategy == "sum" else pooling.activate(pooled)

    def _entries(self, pooled: Tensor) -> SparseRows:
        return nonzero_entries(pooled, self._pooling.max_active)


def nonzero_entries(pooled: Tensor, max_active: int | None = None) -> SparseRows:
    """Returns the entries of `[n, vocabulary]` that are not zero, at most `MAX_TERMS` or `max_active` of a row: those
    of the largest magnitude."""
    limit = min(max_active or MAX_TERMS, MAX_TERMS)
    counts = (pooled != 0).sum(1)
    if limit < pooled.shape[1] and bool((counts > limit).any()):
        places = pooled.abs().topk(limit, dim=1).indices.sort(dim=1).values
        weights = pooled.gather(1, places)
        is_kept = weights != 0
        return SparseRows(is_kept.sum(1), places[is_kept].int(), weights[is_kept])
    places = (pooled != 0).nonzero()[:, 1]
    return SparseRows(counts, places.int(), pooled[pooled != 0])


def _blocks(vocab_size: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Yields the parts of a vocabulary, of about one size."""
    most = max(_LEAST_BLOCK, _BLOCK_NUMBERS // num_tokens)
    size = -(-vocab_size // -(-vocab_size // most))
    yield from ((start, min(start + size, vocab_size)) for start in range(0, vocab_size, size))
