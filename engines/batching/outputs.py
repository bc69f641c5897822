"""Several outputs of one forward pass: the output of an `OutputsCall`, and what a loader found out about them.

A row is int32 of one dimension, whatever its parts are: the number of its vocabulary entries and of its vectors of
tokens; then the dense vector, the entries, their weights and the vectors, as many of these as were asked for.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import ClassVar, Unpack, cast

import msgspec
import numpy as np
import torch
from msgspec import Struct, structs
from numpy.typing import NDArray

from engines.batching.output import (
    DenseOutput,
    FinishedRows,
    OutputDefaults,
    OutputSpec,
    Row,
    dense_output,
    register_output,
)
from engines.batching.pooled import check_pooled
from engines.errors import EngineError, InvalidValue, NonFiniteEmbedding, TaskNotSupported
from engines.inputs.prompts import DOCUMENT_NAMES, QUERY_NAMES
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.layers.token_pooling import TokenPooling, merging
from engines.models.base import Encoder
from engines.models.outputs import MAX_TERMS, OutputsEncoder, RawOutputs, Side, SparseRows, TokenRows, Wanted
from engines.space import VectorForm, output_name
from engines.spec import Output, PoolingMode, Similarity
from engines.types import MAX_ANSWER_BYTES, ModelInfo, Outputs, OutputsCall, ResultDetails, TextCall, format_bytes

_LARGE_BYTES = 64 * 1024
"""An answer of more is joined on a thread: joining that many takes 0.1 ms, and more with every row."""

_HEAD = 2


class OutputFacts(Struct, frozen=True, kw_only=True):
    """What a loader found out about the outputs of a model that embeds.

    Args:
        outputs: what it gives.
        dimensions: of dense vectors; 0 without them.
        vocab_size: the number of entries that sparse outputs index; 0 without them.
        has_term_names: whether these entries are tokens.
        vector_width: of the vectors of tokens by a head for these; 0 without one.
        states_width: of the hidden states of tokens that pooling reads; 0 where there are none.
        pooling_modes: how tokens become the dense vector; empty where there are none, or no such vector.
        default_side: of texts whose call names none.
        query_tokenizer, document_tokenizer: read queries and documents where the model reads them in a way of its own.
        similarity: how documents are scored by their vectors of tokens; None where they are not.
        pooling: how the model merges vectors of tokens, on the sides `pooled_on`; None for none.
    """

    outputs: tuple[Output, ...] = ("dense",)
    dimensions: int = 0
    vocab_size: int = 0
    has_term_names: bool = True
    vector_width: int = 0
    states_width: int = 0
    pooling_modes: tuple[PoolingMode, ...] = ()
    default_side: Side = "document"
    query_tokenizer: Tokenizer | None = None
    document_tokenizer: Tokenizer | None = None
    similarity: Similarity | None = None
    pooling: TokenPooling | None = None
    pooled_on: tuple[Side, ...] = ()

    def longest(self, max_tokens: int) -> int:
        """Returns the longest input of any side, where one of no side has at most `max_tokens`."""
        sides = (self.query_tokenizer, self.document_tokenizer)
        return max([max_tokens, *(side.max_tokens for side in sides if side is not None)])

    @property
    def token_pooling(self) -> dict[Side, str]:
        """Names how the model merges vectors of tokens, by the side."""
        return {} if self.pooling is None else {side: merging((self.pooling,)) for side in self.pooled_on}

    @property
    def has_sides(self) -> bool:
        """Tells whether queries or documents are read in a way of their own."""
        return self.query_tokenizer is not None or self.document_tokenizer is not None

    def tokenizer_of(self, call: TextCall) -> Tokenizer | None:
        """Returns what reads the inputs of a call; None for the model's own tokenizer, which reads texts of no side."""
        if side_of(call, self.default_side) == "query":
            return self.query_tokenizer
        return self.document_tokenizer if call.input_type in DOCUMENT_NAMES else None

    def lengths_of(self, call: TextCall, own: Tokenizer) -> tuple[int, int]:
        """Returns the tokens that are read of an input of a call, and those that are of one on its side of a search.

        Texts that name no side count as documents, but are read by the model's `own` tokenizer, to another length.
        """
        reads = (self.tokenizer_of(call) or own).max_tokens
        if side_of(call, self.default_side) == "query" and self.query_tokenizer is not None:
            return reads, reads
        return reads, (self.document_tokenizer or own).max_tokens


def side_of(call: TextCall, default: Side) -> Side:
    """Returns the side of a search that the inputs of a call are on, as its `input_type` or `instruction` says."""
    if call.input_type in QUERY_NAMES or call.instruction is not None:
        return "query"
    return "document" if call.input_type in DOCUMENT_NAMES else default


class MixedOutput(OutputSpec, frozen=True):
    """The outputs that an `OutputsCall` asks for, answered by `Outputs`. Raw outputs are `RawOutputs`.

    There is one subclass for each set of outputs and each side, so that a pass computes what is wanted and no more, and
    a query is never answered with what a document has. The cache keeps no such rows: vectors of the tokens of a few
    texts would take the place of thousands of dense ones.

    Args:
        dense: how the dense vectors are finished.
        vector_width: of the vectors of tokens.
        max_terms, min_weight: of sparse outputs.
        pooling: how vectors of tokens are merged, one after the other.
    """

    is_cached: ClassVar[bool] = False
    wanted: ClassVar[Wanted] = Wanted()

    dense: DenseOutput | None
    vector_width: int
    max_terms: int
    min_weight: float
    pooling: tuple[TokenPooling, ...] = ()

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> RawOutputs:
        """See `OutputSpec`."""
        if cls.wanted.is_dense_only:
            return RawOutputs(dense=encoder(texts, prompt_tokens))
        assert isinstance(encoder, OutputsEncoder), "`OutputFacts` has been checked"
        return encoder.run_outputs(texts, prompt_tokens, cls.wanted)

    def finish(self, raw: RawOutputs, indexes: Sequence[int] | None) -> FinishedRows:
        """See `OutputSpec`."""
        chosen = range(_num_texts(raw)) if indexes is None else indexes
        none = [NO_NUMBERS] * len(chosen)
        dense: Sequence[Row] = none
        if self.dense is not None and raw.dense is not None:
            dense = [*self.dense.finish(raw.dense, indexes).rows]
        terms = [(NO_NUMBERS, NO_NUMBERS)] * len(chosen) if raw.sparse is None else self._terms(raw.sparse, chosen)
        vectors: Sequence[Row] = none if raw.tokens is None else _vectors(raw.tokens, chosen)
        rows = [_joined(*row) for row in zip(dense, terms, vectors, strict=True)]
        return FinishedRows([row for row, _ in rows], np.array([is_finite for _, is_finite in rows], dtype=bool))

    def check_size(self, token_counts: Sequence[int]) -> None:
        """See `OutputSpec`."""
        check_pooled(self.pooling, token_counts, self.vector_width, "input")
        num_texts, wanted = len(token_counts), self.wanted
        size_bytes = 4 * num_texts * (self.dense.dimensions if self.dense is not None else 0)
        size_bytes += 8 * num_texts * self.max_terms * wanted.sparse
        size_bytes += 4 * sum(token_counts) * self.vector_width
        if size_bytes > MAX_ANSWER_BYTES:
            remedy = "send fewer or shorter inputs"
            remedy += ", or a smaller sparse_top_k" if wanted.sparse else ""
            remedy += ", or ask for fewer outputs" if sum(wanted[:4]) > 1 else ""
            raise InvalidValue(
                f"the outputs of {num_texts} inputs with {sum(token_counts)} tokens may take "
                f"{format_bytes(size_bytes)}, and the limit is {format_bytes(MAX_ANSWER_BYTES)}: {remedy}",
                param="input",
            )

    def allocate(self, num_items: int) -> list[Row]:
        """See `OutputSpec`."""
        return [np.empty(0, np.int32)] * num_items

    def remaining_steps(self, allocated: list[Row]) -> Sequence[Callable[[], None]]:
        """See `OutputSpec`: one for each text whose vectors are merged."""
        return [partial(self._pool, allocated, index) for index in range(len(allocated))] if self.pooling else ()

    def is_large(self, allocated: list[Row]) -> bool:
        """See `OutputSpec`."""
        return sum(row.nbytes for row in allocated) > _LARGE_BYTES

    def pack(self, allocated: list[Row], **details: Unpack[ResultDetails]) -> Outputs:
        """See `OutputSpec`."""
        width, wanted = self.dense.dimensions if self.dense is not None else 0, self.wanted
        heads = [(int(row[0]), int(row[1])) for row in allocated]
        start = _HEAD + width
        pieces = [row[_HEAD:start] for row in allocated] if width else []
        if wanted.sparse:
            pieces += [row[start : start + terms] for row, (terms, _) in zip(allocated, heads, strict=True)]
            pieces += [row[start + terms : start + 2 * terms] for row, (terms, _) in zip(allocated, heads, strict=True)]
        pieces += [row[start + 2 * terms :] for row, (terms, _) in zip(allocated, heads, strict=True)]
        has_vectors = wanted.multi_vector or wanted.states
        return Outputs(
            body=b"".join(piece.data for piece in pieces if len(piece)),
            dimensions=width,
            num_terms=tuple(terms for terms, _ in heads) if wanted.sparse else (),
            num_vectors=tuple(vectors for _, vectors in heads) if has_vectors else (),
            vector_width=self.vector_width,
            **details,
        )

    def not_finite(self, index: int) -> EngineError:
        """See `OutputSpec`."""
        return NonFiniteEmbedding(
            f"the outputs of input[{index}] are not finite: the model's dtype overflows on this text. Serve the model "
            "with `dtype: float32` or `bfloat16`",
            index=index,
        )

    def _pool(self, allocated: list[Row], index: int) -> None:
        row = allocated[index]
        num_before = len(row) - int(row[1]) * self.vector_width
        vectors = torch.from_numpy(row[num_before:].view(np.float32).reshape(-1, self.vector_width))
        for pooling in self.pooling:
            vectors = pooling(vectors)
        pooled = np.concatenate([row[:num_before], vectors.contiguous().numpy().view(np.int32).reshape(-1)])
        pooled[1] = len(vectors)
        allocated[index] = pooled

    def space_form(self) -> VectorForm:
        """See `OutputSpec`. Dense vectors alone lie in the space of those of an `EmbedCall`."""
        form = VectorForm(width=self.vector_width, native_width=self.vector_width)
        form = form if self.dense is None else self.dense.space_form()
        names = [name for name in ("dense", "sparse", "multi_vector", "states") if getattr(self.wanted, name)]
        return structs.replace(form, output=output_name(names, self.wanted.side, merging(self.pooling)))

    def _terms(self, sparse: SparseRows, chosen: Sequence[int]) -> list[tuple[Row, Row]]:
        """Returns the entries and weights of each chosen text that the request wants, the entries rising."""
        entries, weights = sparse.entries.cpu().numpy(), sparse.weights.cpu().numpy()
        ends = sparse.counts.cpu().numpy().cumsum()
        starts = ends - sparse.counts.cpu().numpy()
        found = ((entries[starts[index] : ends[index]], weights[starts[index] : ends[index]]) for index in chosen)
        return [heaviest(*row, self.max_terms, self.min_weight) for row in found]


NO_NUMBERS: NDArray[np.float32] = np.empty(0, np.float32)


def heaviest(
    entries: NDArray[np.int32], weights: NDArray[np.float32], max_terms: int, min_weight: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Returns the heaviest entries, at most `max_terms`, that weigh `min_weight` if that is positive; the lower entry
    of equal ones. Entries rise before and after."""
    if min_weight > 0:
        kept = ~(weights < min_weight)  # so that a weight which is no number is found later
        entries, weights = entries[kept], weights[kept]
    if len(entries) > max_terms:
        kept = np.sort(np.lexsort((entries, -weights))[:max_terms])
        entries, weights = entries[kept], weights[kept]
    return entries, weights


def _num_texts(raw: RawOutputs) -> int:
    if raw.dense is not None:
        return len(raw.dense)
    counts = raw.sparse.counts if raw.sparse is not None else raw.tokens.counts if raw.tokens is not None else ()
    return len(counts)


def _vectors(tokens: TokenRows, chosen: Sequence[int]) -> list[Row]:
    """Returns the vectors of the tokens of each chosen text, `[count, W]`."""
    vectors = tokens.vectors.float().cpu().numpy()
    ends = np.cumsum(tokens.counts)
    return [vectors[ends[index] - tokens.counts[index] : ends[index]] for index in chosen]


def _joined(dense: Row, terms: tuple[Row, Row], vectors: Row) -> tuple[Row, bool]:
    """Returns a row, and whether all of its numbers are finite."""
    entries, weights = terms
    head = np.array([len(entries), len(vectors) if vectors.ndim > 1 else 0], np.int32)
    floats = [np.ascontiguousarray(part, dtype="<f4").reshape(-1) for part in (dense, weights, vectors)]
    is_finite = all(bool(np.isfinite(part).all()) for part in floats)
    dense, weights, vectors = (part.view(np.int32) for part in floats)
    return np.concatenate([head, dense, entries.astype(np.int32, copy=False), weights, vectors]), is_finite


@cache
def kind_of_outputs(wanted: Wanted) -> type[MixedOutput]:
    """Returns the kind of output that gives what is wanted."""
    kind = msgspec.defstruct("MixedOutputKind", (), bases=(MixedOutput,), namespace={"wanted": wanted}, frozen=True)
    return cast("type[MixedOutput]", kind)


@register_output(OutputsCall)
def _mixed_output(call: OutputsCall, info: ModelInfo, defaults: OutputDefaults) -> MixedOutput:
    """Returns the outputs of a call.

    Raises:
        TaskNotSupported: naming what the model gives.
        DimensionsNotSupported: see `dense_output`.
        InvalidValue: outputs that exclude each other.
    """
    if info.task != "embed":
        raise TaskNotSupported(f"{call.model_id} can {info.task}, not embed", param="model")
    _check_outputs(call, info, defaults)
    asked = {*call.outputs}
    wanted = Wanted(
        dense="dense" in asked,
        sparse="sparse" in asked,
        multi_vector="multi_vector" in asked,
        states="tokens" in asked,
        side=side_of(call, defaults.side),
    )
    if wanted.is_dense_only:
        wanted = Wanted(dense=True)  # the same for both sides
    vector_width = info.vector_width if wanted.multi_vector else defaults.states_width if wanted.states else 0
    return kind_of_outputs(wanted)(
        dense_output(call, info, defaults) if wanted.dense else None,
        vector_width,
        min(call.sparse_top_k or MAX_TERMS, info.vocab_size, MAX_TERMS) if wanted.sparse else 0,
        call.sparse_min_weight,
        _poolings(call, defaults, wanted) if wanted.multi_vector else (),
    )


def _poolings(call: OutputsCall, defaults: OutputDefaults, wanted: Wanted) -> tuple[TokenPooling, ...]:
    """Returns how vectors of tokens are merged: as the model's own module does, then as the call asks, which concerns
    documents (as `MultiVectorEncoder.encode` does both)."""
    own = () if defaults.pooling is None or wanted.side not in defaults.pooled_on else (defaults.pooling,)
    asked = call.pool_factor > 1 and wanted.side == "document"
    return (*own, TokenPooling(factor=call.pool_factor)) if asked else own


def _check_outputs(call: OutputsCall, info: ModelInfo, defaults: OutputDefaults) -> None:
    if not call.outputs or len({*call.outputs}) < len(call.outputs) or {"tokens", "multi_vector"} <= {*call.outputs}:
        raise InvalidValue(
            f"outputs is {', '.join(call.outputs) or 'empty'}: name one or more, none twice, and tokens without "
            "multi_vector",
            param="outputs",
        )
    given = [*info.outputs, *(["tokens"] if defaults.states_width else [])]
    for name in call.outputs:
        if name not in given:
            raise TaskNotSupported(
                f"{call.model_id} gives {', '.join(given)}; it has no {name} output", param="outputs"
            )
    if call.names_terms and not defaults.has_term_names:
        raise InvalidValue(
            f"the entries of {call.model_id}'s sparse outputs are no tokens: omit return_tokens", param="return_tokens"
        )
    if call.pool_factor < 1 or (call.pool_factor > 1 and "multi_vector" not in call.outputs):
        raise InvalidValue(
            f"pool_factor is {call.pool_factor}: it merges the vectors of multi_vector outputs and is 1 or more",
            param="pool_factor",
        )
