"""Holds int8 products and whole encoder layers of them as functions of TorchScript.

One call runs any number of an encoder's layers: without Python between their steps, and without the interpreter's lock,
which the event loop would hold before each of hundreds of steps. The tensors of products are those of
`engines.layers.packed_linear.Int8Linear`. Where inputs have one step for all tokens, a token that is out of range is
multiplied again with a step of its own, so that no result depends on other tokens.

Tried: levels with one step also of the activations between the last two products, which the first then gives and the
second reads, without float32 `[T, inner]`. In MiniLM 48 of 1,536 channels reach so far that they must be multiplied
apart, and a block takes 1,444 µs for 432 tokens instead of 1,424 on one core of an EPYC (Zen 5), less exactly.

TorchScript is deprecated, but its successor needs a compiler on the machine that serves. Where it is not there, the
same source runs as Python, one product a call.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, Optional  # TorchScript's own names

import structlog
import torch
from torch import Tensor

from engines.layers import encoder_script

log = structlog.get_logger(__name__)

_SOURCE = """
def quantize_tokens(x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    levels = torch.ops.quantized.embedding_bag_byte_prepack(x)
    bounds = levels[:, x.size(1):]
    if x.size(1) % 4 != 0:
        bounds = bounds.clone(memory_format=torch.contiguous_format)
    bounds = torch.view_copy(bounds, dtype=torch.float32)
    return levels, bounds[:, :1], bounds[:, 1:]


def static_levels(x: Tensor, fixed: List[Tensor], half: float) -> Tuple[Tensor, bool]:
    factor, shift, channels, offsets, bounds = fixed[0], fixed[1], fixed[2], fixed[3], fixed[4]
    tokens, width = x.size(0), x.size(1)
    wide = torch.empty([tokens, width + channels.size(0)], dtype=x.dtype)
    torch.addcmul(shift, x, factor, out=wide[:, :width])
    torch.clamp(x.index_select(1, channels).add_(offsets), -half, half, out=wide[:, width:])
    levels = torch.ops.quantized.embedding_bag_byte_prepack_with_rowwise_min_max(wide, bounds.expand([tokens, 2]))
    least, largest = torch.aminmax(levels[:, :width])
    return levels, int(least) > 0 and int(largest) < 255


def beyond(levels: Tensor) -> Tensor:
    return (levels.amin(1) == 0) | (levels.amax(1) == 255)


def places(found: Tensor) -> Tensor:
    rows = found.nonzero()[:, 0]
    return torch.cat([rows, rows[:1].expand([(16 - rows.size(0) % 16) % 16])])


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(x)
    return x.relu_() if activation == "relu" else x


def by_token(x: Tensor, w: List[Tensor], activation: str, other: Optional[Tensor]) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    x = x.float()
    levels, step, lowest = quantize_tokens(x)
    found = torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, 0, w[0], w[1], w[2], None, 1.0, 0, torch.float32, "none", none, ""
    )
    if other is None:
        found = found.mul_(step)
    else:
        found = torch.addcmul(other, found, step)
    found = found.addcmul_(lowest + x.sum([1], True).mul_(0), w[3])
    if w[4].numel() > 0:
        found = found.add_(w[4])
    return activate(found, activation)


def multiply(
    x: Tensor, w: List[Tensor], steps: List[float], dtype: int, activation: str, other: Optional[Tensor]
) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    if len(w) == 5:
        return by_token(x, w, activation, other).to(dtype)
    x = x.float()
    levels, is_within = static_levels(x, w[6:], steps[1])
    if other is None:
        algorithm = "none" if activation == "gelu" else ""
        found = torch.ops.onednn.qlinear_pointwise(
            levels, steps[0], 0, w[0], w[1], w[2], w[5], 1.0, 0, dtype, activation, none, algorithm
        )
    else:
        found = torch.ops.onednn.qlinear_pointwise(
            levels, steps[0], 0, w[0], w[1], w[2], other, w[5], 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", none, ""
        )
    if is_within:
        return found
    rows = places(beyond(levels[:, :x.size(1)]))
    some = spread(x.index_select(0, rows), w)
    others = None if other is None else other.index_select(0, rows)
    return found.index_copy_(0, rows, by_token(some, w, activation, others).to(dtype))


def spread(x: Tensor, w: List[Tensor]) -> Tensor:
    centred = x - w[11]
    return torch.cat([centred, centred.index_select(1, w[8]) * w[12]], 1)


def embed_levels(
    ids: Tensor, positions: Tensor, types: Optional[Tensor], w: List[Tensor], scale: Tensor, eps: float
) -> Tensor:
    words = w[0].index_select(0, ids).float().mul_(scale.index_select(0, ids).unsqueeze(1))
    rows = torch.arange(words.size(0))
    return embed(rows, positions, types, [words] + w[1:], eps)


def run_int8_layers(
    x: Tensor, w: List[List[Tensor]], steps: List[List[float]], blocks: List[List[int]], spots: List[Tensor],
    heads: int, width: int, dtype: int, activation: str, eps: List[float],
) -> Tensor:
    hidden = [x.size(1)]
    for layer in range(len(steps)):
        joined, context, up, down, norms = w[5 * layer : 5 * layer + 5]
        fixed = steps[layer]
        states = multiply(x, joined, fixed[:2], dtype, "none", None)
        found = attend(states, blocks, spots, heads, width, width**-0.5)
        found = by_token(found, context, "none", x)
        inner = torch.layer_norm(found, hidden, norms[0], norms[1], eps[1])
        found = by_token(multiply(inner, up, fixed[2:], torch.float32, activation, None), down, "none", inner)
        x = torch.layer_norm(found, hidden, norms[2], norms[3], eps[2])
    return x
"""


@cache
def int8_script() -> Any:
    """Returns the functions of the source, compiled; as Python where the installed torch cannot compile them.

    `w` are a product's tensors (`Int8Linear.tensors`), `steps` its numbers (`Int8Linear.steps`).
    """
    source = encoder_script.SOURCE + _SOURCE
    try:
        return torch.jit.CompilationUnit(source)
    except (RuntimeError, AttributeError) as error:  # torch drops TorchScript, or renames an operator
        log.warning("int8_script.unavailable", reason=type(error).__name__)
        return int8_python()


def int8_python() -> Any:
    """Returns the functions of the source as Python."""
    names: dict[str, Any] = {
        "torch": torch, "Tensor": Tensor, "List": list, "Optional": Optional, "Tuple": tuple, "number": float,
    }  # fmt: skip
    exec(encoder_script.SOURCE + _SOURCE, names)  # text of this module and its neighbour
    return SimpleNamespace(**names)
