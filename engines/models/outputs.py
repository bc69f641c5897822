"""Defines what a pass gives beside dense vectors: entries of a vocabulary, and vectors of tokens."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from engines.layers.packing import PackedLayout

Side = Literal["query", "document"]
"""The side of a search that a text is on, where a model treats the two differently; without one: `document`."""


class SparseRows(NamedTuple):
    """The entries of several texts that are not zero, text after text, on the device; they rise within each text.

    `counts`: int64 `[n]`. `entries`: int32 `[sum(counts)]`. `weights`: float32 `[sum(counts)]`.
    """

    counts: Tensor
    entries: Tensor
    weights: Tensor


class TokenRows(NamedTuple):
    """Vectors of the tokens of several texts, text after text: `counts` of them; float32 `[sum(counts), W]`."""

    counts: Sequence[int]
    vectors: Tensor


class RawOutputs(NamedTuple):
    """What one pass over `n` texts gives, as far as it was asked for; `dense`: float32 `[n, D]`."""

    dense: Tensor | None = None
    sparse: SparseRows | None = None
    tokens: TokenRows | None = None


class SparseHead(Protocol):
    """Turns hidden states into entries of a vocabulary.

    Attributes:
        vocab_size: the number of entries.
        weights: the tensors that it holds.
    """

    vocab_size: int
    weights: list[Tensor]

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> SparseRows:
        """Turns packed hidden states `[T, H]` of the tokens `ids` `[T]` into the entries of each text."""


class TokenHead(Protocol):
    """Turns hidden states into vectors of tokens.

    Attributes:
        width: of the vectors.
        weights: the tensors that it holds.
    """

    width: int
    weights: list[Tensor]

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> TokenRows:
        """Turns packed hidden states `[T, H]` of the tokens `ids` `[T]` into the vectors of each text."""
