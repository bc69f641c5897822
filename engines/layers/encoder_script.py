"""Holds the layers of a post-norm encoder (BERT-like) as one function of TorchScript, from ids to hidden states.

One call of it runs any number of layers: without Python between their steps, and without the interpreter's lock, which
the event loop would hold before each of hundreds of steps. The weights of products are those of
`engines.layers.packed_linear.PackedLinear`, bfloat16 or float32. In bfloat16, MiniLM on one core of an EPYC (Zen 5)
takes 0.60 of the fused layers' time for a text of 12 tokens, 0.69 for four, 0.79 for eight, 0.89 for 32 short ones and
0.82 to 0.85 for texts of 100 to 250 tokens. GELU and sums are computed by the products.

Attention is computed by products of all heads of some texts at once, with shares by powers of two
(`engines/layers/softmax.py`): for texts of 12 to 250 tokens in 0.63 to 0.73 of the time of
`engines/layers/bfloat16_attention.py`.

TorchScript is deprecated, but its successor needs a compiler on the machine that serves. Where it is not there, the
layers run step by step.
"""

from functools import cache
from typing import Any

import structlog
import torch

from engines.layers.packing import SCORES
from engines.layers.softmax import LARGEST_SUM, LEAST_SUM, LOG2_E

log = structlog.get_logger(__name__)

SOURCE = f"""
def shares(q: Tensor, k: Tensor, real: Optional[Tensor], scale: float) -> Tensor:
    empty = torch.empty([1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k, beta=0, alpha=scale * {LOG2_E}).float()
    found = scores.exp2() if real is None else scores.exp2().mul_(real)
    sums = found.sum([-1], True)
    least, largest = torch.aminmax(sums)
    if float(least) >= {LEAST_SUM} and float(largest) <= {LARGEST_SUM}:
        return found.mul_(sums.reciprocal_())
    scores = scores / {LOG2_E}
    if real is not None:
        scores = scores.masked_fill(real == 0, -float("inf"))
    return torch.softmax(scores, -1)


def attend(
    joined: Tensor, blocks: List[List[int]], places: List[Tensor], heads: int, width: int, scale: float
) -> Tensor:
    context = torch.empty([joined.size(0), heads * width], dtype=joined.dtype)
    for start, end, texts, length, place in blocks:
        rows = joined[start:end] if place < 0 else joined.index_select(0, places[place])
        states = rows.view(texts, length, 3, heads, width).permute(2, 0, 3, 1, 4).reshape(3, -1, length, width)
        query, key, value = states.unbind(0)
        found = torch.empty_like(query)
        at_once = max(1, {SCORES} // (length * length))
        if texts > 1 or at_once >= heads:
            at_once = texts * heads
        for first in range(0, texts * heads, at_once):
            last = min(first + at_once, texts * heads)
            real = None if place < 0 else places[place + 2][first:last]
            some = shares(query[first:last], key[first:last].transpose(1, 2), real, scale).to(joined.dtype)
            torch.bmm(some, value[first:last], out=found[first:last])
        found = found.view(texts, heads, length, width).transpose(1, 2)
        if place < 0:
            context[start:end].view(texts, length, heads, width).copy_(found)
        else:
            torch.index_select(found.reshape(-1, heads * width), 0, places[place + 1], out=context[start:end])
    context[blocks[-1][1]:].copy_(context[:1])
    return context


def embed(ids: Tensor, positions: Tensor, types: Optional[Tensor], w: List[Tensor], eps: float) -> Tensor:
    x = w[0].index_select(0, ids)
    if types is not None:
        x = x.add_(w[4].index_select(0, types))
    elif len(w) > 4:
        x = x.add_(w[4])
    x = x.add_(w[1].index_select(0, positions))
    return torch.layer_norm(x, [x.size(1)], w[2], w[3], eps)


def run_layers(
    x: Tensor, w: List[Tensor], blocks: List[List[int]], places: List[Tensor], first: int, last: int, heads: int,
    width: int, activation: str, eps: List[float],
) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    hidden = [x.size(1)]
    for layer in range(first, last):
        q, bq, c, bc, u, bu, d, bd, g1, e1, g2, e2 = w[12 * layer : 12 * layer + 12]
        joined = torch.ops.mkldnn._linear_pointwise(x, q, bq, "none", none, "none")
        context = attend(joined, blocks, places, heads, width, width**-0.5)
        inner = torch.layer_norm(torch.ops.mkldnn._linear_pointwise(context, x, c, bc, "add"), hidden, g1, e1, eps[1])
        wide = torch.ops.mkldnn._linear_pointwise(inner, u, bu, activation, none, "none")
        x = torch.layer_norm(torch.ops.mkldnn._linear_pointwise(wide, inner, d, bd, "add"), hidden, g2, e2, eps[2])
    return x
"""


@cache
def compiled() -> Any | None:
    """Returns the functions `embed` and `run_layers`; None where the installed torch cannot compile them.

    `embed` turns ids, positions and token types `[T]` into states `[T, H]`, from the tables of words and positions,
    scale and shift of the norm, and the row that is added to each embedding or the table of token types. `run_layers`
    takes these through layers, whose twelve tensors each are `engines.layers.fused.FusedLayer.script_weights`, with
    texts as `engines.layers.packing.attention_blocks` lays them out.
    """
    try:
        return torch.jit.CompilationUnit(SOURCE)
    except (RuntimeError, AttributeError) as error:  # torch drops TorchScript, or renames an operator
        log.warning("encoder_script.unavailable", reason=type(error).__name__)
        return None
