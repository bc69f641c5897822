"""Defines what a pass gives beside dense vectors: entries of a vocabulary, and vectors of tokens."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from engines.inputs.token_ids import Ids
from engines.layers.packing import PackedLayout
from engines.spec import Side as Side

MAX_TERMS = 8192
"""The most entries of a sparse output. SPLADE models give some hundreds; those of a model that is not sparse would take
250 KB a text."""


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


class Wanted(NamedTuple):
    """The outputs that a pass shall give.

    `multi_vector`: vectors of tokens by the model's head for these; `states`: those that pooling reads, without a head.
    At most one of the two.
    """

    dense: bool = False
    sparse: bool = False
    multi_vector: bool = False
    states: bool = False
    side: Side = "document"

    @property
    def is_dense_only(self) -> bool:
        """Tells whether nothing but a dense vector is wanted."""
        return not (self.sparse or self.multi_vector or self.states)


@runtime_checkable
class OutputsEncoder(Protocol):
    """An encoder that gives more than one row of numbers for each text."""

    def run_outputs(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None, wanted: Wanted) -> RawOutputs:
        """Runs one pass over texts, sorted by length, and returns what is wanted of it.

        Raises:
            ForwardPathFailed: run the texts again.
        """


class SparseHead(Protocol):
    """Turns hidden states into entries of a vocabulary.

    Attributes:
        vocab_size: the number of entries.
        weights: the tensors that it holds.
        token_bytes: memory that each token of a pass needs in it, an upper estimate.
    """

    vocab_size: int
    weights: list[Tensor]
    token_bytes: int

    def __call__(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> SparseRows:
        """Turns packed hidden states `[T, H]` of the tokens `ids` `[T]` into the entries of each text."""

    def all_weights(self, hidden: Tensor, layout: PackedLayout, ids: Tensor, side: Side) -> Tensor:
        """Returns the weights of all entries, float32 `[n, vocab_size]`, before any are left out; for few texts."""


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
