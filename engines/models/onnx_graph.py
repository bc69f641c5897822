"""Builds a post-norm encoder (BERT-like) as an ONNX graph from ids to hidden states; one call runs any of its layers.

The graph holds the names and shapes of the weights; their values are passed to the session that runs it.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

_OPSET, _FORMAT = 17, 8
"""The ONNX operator set and format, which every supported version of the runtime knows."""

_RUNTIME = "com.microsoft"
"""The domain of the runtime's own operators: https://onnxruntime.ai/docs/reference/operators/ContribOperators"""

SLOW_FUSIONS = ("SkipLayerNormFusion",)
"""Optimizers that must be off: this one fuses a sum and its norm to one operator, four times as slow as the two."""

_SHARED = {"", "spread", "lengths", "picked", "flat"}
"""Names of inputs that all layers share; every other name belongs to one layer."""

Weights = Mapping[str, Tensor]


class Shape(Struct, frozen=True):
    """The shape of an encoder.

    Args:
        heads: attention heads of a layer.
        width: of one head.
        activation: the operator, `Gelu` or `Relu`.
        eps: the epsilons of the norms: after the embeddings, and the first and the second of each layer.
    """

    heads: int
    width: int
    activation: str
    eps: tuple[float, float, float]


def encoder_graph(weights: Weights, shape: Shape, num_layers: int) -> ModelProto:
    """Builds the graph.

    Inputs: `ids`, `positions` `[T]` and the tables of both (`words`, `places`: inputs, because a session would copy
    weights), or, where `begins` is false, `x` `[T, H]`, the hidden states so far; the places of the texts
    (`spread`, `lengths`, `picked`: `engines.layers.packing.PackedLayout.padded_places`); and for each layer, whether it
    `runs`. Output: hidden states `[T, H]`.

    Args:
        weights: in torch's shapes. The row that is added to each embedding (`kind`, if there is one), or the table that
            has one for each token type (`kinds`; then the types `[T]` are an input, `types`), and scale and shift of
            their norm (`g0`, `e0`). Of the layer `i`: `wq{i}`, `bq{i}` (query, key and value as one), `wc{i}`,
            `bc{i}` (context), `wu{i}`, `bu{i}` (up), `wd{i}`, `bd{i}` (down), and of its norms `g1{i}`, `e1{i}`,
            `g2{i}`, `e2{i}`.
    """
    width = shape.heads * shape.width
    switches = [f"runs{index}" for index in range(num_layers)]
    inputs = [
        _value("ids", TensorProto.INT64, "tokens"),
        _value("positions", TensorProto.INT64, "tokens"),
        *([_value("types", TensorProto.INT64, "tokens")] if "kinds" in weights else []),
        *(_value(table, TensorProto.FLOAT, table, width) for table in ("words", "places")),
        _value("x", TensorProto.FLOAT, "before", width),
        _value("spread", TensorProto.INT64, "texts", "longest"),
        _value("lengths", TensorProto.INT32, "texts"),
        _value("picked", TensorProto.INT64, "T"),
        *(_value(name, TensorProto.BOOL) for name in ("begins", *switches)),
    ]
    output = _value(f"x{num_layers}", TensorProto.FLOAT, "T", width)
    layers = [_layer(shape, index, switch) for index, switch in enumerate(switches)]
    constants = [*_external_tensors(weights), helper.make_tensor("flat", TensorProto.INT64, [2], [-1, width])]
    graph = helper.make_graph([_embeddings(shape, weights), *layers], "encoder", inputs, [output], constants)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_RUNTIME, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_FORMAT)


def _embeddings(shape: Shape, weights: Weights) -> NodeProto:
    """Builds the first layer's input `x0`: sums of embeddings and their norm, or the hidden states so far."""
    has_kind = not weights.keys().isdisjoint({"kind", "kinds"})
    words = "typed" if has_kind else "word"
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["word"]),
        *([helper.make_node("Gather", ["kinds", "types"], ["kind"])] if "kinds" in weights else []),
        *([helper.make_node("Add", ["word", "kind"], ["typed"])] if has_kind else []),
        helper.make_node("Gather", ["places", "positions"], ["place"]),
        *_sum_and_norm(words, "place", "embedded", "0", shape.eps[0]),
    ]
    whole = [_value(end, TensorProto.FLOAT, "T", shape.heads * shape.width) for end in ("embedded", "resumed")]
    return helper.make_node(
        "If", ["begins"], ["x0"],
        then_branch=helper.make_graph(nodes, "embeddings", [], whole[:1]),
        else_branch=helper.make_graph([helper.make_node("Identity", ["x"], ["resumed"])], "resume", [], whole[1:]),
    )  # fmt: skip


def _layer(shape: Shape, index: int, switch: str) -> NodeProto:
    """Builds one layer, `x` to the next layer's `x`; where its switch is off, it passes `x` on unchanged."""
    names = {"x": f"x{index}", "y": f"y{index}", "same": f"same{index}"}
    nodes = [*_attention(shape), *_feed_forward(shape)]
    for node in nodes:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name if name in _SHARED else f"{name}{index}") for name in ends]
    whole = [_value(names[end], TensorProto.FLOAT, "T", shape.heads * shape.width) for end in ("y", "same")]
    skip = [helper.make_node("Identity", [names["x"]], [names["same"]])]
    return helper.make_node(
        "If", [switch], [f"x{index + 1}"],
        then_branch=helper.make_graph(nodes, f"layer{index}", [], whole[:1]),
        else_branch=helper.make_graph(skip, f"skip{index}", [], whole[1:]),
    )  # fmt: skip


def _attention(shape: Shape) -> list[NodeProto]:
    """Builds attention, `x` to `context`: spreads the row to a padded batch, and gathers the result to a row."""
    options: dict[str, Any] = {"num_heads": shape.heads, "scale": shape.width**-0.5, "domain": _RUNTIME}
    return [
        _product("x", "joined", "q"),
        helper.make_node("Gather", ["joined", "spread"], ["padded"]),
        helper.make_node("Split", ["padded"], ["query", "key", "value"], axis=-1),
        helper.make_node("MultiHeadAttention", ["query", "key", "value", "", "lengths"], ["found"], **options),
        helper.make_node("Reshape", ["found", "flat"], ["rows"]),
        helper.make_node("Gather", ["rows", "picked"], ["context"]),
    ]


def _feed_forward(shape: Shape) -> list[NodeProto]:
    """Builds the rest of a layer, `x` and `context` to `y`: projection, sum and norm; two products, sum and norm."""
    domain = _RUNTIME if shape.activation == "Gelu" else ""
    return [
        _product("context", "attended", "c"),
        *_sum_and_norm("attended", "x", "inner", "1", shape.eps[1]),
        _product("inner", "wide", "u"),
        helper.make_node(shape.activation, ["wide"], ["active"], domain=domain),
        _product("active", "out", "d"),
        *_sum_and_norm("out", "inner", "y", "2", shape.eps[2]),
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


def _external_tensors(weights: Weights) -> list[TensorProto]:
    """Declares the weights by name and shape; their values are passed to the session."""
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
