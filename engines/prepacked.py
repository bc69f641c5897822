"""Whole layers through ONNX Runtime, which holds second copies of the weights in the order in which it reads them.

A product of few rows is bound by reading the weights. torch's library puts them in order anew in every call; here that
happens once, when the model loads. All layers are one call besides, where torch and Python take thirty each, and
threads share a product of a dozen rows well, which torch's do not. The copies are paid for: models above `LARGEST_COPY`
have none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from msgspec import Struct
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor, from_numpy

from engines.layout import Layout

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

_LONGEST = 192
"""Tokens of a text: attention here is that of padded batches, and keeps the scores of all pairs."""

_PLACES = 1.5
"""Times the tokens: so many places may a padded batch have."""

_OPSET, _FORMAT = 17, 8
"""Versions of ONNX that every version of the runtime in use knows."""

_RUNTIME = "com.microsoft"
"""The domain of operators that only the runtime has: https://onnxruntime.ai/docs/reference/operators/ContribOperators"""

_SLOW = "SkipLayerNormFusion"
"""It makes one operator of a sum and its norm, which takes four times as long as both."""

_COMMON = {"", "spread", "lengths", "picked", "flat"}
"""What all layers take; every other name of a node is that of one layer."""

_SWITCH = np.array(False), np.array(True)

onnxruntime.set_default_logger_severity(3)


Weights = dict[str, Tensor]


class Shape(Struct, frozen=True):
    """Of a post-norm layer.

    Args:
        activation: the operator: `Gelu` or `Relu`.
        eps: of the norms, one after the other.
    """

    heads: int
    width: int
    activation: str
    eps: tuple[float, float]


def suits(layout: Layout) -> bool:
    """Whether the texts of a row are short, and alike in length."""
    are_alike = layout.longest * len(layout.lengths) <= _PLACES * layout.num_tokens
    return layout.longest <= _LONGEST and are_alike


def layers_at_once(layout: Layout) -> int:
    """How many layers of a row should be one call."""
    return max(1, _TOKEN_LAYERS // layout.num_tokens)


class PrepackedLayers:
    """Post-norm layers of one shape, one after the other.

    Args:
        layers: of each, its float32 weights on the CPU, which neither change nor go, in torch's shapes: `wq`, `bq`
            (query, key and value as one), `wc`, `bc` (context), `wu`, `bu` (up), `wd`, `bd` (down), `g1`, `e1`, `g2`,
            `e2` (scale and shift of the norms).
        num_threads: the caller's, and others of its own.
    """

    def __init__(self, layers: Sequence[Weights], shape: Shape, num_threads: int) -> None:
        self.num_layers, self.num_threads = len(layers), num_threads
        weights = {f"{name}{index}": weight for index, parts in enumerate(layers) for name, weight in parts.items()}
        self._session = _session(weights, _model(weights, shape, len(layers)), num_threads)

    def __call__(self, x: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        """A packed row `[T, H]` to what leaves the layer `last`, `[T, H]`, when it goes into the layer `first`."""
        spread, lengths, picked = layout.places
        given = {"x0": x.numpy(), "spread": spread, "lengths": lengths, "picked": picked}
        switches = {f"runs{index}": _SWITCH[first <= index <= last] for index in range(self.num_layers)}
        result: NDArray[np.float32] = self._session.run(None, given | switches)[0]
        return from_numpy(result)


def _session(weights: Weights, model: ModelProto, num_threads: int) -> onnxruntime.InferenceSession:
    """The weights stay where they are; the copy in order is the session's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores between two calls
    options.enable_cpu_mem_arena = False  # it would keep the most that each session has ever needed
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.detach().numpy()) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers, disabled_optimizers=[_SLOW])


def _model(weights: Weights, shape: Shape, num_layers: int) -> ModelProto:
    width = shape.heads * shape.width
    switches = [f"runs{index}" for index in range(num_layers)]
    inputs = [
        _value("x0", TensorProto.FLOAT, "T", width),
        _value("spread", TensorProto.INT64, "texts", "longest"),
        _value("lengths", TensorProto.INT32, "texts"),
        _value("picked", TensorProto.INT64, "T"),
        *(_value(name, TensorProto.BOOL) for name in switches),
    ]
    output = _value(f"x{num_layers}", TensorProto.FLOAT, "T", width)
    nodes = [_layer(shape, index, switch) for index, switch in enumerate(switches)]
    constants = [*_elsewhere(weights), helper.make_tensor("flat", TensorProto.INT64, [2], [-1, width])]
    graph = helper.make_graph(nodes, "layers", inputs, [output], constants)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_RUNTIME, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_FORMAT)


def _layer(shape: Shape, index: int, switch: str) -> NodeProto:
    """`x` to the next layer's `x`; the same `x` where the switch is off, so that any layers can be one call."""
    names = {"x": f"x{index}", "y": f"y{index}", "same": f"same{index}"}
    nodes = [*_attention(shape), *_block(shape)]
    for node in nodes:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name if name in _COMMON else f"{name}{index}") for name in ends]
    whole = [_value(names[end], TensorProto.FLOAT, "T", shape.heads * shape.width) for end in ("y", "same")]
    skip = [helper.make_node("Identity", [names["x"]], [names["same"]])]
    return helper.make_node(
        "If", [switch], [f"x{index + 1}"],
        then_branch=helper.make_graph(nodes, f"layer{index}", [], whole[:1]),
        else_branch=helper.make_graph(skip, f"skip{index}", [], whole[1:]),
    )  # fmt: skip


def _attention(shape: Shape) -> list[NodeProto]:
    """`x` to `context`: queries, keys and values are spread to a padded batch, and what they find is gathered."""
    options: dict[str, Any] = {"num_heads": shape.heads, "scale": shape.width**-0.5, "domain": _RUNTIME}
    return [
        _product("x", "joined", "q"),
        helper.make_node("Gather", ["joined", "spread"], ["padded"]),
        helper.make_node("Split", ["padded"], ["query", "key", "value"], axis=-1),
        helper.make_node("MultiHeadAttention", ["query", "key", "value", "", "lengths"], ["found"], **options),
        helper.make_node("Reshape", ["found", "flat"], ["places"]),
        helper.make_node("Gather", ["places", "picked"], ["context"]),
    ]


def _block(shape: Shape) -> list[NodeProto]:
    """`x` and `context` to `y`: projection, sum and norm, then the same around two products and the activation."""
    domain = _RUNTIME if shape.activation == "Gelu" else ""
    return [
        _product("context", "attended", "c"),
        *_sum_and_norm("attended", "x", "inner", "1", shape.eps[0]),
        _product("inner", "wide", "u"),
        helper.make_node(shape.activation, ["wide"], ["active"], domain=domain),
        _product("active", "out", "d"),
        *_sum_and_norm("out", "inner", "y", "2", shape.eps[1]),
    ]


def _value(name: str, kind: int, *sizes: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, sizes)


def _product(source: str, target: str, part: str) -> NodeProto:
    return helper.make_node("Gemm", [source, f"w{part}", f"b{part}"], [target], transB=1)


def _sum_and_norm(a: str, b: str, target: str, part: str, eps: float) -> list[NodeProto]:
    total, inputs = f"total{part}", [f"total{part}", f"g{part}", f"e{part}"]
    return [
        helper.make_node("Add", [a, b], [total]),
        helper.make_node("LayerNormalization", inputs, [target], axis=-1, epsilon=eps),
    ]


def _elsewhere(weights: Weights) -> list[TensorProto]:
    """Names and shapes; the session is handed the numbers."""
    return [
        TensorProto(
            name=name,
            dims=weight.shape,
            data_type=TensorProto.FLOAT,
            data_location=TensorProto.EXTERNAL,
            external_data=[{"key": "location", "value": name}],
        )
        for name, weight in weights.items()
    ]
