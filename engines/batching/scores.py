"""Scores of pairs and texts: the output of a `ScoreCall`, and its inputs."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Unpack

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.batching.output import OutputDefaults, TensorOutput, register_output
from engines.batching.request import MAX_FRAME_CHARS
from engines.errors import EngineError, InvalidValue, NonFiniteEmbedding, TaskNotSupported, UnsupportedModel
from engines.inputs.pairs import Cut, PairReading, PairTokenizer
from engines.inputs.tokenizer import Ids
from engines.models.base import Encoder
from engines.spec import ModelSpec, Task
from engines.types import ModelInfo, ResultDetails, ScoreCall, Scores

_MAX_TOKENS_PER_CHAR = 4
"""Bytes of a character, each of which may be a token."""


class Scoring(Struct, frozen=True, kw_only=True):
    """What a loader found out about a model that scores.

    Args:
        pairs: reads its inputs.
        task: `rerank` or `classify`.
        labels: names of the scores.
        is_multi_label: whether they do not exclude each other.
        activation: what sentence-transformers applies to the logits, a class of torch.nn (`activation_named`).
    """

    pairs: PairTokenizer
    task: Task
    labels: tuple[str, ...]
    is_multi_label: bool
    activation: str


@cache
def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """Returns an activation over logits `[n, labels]` by its class name in torch.nn.

    Raises:
        UnsupportedModel: there is no such class, or none that needs no arguments.
    """
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModel(f"torch.nn has no activation {name!r}; fetch the model again")
    try:
        return kind(dim=1) if name in ("Softmax", "LogSoftmax", "Softmin") else kind()
    except TypeError as error:
        raise UnsupportedModel(
            f"the activation {name} needs arguments, which the model's files do not state"
        ) from error


class ScoreOutput(TensorOutput, frozen=True):
    """One score for each label, float32, answered by `Scores`. Raw outputs are the encoder's logits, `[n, labels]`.

    The cache keeps logits, so that every activation is served from it.
    """

    labels: tuple[str, ...]
    activation: str

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> Tensor:
        """See `OutputSpec`."""
        return encoder(texts)

    def allocate(self, num_items: int) -> NDArray[np.float32]:
        """See `OutputSpec`; `[num_items, labels]`."""
        return np.empty((num_items, len(self.labels)), dtype=np.float32)

    def pack(self, allocated: NDArray[np.float32], **details: Unpack[ResultDetails]) -> Scores:
        """See `OutputSpec`."""
        return Scores(values=allocated.tobytes(), num_labels=len(self.labels), labels=self.labels, **details)

    def not_finite(self, index: int) -> EngineError:
        """See `OutputSpec`."""
        return NonFiniteEmbedding(
            f"the score of input[{index}] is not finite: the model's dtype overflows on this text. Serve the model "
            "with `dtype: float32` or `bfloat16`",
            index=index,
        )

    def transform(self, raw: Tensor) -> Tensor:
        """See `TensorOutput`: the activation's scores."""
        with torch.inference_mode():
            return activation_named(self.activation)(raw.float())


@register_output(ScoreCall)
def _score_output(call: ScoreCall, info: ModelInfo, defaults: OutputDefaults) -> ScoreOutput:
    """Returns the names of the scores and their activation.

    Raises:
        TaskNotSupported: the model gives vectors.
    """
    if info.task == "embed":
        raise TaskNotSupported(f"{call.model_id} can embed, not score", param="model")
    independent = info.is_multi_label or len(info.labels) == 1
    names = {"none": "Identity", "probabilities": "Sigmoid" if independent else "Softmax"}
    return ScoreOutput(info.labels, names.get(call.activation, defaults.activation))


def read_scored(call: ScoreCall, pairs: PairTokenizer, spec: ModelSpec) -> PairReading:
    """Returns the inputs of a call ready for tokenization.

    A call that names a side has documents cut there, and queries left whole. Else the model's own files and the
    registry decide: the longer text of a pair is cut, as sentence-transformers does, and of a template the document.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    if call.queries and len(call.queries) not in (1, len(call.texts)):
        raise InvalidValue(
            f"there are {len(call.queries)} queries for {len(call.texts)} texts: send one for all of them, or one for "
            "each",
            param="query",
        )
    _check_repeated(call, pairs.max_tokens)
    own = pairs.own_cut(call.truncate or spec.truncate)
    only_text = own.only_text or (call.truncate is not None and bool(call.queries))
    cut = Cut(own.side, only_text, call.max_text_tokens)
    return pairs.read(call.queries, call.texts, cut, instruction=call.instruction)


def _check_repeated(call: ScoreCall, max_tokens: int) -> None:
    """Bounds what a call repeats: its instruction in front of each query, and a query that is read with each document.

    Raises:
        InvalidValue: a small request would take much memory.
    """
    instruction = len(call.instruction or "")
    num_chars = instruction * max(len(call.queries), 1)
    if num_chars > MAX_FRAME_CHARS:
        raise InvalidValue(
            f"instruction puts {num_chars} characters in front of {len(call.queries)} queries, and a request may have "
            f"{MAX_FRAME_CHARS}; shorten it, or send fewer queries",
            param="instruction",
        )
    if len(call.queries) != 1:
        return
    num_chars = instruction + len(call.queries[0])
    num_tokens = min(_MAX_TOKENS_PER_CHAR * num_chars, max_tokens) * len(call.texts)
    if num_tokens > MAX_FRAME_CHARS:
        raise InvalidValue(
            f"query is read with each of {len(call.texts)} documents, as up to {num_tokens} tokens, and a request may "
            f"have {MAX_FRAME_CHARS}; shorten it, or send fewer documents",
            param="query",
        )
