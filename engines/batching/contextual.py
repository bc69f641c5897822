"""Vectors of the pieces of documents, each in the context of its document (late chunking): output and inputs of a call.

An input of the queue is a window of a document (`engines/inputs/documents.py`), whose ids carry the pieces. Windows of
equal tokens and pieces are computed once, and cached as one row `[pieces, D]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Unpack, runtime_checkable

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from engines.batching.output import DenseOutput, FinishedRows, OutputDefaults, Rows, output_spec, register_output
from engines.batching.request import choose_frame
from engines.errors import EngineError, InvalidValue, NonFiniteEmbedding, TaskNotSupported
from engines.inputs.documents import MARK_SHIFT, DocumentReading
from engines.inputs.token_ids import ID_MASK
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.models.base import Encoder
from engines.space import VectorForm
from engines.spec import ModelSpec
from engines.types import ContextualCall, EmbedCall, Embeddings, ModelInfo, ResultDetails


@runtime_checkable
class PiecesEncoder(Protocol):
    """An encoder that gives a vector for each of several pieces of a text."""

    def encode_pieces(self, texts: Sequence[Ids], marks: Sequence[Ids]) -> Tensor:
        """Runs one pass over texts, sorted by length, and pools the pieces.

        Args:
            marks: the number of the piece, from 1, that each token of a text belongs to; 0 for none. They rise.

        Returns:
            Vectors of all pieces, float32 `[sum of pieces, D]`, text after text.

        Raises:
            ForwardPathFailed: run the texts again.
        """


class RawPieces(NamedTuple):
    """Vectors of the pieces of several windows, window after window, float32 `[sum(counts), D]`, on the device."""

    counts: list[int]
    vectors: Tensor


class ContextualOutput(DenseOutput, frozen=True):
    """One float32 vector for each piece of each window, answered by `Embeddings`. A row is `[pieces, width]`."""

    @classmethod
    def encode(  # type: ignore[override]  # raw outputs are the kind's own affair
        cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None
    ) -> RawPieces:
        """See `OutputSpec`."""
        assert isinstance(encoder, PiecesEncoder), "the maker of the spec has checked that the model pools by the mean"
        marks = [ids >> MARK_SHIFT for ids in texts]
        vectors = encoder.encode_pieces([ids & ID_MASK for ids in texts], marks)
        return RawPieces([int(each.max()) for each in marks], vectors)

    @classmethod
    def cache_rows(cls, raw: RawPieces) -> FinishedRows:  # type: ignore[override]  # as above
        """See `OutputSpec`: the vectors as the model's modules leave them."""
        return _split(raw.vectors, raw.counts)

    def finish(self, raw: RawPieces, indexes: Sequence[int] | None) -> FinishedRows:  # type: ignore[override]  # as above
        """See `OutputSpec`."""
        found = _split(self.transform(raw.vectors), raw.counts)
        if indexes is None:
            return found
        return FinishedRows([found.rows[index] for index in indexes], found.is_finite[np.array(indexes)])

    def finish_cached(self, rows: Rows) -> Rows:  # type: ignore[override]  # as above
        """See `OutputSpec`."""
        return [self.transform(torch.from_numpy(np.asarray(row))).numpy() for row in rows]

    def space_form(self) -> VectorForm:
        """See `OutputSpec`: a piece has another vector in the context of its document than alone."""
        return structs.replace(DenseOutput.space_form(self), output="dense in the context of its document")

    def allocate(self, num_items: int) -> Any:
        """See `OutputSpec`; a list of `num_items` rows."""
        return [None] * num_items

    def pack(self, allocated: Any, **details: Unpack[ResultDetails]) -> Embeddings:
        """See `OutputSpec`. Windows give the vectors of their pieces in the order of these."""
        vectors = b"".join(row.tobytes() for row in allocated)
        return Embeddings(vectors=vectors, dimensions=self.dimensions, **details)

    def not_finite(self, index: int) -> EngineError:
        """See `OutputSpec`."""
        return NonFiniteEmbedding(
            f"a vector of window {index} of the documents is not finite: the model's dtype overflows on it. Serve the "
            "model with `dtype: float32` or `bfloat16`",
            index=index,
        )


def _split(vectors: Tensor, counts: Sequence[int]) -> FinishedRows:
    array: NDArray[np.float32] = vectors.cpu().numpy()
    rows = np.split(array, np.cumsum(counts)[:-1])
    return FinishedRows(rows, np.array([np.isfinite(row).all() for row in rows]))


@register_output(ContextualCall)
def _contextual_output(call: ContextualCall, info: ModelInfo, defaults: OutputDefaults) -> ContextualOutput:
    """Returns the width and length of the vectors.

    Raises:
        TaskNotSupported: the model gives scores, or does not pool by the mean of all tokens.
        DimensionsNotSupported: as for `EmbedCall`.
    """
    wanted = EmbedCall(model_id=call.model_id, dimensions=call.dimensions, normalize=call.normalize)
    dense = output_spec(wanted, info, defaults)
    assert isinstance(dense, DenseOutput), "the spec of an `EmbedCall`"
    if info.pooling != ("mean",):
        how = f"pools by {' and '.join(info.pooling)}" if info.pooling else "has no context to read them in"
        raise TaskNotSupported(
            f"{call.model_id} cannot embed the pieces of a document together: that takes the mean of each piece's "
            f"tokens, and this model {how}",
            param="late_chunking",
        )
    return ContextualOutput(**structs.asdict(dense))


def read_documents(
    call: ContextualCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]
) -> DocumentReading:
    """Returns the documents of a call ready for tokenization.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    if call.token_ids:
        raise InvalidValue("pieces of a document are sent as texts, not as token ids", param="input")
    tokenizer, frame, truncate = choose_frame(call, tokenizer, spec, prompts)
    return DocumentReading(tokenizer, call.texts, call.pieces, frame, truncate)
