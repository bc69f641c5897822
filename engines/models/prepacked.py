"""Whole passes through ONNX Runtime, which holds second copies of the weights in the order in which it reads them.

A product of few rows is bound by reading the weights. torch's library puts them in order anew in every call; here that
happens once, when the model loads. All layers are one call besides, where torch, transformers and Python take hundreds,
and threads share a product of a dozen rows well, which torch's do not. The copies are paid for: models above
`MAX_PREPACKED_BYTES` have none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from engines.device.load_throttle import throttle_point
from engines.device.torch_runtime import usable_threads
from engines.layers.fused import FusedLayer
from engines.layers.packing import KernelVariant, PackedLayout
from engines.models.onnx_graph import SLOW_JOINS, Shape, Weights, encoder_graph

_MODELS = ({"embeddings", "encoder"}, {"embeddings", "transformer"})
"""What a model is made of, as BERT and as DistilBERT call it."""


_OWN = "transformers.models."
"""Where the library's own models are; code that comes with a model may do more than its parts tell."""


_TABLES = ("word_embeddings", "position_embeddings")


_KINDS, _NORM = "token_type_embeddings", "LayerNorm"


_EMBEDDINGS = (*_TABLES, _KINDS, _NORM)
"""What its embeddings are made of; not all have kinds of tokens, of which all of ours are the first."""


def _parts_of_embeddings(model: nn.Module) -> dict[str, Any]:
    """The parts of the model's embeddings that work; none where that is more than tables and their sum's norm, or
    where more than embeddings and layers works in the model."""
    parts = {name: part for name, part in model.named_children() if name != "pooler"}  # `drop_pooler` has seen to it
    if set(parts) not in _MODELS or not type(model).__module__.startswith(_OWN):
        return {}
    stacks = [type(child) for name, part in parts.items() if name != "embeddings" for child in part.children()]
    working: dict[str, Any] = {
        name: part for name, part in parts["embeddings"].named_children() if not isinstance(part, nn.Dropout)
    }
    kinds = {name: nn.LayerNorm if name == _NORM else nn.Embedding for name in _EMBEDDINGS}
    are_known = all(type(part) is kinds.get(name) for name, part in working.items())
    are_all = {*_EMBEDDINGS} - {*working} <= {_KINDS}
    return working if are_known and are_all and stacks == [nn.ModuleList] else {}


MAX_PREPACKED_BYTES = 192 * 2**20
"""Bytes of copies that are a good bargain: two of twelve layers 384 wide, not of twelve that are 768 wide."""


COPY_SHARE = 16
"""The part of a device's budget that the copies may take: where memory is short, it is for models."""


MOST_THREADS = 4
"""Threads that share a layer, at the most: a product of a dozen rows has no work for more."""


PART_TOKENS = 1
"""Of the smallest part that is worth a thread of its own: any text."""


_TOKEN_LAYERS = 512
"""Tokens × layers of one call. A thread that returns to Python waits for the interpreter's lock, which the event loop
has; but only between two calls a pass gives way to others."""


_LONGEST = 256
"""Tokens of a text: attention here is that of padded batches, and keeps the scores of all pairs."""


_PLACES = 1.5
"""Times the tokens: so many places may a padded batch have."""


_SWITCH = np.array(False), np.array(True)


Inputs = dict[str, NDArray[Any]]
"""Of a session, by name."""


onnxruntime.set_default_logger_severity(3)


def suits(layout: PackedLayout) -> bool:
    """Whether the texts of a row are short, and alike in length."""
    are_alike = layout.longest * len(layout.lengths) <= _PLACES * layout.num_tokens
    return layout.longest <= _LONGEST and are_alike


def layers_at_once(layout: PackedLayout) -> int:
    """How many layers of a row should be one call."""
    return max(1, _TOKEN_LAYERS // layout.num_tokens)


def inputs_of(ids: Tensor, positions: Tensor, layout: PackedLayout) -> Inputs:
    """What all calls of a pass are handed. `ids`, `positions`: of a packed row, `[T]`."""
    spread, lengths, picked = layout.places
    row = {"ids": ids.numpy(), "positions": positions.numpy()}
    return row | {"spread": spread, "lengths": lengths, "picked": picked}


class PrepackedEncoder:
    """A post-norm encoder.

    Args:
        tables: embeddings of words and places, `[*, H]`.
        weights: float32 on the CPU, as `engines.models.onnx_graph.encoder_graph` names them; they neither change nor
        go. num_threads: the caller's, and others of its own.

    Attributes:
        tables: where they were, for a session would copy them; each call is handed them.
    """

    def __init__(
        self, tables: tuple[Tensor, Tensor], weights: Weights, shape: Shape, num_layers: int, num_threads: int
    ) -> None:
        self.num_threads = num_threads
        words, places = (table.detach().numpy() for table in tables)
        self.tables = {"words": words, "places": places}
        self._switches = [f"runs{index}" for index in range(num_layers)]
        self._nothing = np.empty((0, shape.heads * shape.width), np.float32)
        self._session = _session(weights, shape, num_layers, num_threads)

    def __call__(self, row: Inputs, hidden: NDArray[np.float32] | None, layers: range) -> NDArray[np.float32]:
        """The hidden states of a row, `[T, H]`, that leave these layers; None goes into the first of all."""
        switches = {name: _SWITCH[index in layers] for index, name in enumerate(self._switches)}
        so_far = {"x": self._nothing if hidden is None else hidden, "begins": _SWITCH[hidden is None]}
        found: NDArray[np.float32] = self._session.run(None, self.tables | row | switches | so_far)[0]
        return found


class PrepackedWeights:
    """The copies of one model, by the form of a pass that reads them.

    Args:
        model: with its layers.
        layers: these, fused; none where they could not be.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FusedLayer]) -> None:
        self._layers = layers
        self._embeddings = _parts_of_embeddings(model)
        self._encoders: dict[KernelVariant, PrepackedEncoder] = {}

    def size_bytes(self, largest: int, num_threads: int) -> int:
        """Bytes of the copies for so many threads; 0 where there can be none, or it is more than `largest`."""
        if not self._layers or not self._embeddings or not all(layer.can_be_prepacked for layer in self._layers):
            return 0
        size = sum(layer.product_bytes for layer in self._layers) * (2 if num_threads > 1 else 1)
        return size if size <= largest else 0

    def make(self, num_threads: int) -> None:
        """Have them: one for passes on one thread, and one for passes that several share. With 0 they go."""
        if num_threads and self._encoders:
            return
        forms: list[tuple[KernelVariant, int]] = [("prepacked", 1)] if num_threads else []
        if num_threads > 1:
            forms.append(("shared", min(num_threads, MOST_THREADS)))
        self._encoders = {}
        for form, threads in forms:
            self._encoders[form] = self._encoder(threads)
            throttle_point()

    def supports(self, layout: PackedLayout, form: KernelVariant | None) -> bool:
        """Whether a pass of a row can be run from copies in this form; None: whether it is faster in one of them."""
        return form in self._encoders or (form is None and bool(self._encoders) and suits(layout))

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        form: KernelVariant | None,
        pause: Callable[[], None],
    ) -> Tensor:
        """A pass: a packed row, ids and positions `[T]`, to hidden states `[T, H]`.

        Args:
            form: None is, for each call, the one that suits the cores that this thread may use by then.
            pause: called before each of the calls that the pass is made of.
        """
        row, at_once = inputs_of(ids, positions, layout), layers_at_once(layout)
        hidden: NDArray[np.float32] | None = None
        for first in range(0, len(self._layers), at_once):
            pause()
            hidden = self._encoders[form or self._best_form()](row, hidden, range(first, first + at_once))
        return from_numpy(hidden)

    def _best_form(self) -> KernelVariant:
        shared = self._encoders.get("shared")
        return "shared" if shared is not None and shared.num_threads <= usable_threads() else "prepacked"

    def _encoder(self, num_threads: int) -> PrepackedEncoder:
        words, places = (self._embeddings[name].weight for name in _TABLES)
        return PrepackedEncoder((words, places), self._weights(), self._shape(), len(self._layers), num_threads)

    def _weights(self) -> dict[str, Tensor]:
        """As `engines/models/onnx_graph.py` names them."""
        kinds, norm = self._embeddings.get(_KINDS), self._embeddings[_NORM]
        before: dict[str, Tensor] = {"g0": norm.weight, "e0": norm.bias}
        if kinds is not None:
            before["kind"] = kinds.weight[0]
        parts = enumerate(layer.parts.items() for layer in self._layers)
        return before | {f"{name}{index}": weight for index, items in parts for name, weight in items}

    def _shape(self) -> Shape:
        first = self._layers[0]
        return Shape(first.heads, first.head_width, first.operator, (self._embeddings[_NORM].eps, *first.eps))


def _session(weights: Weights, shape: Shape, num_layers: int, num_threads: int) -> onnxruntime.InferenceSession:
    """The weights stay where they are; the copy in order is the session's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores between two calls
    options.enable_cpu_mem_arena = False  # it would keep the most that each session has ever needed
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.detach().numpy()) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    graph = encoder_graph(weights, shape, num_layers).SerializeToString()
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(graph, options, providers, disabled_optimizers=[*SLOW_JOINS])
