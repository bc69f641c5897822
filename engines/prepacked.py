"""Products of few tokens through ONNX Runtime, which holds a second copy of the weights in the order it reads them.

A product of few rows is bound by reading the weights. torch's library puts them in order anew in every call; here that
happens once, when the model loads. On one core, single short texts take 0.6 of the time, and large batches a little
less than before. The copy is paid for: models above `LARGEST_COPY` have none.
"""

from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

LARGEST_COPY = 96 * 2**20
"""Bytes of layers of which a second copy is a good bargain: twelve layers 384 wide, not twelve that are 768 wide."""

COPY_SHARE = 16
"""The part of a device's budget that a copy may take: where memory is short, it is for models."""

PREPACKED = 12, 64
"""`part_tokens` and `narrow_tokens` of an encoder: few texts cost about what they would in a larger batch; and one
thread with prepacked weights is faster than two without up to about 32 tokens, at 12 it takes two thirds of the time.
"""

_OPSET, _FORMAT = 17, 8
"""Versions of ONNX that every version of the runtime in use knows."""

_RUNTIME = "com.microsoft"
"""The domain of operators that only the runtime has: https://onnxruntime.ai/docs/reference/operators/ContribOperators"""

onnxruntime.set_default_logger_severity(3)

Weights = dict[str, Tensor]


class Projection:
    """`x @ weight.T + bias`.

    Args:
        weight: float32 `[out, in]`, on the CPU; neither it nor `bias` `[out]` may ever change or go.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nodes = [_product("x", "y", "")]
        self._session = _session(nodes, ("x",), {"w": weight, "b": bias})

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, out]`."""
        return _run(self._session, {"x": x})


class Block:
    """What follows attention in a post-norm layer: its projection, the sum and the norm, then the same around the two
    products with the activation between.

    Args:
        parts: float32 weights on the CPU that neither change nor go: `wc`, `bc` (context), `wu`, `bu` (up), `wd`, `bd`
            (down), `g1`, `e1`, `g2`, `e2` (scale and shift of the norms).
        activation: the operator: `Gelu` or `Relu`.
        eps: of the norms, one after the other.
    """

    def __init__(self, parts: Weights, activation: str, eps: tuple[float, float]) -> None:
        domain = _RUNTIME if activation == "Gelu" else ""
        nodes = [
            _product("context", "found", "c"),
            _sum_and_norm("found", "x", "inner", "1", eps[0]),
            _product("inner", "wide", "u"),
            helper.make_node(activation, ["wide"], ["active"], domain=domain),
            _product("active", "out", "d"),
            _sum_and_norm("out", "inner", "y", "2", eps[1]),
        ]
        self._session = _session(nodes, ("context", "x"), parts)

    def __call__(self, context: Tensor, x: Tensor) -> Tensor:
        """What attention found and what went into the layer, `[T, H]` each, to what leaves the layer, `[T, H]`."""
        return _run(self._session, {"context": context, "x": x})


def _product(source: str, target: str, part: str) -> NodeProto:
    return helper.make_node("Gemm", [source, f"w{part}", f"b{part}"], [target], transB=1)


def _sum_and_norm(a: str, b: str, target: str, part: str, eps: float) -> NodeProto:
    inputs = [a, b, f"g{part}", f"e{part}"]
    return helper.make_node("SkipLayerNormalization", inputs, [target], domain=_RUNTIME, epsilon=eps)


def _session(nodes: list[NodeProto], inputs: tuple[str, ...], weights: Weights) -> onnxruntime.InferenceSession:
    """One thread, the caller's. The weights stay where they are; the copy in order is the session's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep the most that each session has ever needed
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.detach().numpy()) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    model = _model(nodes, inputs, weights).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(nodes: list[NodeProto], inputs: tuple[str, ...], weights: Weights) -> ModelProto:
    def rows(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", None])

    graph = helper.make_graph(nodes, "part", [rows(name) for name in inputs], [rows("y")], _elsewhere(weights))
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_RUNTIME, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_FORMAT)


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


def _run(session: onnxruntime.InferenceSession, given: Weights) -> Tensor:
    arrays: dict[str, NDArray[np.float32]] = {name: rows.numpy() for name, rows in given.items()}
    result: NDArray[np.float32] = session.run(["y"], arrays)[0]
    return torch.from_numpy(result)
