"""Joins the heads of a model that gives more than one kind of output from one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from engines.inputs.token_ids import ID_MASK
from engines.layers.packing import PackedLayout, TokenChoice
from engines.layers.pooling import pool
from engines.models.head import TOKENS, EmbeddingHead
from engines.models.lexical import LexicalTable
from engines.models.outputs import RawOutputs, Side, SparseHead, SparseRows, TokenHead, TokenRows, Wanted

_MAX_CHECK_WIDTH = 32768
"""Entries of a vocabulary of more share columns of the row that the check at load compares: a canary of four rows stays
below a megabyte."""


class OutputHeads:
    """The heads of one model (`engines.models.head.Head`). One of them at least is there.

    Args:
        dense: the modules behind the transformer.
        sparse: gives entries of a vocabulary.
        tokens: gives vectors of tokens.
        queries: gives the sparse outputs of queries, in place of the transformer and `sparse`.

    Attributes:
        weights: the tensors of all heads.
        dimensions: the width of what a call returns.
    """

    def __init__(
        self,
        dense: EmbeddingHead | None = None,
        sparse: SparseHead | None = None,
        tokens: TokenHead | None = None,
        queries: LexicalTable | None = None,
    ) -> None:
        self.dense, self.sparse, self.tokens, self.queries = dense, sparse, tokens, queries
        self.weights = [weight for head in (dense, sparse, tokens) if head is not None for weight in head.weights]
        self.weights += [] if queries is None else queries.tensors()
        self.dimensions = dense.dimensions if dense is not None else self.check_width

    @property
    def is_dense_only(self) -> bool:
        """Tells whether there is no head beside the dense one."""
        return self.sparse is None and self.tokens is None

    @property
    def states_width(self) -> int:
        """Returns the width of the tokens' states that pooling reads; 0 where there is no dense head."""
        return 0 if self.dense is None else self.dense.widths[TOKENS]

    @property
    def reads(self) -> TokenChoice:
        """See `Head`: the tokens that the dense vector depends on."""
        return "all" if self.dense is None else self.dense.reads

    @property
    def check_width(self) -> int:
        """Returns the width of the rows of `check_rows`."""
        if self.dense is not None and self.is_dense_only:
            return self.dense.dimensions
        widths = [2 * [self.dense.dimensions] if self.dense is not None else []]
        widths += [[_check_width(head)] for head in (self.sparse, self.queries) if head is not None]
        widths += [2 * [self.tokens.width] if self.tokens is not None else []]
        parts = [width for group in widths for width in group]
        return parts[0] if len(parts) == 1 else sum(parts) + len(parts)

    def __call__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Head`: the dense vectors; without these, the rows that the check compares."""
        if self.dense is not None:
            return self.dense(hidden, layout, prompt_tokens)
        return self.check_rows(None, hidden, layout)

    def run(
        self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None, wanted: Wanted
    ) -> RawOutputs:
        """Returns what is wanted of packed hidden states `[T, H]` of all tokens; `layout` knows their ids."""
        dense: Tensor | None = None
        states: TokenRows | None = None
        if self.dense is not None and (wanted.dense or wanted.states):
            features = self.dense.run(hidden, layout, prompt_tokens)
            dense = features[self.dense.target] if wanted.dense else None
            states = TokenRows(layout.lengths, features[TOKENS]) if wanted.states else None
        sparse = self._sparse_rows(hidden, layout, wanted.side) if wanted.sparse else None
        return RawOutputs(
            dense, sparse, self._token_rows(hidden, layout, wanted.side) if wanted.multi_vector else states
        )

    def check_rows(self, dense: Tensor | None, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """Returns one row for each text, float32 `[n, check_width]`, in which an error of any head shows.

        A model with one head has its own row: the dense vector, the weights of all entries, or the tokens' vectors
        weighted by their places. Several heads' rows stand side by side, each brought to length one and followed by the
        logarithm of its length, so that none hides the rounding that is allowed to another.

        Args:
            dense: the dense vectors as a pass for these alone gives them.
            hidden: `[T, H]`, of all tokens.
        """
        parts: list[Tensor] = []
        if self.dense is not None:
            parts = [self.dense(hidden, layout) if dense is None else dense, self.dense(hidden, layout)]
        if self.sparse is not None:
            ids = layout.ids & ID_MASK
            parts.append(folded(self.sparse.all_weights(hidden, layout, ids, "document"), _check_width(self.sparse)))
        if self.queries is not None:
            parts.append(folded(self.queries(layout.texts), _check_width(self.queries)))
        if self.tokens is not None:
            sides: tuple[Side, ...] = ("document", "query")
            parts += [_weighted_mean(self._token_rows(hidden, layout, side)) for side in sides]
        if len(parts) == 1:
            return parts[0]
        lengths = [part.norm(dim=-1, keepdim=True).log1p() for part in parts]
        rows = [normalize(part, dim=-1) for part in parts]
        return torch.cat([piece for pair in zip(rows, lengths, strict=True) for piece in pair], dim=-1)

    def _sparse_rows(self, hidden: Tensor, layout: PackedLayout, side: Side) -> SparseRows:
        assert self.sparse is not None, "`ModelInfo.outputs` has been checked"
        return self.sparse(hidden, layout, layout.ids & ID_MASK, side)

    def _token_rows(self, hidden: Tensor, layout: PackedLayout, side: Side) -> TokenRows:
        assert self.tokens is not None, "`ModelInfo.outputs` has been checked"
        return self.tokens(hidden, layout, layout.ids & ID_MASK, side)


def _check_width(head: SparseHead | LexicalTable) -> int:
    return min(head.vocab_size, _MAX_CHECK_WIDTH)


def folded(weights: Tensor, width: int) -> Tensor:
    """Returns the weights of all entries `[n, vocabulary]` in `width` columns; entries that share one are added."""
    columns = torch.arange(weights.shape[1], device=weights.device) % width
    return weights.new_zeros(len(weights), width).index_add_(1, columns, weights)


def _weighted_mean(rows: TokenRows) -> Tensor:
    """Returns the mean of each text's vectors `[n, W]`, weighted by place, so that their order matters; a text without
    vectors has zeros."""
    kept = [index for index, count in enumerate(rows.counts) if count]
    means = rows.vectors.new_zeros(len(rows.counts), rows.vectors.shape[-1])
    if kept:
        layout = PackedLayout([rows.counts[index] for index in kept], rows.vectors.device)
        means[kept] = pool(rows.vectors, layout, ("weightedmean",))
    return means
