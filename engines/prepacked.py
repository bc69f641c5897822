"""Whole passes through ONNX Runtime, which holds second copies of the weights in the order in which it reads them.

A product of few rows is bound by reading the weights. torch's library puts them in order anew in every call; here that
happens once, when the model loads. All layers are one call besides, where torch, transformers and Python take hundreds,
and threads share a product of a dozen rows well, which torch's do not. The copies are paid for: models above
`LARGEST_COPY` have none.
"""

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from engines.layout import Layout
from engines.onnx_graph import SLOW_JOINS, Shape, Weights, encoder_graph

LARGEST_COPY = 192 * 2**20
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


def suits(layout: Layout) -> bool:
    """Whether the texts of a row are short, and alike in length."""
    are_alike = layout.longest * len(layout.lengths) <= _PLACES * layout.num_tokens
    return layout.longest <= _LONGEST and are_alike


def layers_at_once(layout: Layout) -> int:
    """How many layers of a row should be one call."""
    return max(1, _TOKEN_LAYERS // layout.num_tokens)


def inputs_of(ids: Tensor, positions: Tensor, layout: Layout) -> Inputs:
    """What all calls of a pass are handed. `ids`, `positions`: of a packed row, `[T]`."""
    spread, lengths, picked = layout.places
    row = {"ids": ids.numpy(), "positions": positions.numpy()}
    return row | {"spread": spread, "lengths": lengths, "picked": picked}


class PrepackedEncoder:
    """A post-norm encoder.

    Args:
        tables: embeddings of words and places, `[*, H]`.
        weights: float32 on the CPU, as `engines.onnx_graph.encoder_graph` names them; they neither change nor go.
        num_threads: the caller's, and others of its own.

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
