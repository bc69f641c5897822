"""Whether a model's weights can be held a second time in the order in which products read them, and the copies.

A pass from copies does not go through the model's own code at all: embeddings and layers are one graph
(`engines/prepacked.py`). So whatever a model does besides would be left out. That there is nothing besides is read off
its parts, as `engines/fused.py` does; as every path, this one serves only when `engines/selfcheck.py` finds the
reference's vectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from engines.adapters import Form
from engines.breaks import end_part
from engines.cores import usable
from engines.fused import FusedLayer
from engines.layout import Layout
from engines.onnx_graph import Shape
from engines.prepacked import MOST_THREADS, PrepackedEncoder, inputs_of, layers_at_once, suits

_MODELS = ({"embeddings", "encoder"}, {"embeddings", "transformer"})
"""What a model is made of, as BERT and as DistilBERT call it."""

_OWN = "transformers.models."
"""Where the library's own models are; code that comes with a model may do more than its parts tell."""

_TABLES = ("word_embeddings", "position_embeddings")
_KINDS, _NORM = "token_type_embeddings", "LayerNorm"
_EMBEDDINGS = (*_TABLES, _KINDS, _NORM)
"""What its embeddings are made of; not all have kinds of tokens, of which all of ours are the first."""


class Copies:
    """The copies of one model, by the form of a pass that reads them.

    Args:
        model: with its layers.
        layers: these, fused; none where they could not be.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FusedLayer]) -> None:
        self._layers = layers
        self._embeddings = _parts_of_embeddings(model)
        self._encoders: dict[Form, PrepackedEncoder] = {}

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
        forms: list[tuple[Form, int]] = [("prepacked", 1)] if num_threads else []
        if num_threads > 1:
            forms.append(("shared", min(num_threads, MOST_THREADS)))
        self._encoders = {}
        for form, threads in forms:
            self._encoders[form] = self._encoder(threads)
            end_part()

    def suit(self, layout: Layout, form: Form | None) -> bool:
        """Whether a pass of a row can be run from copies in this form; None: whether it is faster in one of them."""
        return form in self._encoders or (form is None and bool(self._encoders) and suits(layout))

    def __call__(
        self, ids: Tensor, positions: Tensor, layout: Layout, form: Form | None, pause: Callable[[], None]
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

    def _best_form(self) -> Form:
        shared = self._encoders.get("shared")
        return "shared" if shared is not None and shared.num_threads <= usable() else "prepacked"

    def _encoder(self, num_threads: int) -> PrepackedEncoder:
        words, places = (self._embeddings[name].weight for name in _TABLES)
        return PrepackedEncoder((words, places), self._weights(), self._shape(), len(self._layers), num_threads)

    def _weights(self) -> dict[str, Tensor]:
        """As `engines/onnx_graph.py` names them."""
        kinds, norm = self._embeddings.get(_KINDS), self._embeddings[_NORM]
        before: dict[str, Tensor] = {"g0": norm.weight, "e0": norm.bias}
        if kinds is not None:
            before["kind"] = kinds.weight[0]
        parts = enumerate(layer.parts.items() for layer in self._layers)
        return before | {f"{name}{index}": weight for index, items in parts for name, weight in items}

    def _shape(self) -> Shape:
        first = self._layers[0]
        return Shape(first.heads, first.head_width, first.operator, (self._embeddings[_NORM].eps, *first.eps))


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
