"""Defines what a request gets for each of its inputs. `OutputSpec` is the one place that knows a kind of output.

The queue, the batches, the runner and the cache handle every kind through `OutputSpec`. A new kind is a subclass of it,
a call and a result in `engines/types.py`, and a function registered with `register_output` that makes its spec from a
call.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, Unpack

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import DimensionsNotSupported, EngineError, NonFiniteEmbedding, TaskNotSupported
from engines.inputs.tokenizer import Ids
from engines.layers.packing import to_device
from engines.layers.pooling import truncate_and_normalize
from engines.layers.token_pooling import TokenPooling
from engines.models.base import Encoder
from engines.models.outputs import Side
from engines.space import VectorForm
from engines.types import BaseCall, EmbedCall, Embeddings, ModelInfo, OutputsCall, Result, ResultDetails

Row = NDArray[Any]
"""The output for one input, in main memory; its shape and dtype are the output kind's own."""

Rows = Sequence[Row] | NDArray[Any]
"""Rows of several inputs; one array where all have the same shape."""


class FinishedRows(NamedTuple):
    """Rows in main memory, in order, and for each whether all of its numbers are finite."""

    rows: Rows
    is_finite: NDArray[np.bool_]


class OutputSpec(Struct, frozen=True):
    """What a request wants of each input. Inputs with equal specs are finished together.

    A kind of output is a subclass. Its class methods are the same for all requests of the kind, which share forward
    passes, duplicates and cached rows; requests of different kinds share none of these. "Raw" outputs are what `encode`
    returns; no other module looks into them.

    Attributes:
        is_cached: whether the cache keeps rows of this kind.
    """

    is_cached: ClassVar[bool] = True

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> Any:
        """Runs one forward pass, with the head of this kind; returns the raw outputs of `texts`, on the device.

        Raises:
            ForwardPathFailed: run the texts again.
        """
        raise NotImplementedError

    @classmethod
    def cache_rows(cls, raw: Any) -> FinishedRows:
        """Returns what the cache keeps of each text of a batch: enough for every spec of this kind."""
        raise NotImplementedError

    def finish(self, raw: Any, indexes: Sequence[int] | None) -> FinishedRows:
        """Returns the rows of the texts at `indexes` of a batch (None: all of them), as this request wants them."""
        raise NotImplementedError

    def finish_inputs(self, raw: Any, indexes: Sequence[int] | None, inputs: Sequence[int]) -> FinishedRows:
        """Returns the same, where a row also depends on the input of the request that it is for, of `inputs`."""
        return self.finish(raw, indexes)

    def finish_cached(self, rows: Rows) -> Rows:
        """Returns rows as this request wants them, from what `cache_rows` returned for them earlier."""
        raise NotImplementedError

    def check_size(self, token_counts: Sequence[int]) -> None:
        """Checks, before any work is done for a request, that its answer is not too large.

        Raises:
            InvalidValue: it is.
        """

    def allocate(self, num_items: int) -> Any:
        """Returns a place for `num_items` rows: `allocated[index] = row` must store one."""
        raise NotImplementedError

    def remaining_steps(self, allocated: Any) -> Sequence[Callable[[], None]]:
        """Returns what is to be done with all rows before `pack`, in steps; each runs on a thread, and takes long."""
        return ()

    def is_large(self, allocated: Any) -> bool:
        """Tells whether `pack` takes so long that it must not run on the event loop."""
        return False

    def pack(self, allocated: Any, **details: Unpack[ResultDetails]) -> Result:
        """Returns the result, once all rows are stored in what `allocate` returned."""
        raise NotImplementedError

    def not_finite(self, index: int) -> EngineError:
        """Returns the error of a request whose row `index` is not finite."""
        raise NotImplementedError

    def space_form(self) -> VectorForm | None:
        """Returns its part of the name of its vectors' space: width, length and kind. None: it has no space."""
        return None


class TensorOutput(OutputSpec, frozen=True):
    """Base of kinds that have one float32 row of a fixed width for each input. Raw outputs are one tensor `[n, K]`.

    A subclass defines `transform`. The cache keeps raw rows, so that every request is served from them.
    """

    @classmethod
    def cache_rows(cls, raw: Tensor) -> FinishedRows:
        """See `OutputSpec`."""
        return _finished(raw)

    def finish(self, raw: Tensor, indexes: Sequence[int] | None) -> FinishedRows:
        """See `OutputSpec`. Copying the rows to main memory is the one moment at which a GPU is waited for."""
        if indexes is not None:
            raw = raw[to_device(np.array(indexes, dtype=np.int64), raw.device)]  # a list is copied while the host waits
        return _finished(self.transform(raw))

    def finish_cached(self, rows: Rows) -> NDArray[np.float32]:
        """See `OutputSpec`."""
        found: NDArray[np.float32] = self.transform(torch.from_numpy(np.stack(list(rows)))).numpy()
        return found

    def transform(self, raw: Tensor) -> Tensor:
        """Returns raw rows `[n, K]` as this request wants them, float32 `[n, width]`."""
        raise NotImplementedError


class DenseOutput(TensorOutput, frozen=True):
    """One float32 vector for each input, answered by `Embeddings`. Raw outputs are the encoder's vectors, `[n, D]`.

    The cache keeps the encoder's own vector, so that every width and quantisation is served from it.
    """

    dimensions: int
    normalized: bool
    pre_norm: bool

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> Tensor:
        """See `OutputSpec`."""
        return encoder(texts, prompt_tokens)

    def allocate(self, num_items: int) -> NDArray[np.float32]:
        """See `OutputSpec`; `[num_items, dimensions]`."""
        return np.empty((num_items, self.dimensions), dtype=np.float32)

    def pack(self, allocated: NDArray[np.float32], **details: Unpack[ResultDetails]) -> Embeddings:
        """See `OutputSpec`."""
        return Embeddings(vectors=allocated.tobytes(), dimensions=self.dimensions, **details)

    def not_finite(self, index: int) -> EngineError:
        """See `OutputSpec`."""
        return NonFiniteEmbedding(
            f"the vector of input[{index}] is not finite: the model's dtype overflows on this text. Serve the model "
            "with `dtype: float32` or `bfloat16`",
            index=index,
        )

    def space_form(self) -> VectorForm:
        """See `OutputSpec`."""
        return VectorForm(
            width=self.dimensions,
            native_width=self.dimensions,
            is_normalized=self.normalized,
            has_layer_norm=self.pre_norm,
        )

    def transform(self, raw: Tensor) -> Tensor:
        """See `TensorOutput`: cut to the width, and normalized."""
        return truncate_and_normalize(
            raw, dimensions=self.dimensions, normalized=self.normalized, pre_norm=self.pre_norm
        )


def _finished(vectors: Tensor) -> FinishedRows:
    rows = vectors.cpu().numpy()
    return FinishedRows(rows, np.isfinite(rows).all(axis=-1))


class OutputDefaults(Struct, frozen=True):
    """What a call that leaves it open gets: the registry's and the server's settings for the model.

    Args:
        normalize: whether vectors are brought to length one.
        target_dim: width of vectors, where the model allows it; None is the model's own.
        activation: of scores, as the model's files state it (`engines.batching.scores.activation_named`).
        states_width: of the hidden states of tokens; 0 where the model gives none.
        side: of texts whose call names none.
        pooling: how the model merges vectors of tokens, on the sides `pooled_on`; None for none.
        has_term_names: whether the entries of sparse outputs are tokens.
    """

    normalize: bool = True
    target_dim: int | None = None
    activation: str = "Identity"
    states_width: int = 0
    side: Side = "document"
    pooling: TokenPooling | None = None
    pooled_on: tuple[Side, ...] = ()
    has_term_names: bool = True


OutputMaker = Callable[[Any, ModelInfo, OutputDefaults], OutputSpec]
Maker = TypeVar("Maker", bound=OutputMaker)

_MAKERS: dict[type[BaseCall], OutputMaker] = {}


def register_output(call_type: type[BaseCall]) -> Callable[[Maker], Maker]:
    """Registers a function that makes the spec of calls of one type. (`functools.singledispatch` takes 1 µs a call.)"""

    def register(maker: Maker) -> Maker:
        _MAKERS[call_type] = maker
        return maker

    return register


def output_spec(call: BaseCall, info: ModelInfo, defaults: OutputDefaults) -> OutputSpec:
    """Returns what a call asks of a model.

    Raises:
        InvalidRequest: the model does not give this.
    """
    maker = _MAKERS.get(type(call))
    if maker is None:
        raise NotImplementedError(f"no output is registered for {type(call).__name__}")
    return maker(call, info, defaults)


@register_output(EmbedCall)
def dense_output(call: EmbedCall | OutputsCall, info: ModelInfo, defaults: OutputDefaults) -> DenseOutput:
    """Returns the width and length of the vectors.

    Raises:
        DimensionsNotSupported: naming the widths that the model gives.
        TaskNotSupported: the model gives scores, or other outputs only.
    """
    if info.task != "embed":
        raise TaskNotSupported(f"{call.model_id} can {info.task}, not embed", param="model")
    if "dense" not in info.outputs:
        given = " and ".join(info.outputs)
        raise TaskNotSupported(f"{call.model_id} gives {given} outputs, no dense vectors", param="model")
    native, allowed = info.dimensions, info.matryoshka
    width = call.dimensions
    if width is None:
        target_dim = defaults.target_dim
        width = target_dim if target_dim is not None and target_dim <= native else native
        width = width if allowed.allows(width, native) else native
    elif not allowed.allows(width, native):
        raise DimensionsNotSupported(
            f"dimensions is {width}, but {call.model_id} gives {allowed.describe(native)}", param="dimensions"
        )
    return DenseOutput(width, defaults.normalize if call.normalize is None else call.normalize, allowed.layer_norm)
