"""Holds the steps of a decoder layer whose products are packed as functions of TorchScript.

One call of `run_layer` runs a layer of short texts, without Python between its steps. For longer rows the same steps
are calls of their own, between which other rows may run. Weights are those of
`engines.layers.packed_linear.PackedLinear`, bfloat16 or float32. The products compute activations and sums, gate times
up included. Norms and rotary embeddings are float32 and rounded once; of queries and keys they are one step, since the
factor of a norm is the same for all numbers of a head, which the rotary embedding turns:

    rotate(x · r · w) = r · (x · (w · cos) + swap(x) · (swap(w) · sin)),  r = 1 / √(mean(x²) + ε)

Attention of causal layers is computed inside for texts of up to `LONGEST` tokens, padded to a few lengths: no token
sees the padding behind it. In bfloat16 by products with shares by powers of two, as in
`engines/layers/encoder_script.py`; in float32 by torch's kernel.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor

from engines.layers.packing import SCORES, PackedLayout
from engines.layers.softmax import LARGEST_SUM, LEAST_SUM, LOG2_E

log = structlog.get_logger(__name__)

LONGEST = 191
"""Tokens of a text, with those that it shares, for which attention is computed inside: kernels that work in blocks of
queries are faster for longer ones."""

_WHOLE_TOKENS = 64
"""Tokens of a row whose layers run in one call each: other rows wait for it."""

_SOURCE = f"""
def inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    sizes = torch.ops.aten.linalg_vector_norm(x, 2, [-1], True)
    return sizes.mul_(sizes).div_(x.size(-1)).add_(eps).rsqrt_()


def normalized(x: Tensor, w: Tensor, eps: float) -> Tensor:
    wide = x.float()
    factor = inverse_root_mean_square(wide, eps)
    found = wide * factor if x.dtype == torch.float else wide.mul_(factor)
    return found.mul_(w)


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return normalized(x, w, eps).to(x.dtype)


def turned(x: Tensor, w: List[Tensor], cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    half = x.size(2) // 2
    wide = x.float()
    if len(w) > 0:
        cos, sin = cos * w[0], sin * w[1]
    found = wide * cos
    found[:, :, :half].addcmul_(wide[:, :, half:], sin[:, :, :half], value=-1)
    found[:, :, half:].addcmul_(wide[:, :, :half], sin[:, :, half:])
    if len(w) > 0:
        found.mul_(inverse_root_mean_square(wide, eps))
    return found


def product(x: Tensor, w: Tensor, bias: Optional[Tensor]) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", none, "none")


def query_key_value(
    x: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], head_norms: List[Tensor], cos: Tensor, sin: Tensor,
    shape: List[int], eps: List[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, width = shape[0], shape[1], shape[2]
    x = norm(x, w[0], eps[0])
    cos, sin = cos.float(), sin.float()
    query = product(x, w[1], biases[0]).view(x.size(0), -1, width)
    if query.size(1) == heads:
        others = product(x, w[2], biases[1]).view(x.size(0), -1, width)
    else:
        others = query[:, heads:]
    query = turned(query[:, :heads], head_norms[:2], cos, sin, eps[1])
    return query, turned(others[:, :kv_heads], head_norms[2:], cos, sin, eps[1]), others[:, kv_heads:]


def last_query_key_value(
    x: Tensor, last: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], head_norms: List[Tensor], cos: Tensor,
    sin: Tensor, shape: List[int], eps: List[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    kv_heads, width = shape[1], shape[2]
    x = norm(x, w[0], eps[0])
    cos, sin = cos.float(), sin.float()
    query = product(x.index_select(0, last), w[1], biases[0]).view(last.size(0), -1, width)
    others = product(x, w[2], biases[1]).view(x.size(0), -1, width)
    query = turned(query, head_norms[:2], cos.index_select(0, last), sin.index_select(0, last), eps[1])
    key = turned(others[:, :kv_heads], head_norms[2:], cos, sin, eps[1])
    return query.to(x.dtype), key.to(x.dtype), others[:, kv_heads:]


def shares(q: Tensor, k: Tensor, scale: float, length: int, shared: int) -> Tensor:
    empty = torch.empty([1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k, beta=0, alpha=scale * {LOG2_E}).float()
    found = scores.exp2()
    found.view(-1, length, k.size(2)).tril_(shared)
    sums = found.sum([-1], True)
    least, largest = torch.aminmax(sums)
    if float(least) >= {LEAST_SUM} and float(largest) <= {LARGEST_SUM}:
        return found.mul_(sums.reciprocal_())
    seen = torch.ones_like(scores)
    seen.view(-1, length, k.size(2)).tril_(shared)
    return torch.softmax(scores.div_({LOG2_E}).masked_fill_(seen == 0, -float("inf")), -1)


def by_products(query: Tensor, key: Tensor, value: Tensor, scale: float, shared: int) -> Tensor:
    texts, kv_heads, group, length, width = query.size()
    q = query.view(texts * kv_heads, group * length, width)
    k, v = key.view(texts * kv_heads, -1, width).transpose(1, 2), value.view(texts * kv_heads, -1, width)
    found = torch.empty_like(q)
    at_once = max(1, {SCORES} // (group * length * v.size(1)))
    if texts > 1 or at_once >= kv_heads:
        at_once = texts * kv_heads
    for first in range(0, texts * kv_heads, at_once):
        last = min(first + at_once, texts * kv_heads)
        some = shares(q[first:last], k[first:last], scale, length, shared).to(q.dtype)
        torch.bmm(some, v[first:last], out=found[first:last])
    return found.view(texts, kv_heads, group, length, width)


def by_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, shared: int) -> Tensor:
    texts, kv_heads, group, length, width = query.size()
    q = query.view(texts, kv_heads * group, length, width)
    if shared == 0:
        found = torch.ops.aten.scaled_dot_product_attention(
            q, key, value, None, 0.0, length > 1, scale=scale, enable_gqa=group > 1
        )
    else:
        seen = torch.ones([length, key.size(2)], dtype=torch.bool).tril_(shared)
        found = torch.ops.aten.scaled_dot_product_attention(
            q, key, value, seen, 0.0, False, scale=scale, enable_gqa=group > 1
        )
    return found.reshape(texts, kv_heads, group, length, width)


def texts_of(states: Tensor, start: int, end: int, place: int, places: List[Tensor], texts: int) -> Tensor:
    rows = states[start:end] if place < 0 else states.index_select(0, places[place])
    return rows.view(texts, -1, states.size(1), states.size(2)).transpose(1, 2)


def with_shared(states: Tensor, texts: Tensor, shared: int, dtype: int) -> Tensor:
    found = torch.empty([texts.size(0), texts.size(1), shared + texts.size(2), texts.size(3)], dtype=dtype)
    if shared > 0:
        found[:, :, :shared].copy_(states[:shared].transpose(0, 1))
    found[:, :, shared:].copy_(texts)
    return found


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: List[List[int]], places: List[Tensor], scale: float
) -> Tensor:
    dtype = value.dtype
    num_tokens, heads, width = query.size()
    kv_heads = key.size(1)
    context = torch.empty([num_tokens, heads * width], dtype=dtype)
    for start, end, texts, length, place, shared in blocks:
        q = torch.empty([texts, kv_heads, heads // kv_heads, length, width], dtype=dtype)
        q.view(texts, heads, length, width).copy_(texts_of(query, start, end, place, places, texts))
        k = with_shared(key, texts_of(key, start, end, place, places, texts), shared, dtype)
        v = with_shared(value, texts_of(value, start, end, place, places, texts), shared, dtype)
        if dtype == torch.float:
            found = by_kernel(q, k, v, scale, shared)
        else:
            found = by_products(q, k, v, scale, shared)
        found = found.view(texts, heads, length, width).transpose(1, 2)
        if place < 0:
            context[start:end].view(texts, length, heads, width).copy_(found)
        else:
            torch.index_select(found.reshape(-1, heads * width), 0, places[place + 1], out=context[start:end])
    return context


def add_product(
    x: Tensor, other: Tensor, w: Tensor, bias: Optional[Tensor], norms: List[Tensor], eps: float
) -> Tensor:
    if len(norms) == 0:
        return torch.ops.mkldnn._linear_pointwise(x, other, w, bias, "add")
    return normalized(product(x, w, bias), norms[0], eps).add_(other).to(other.dtype)


def mix(
    x: Tensor, context: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], norms: List[Tensor], eps: List[float]
) -> Tuple[Tensor, Tensor]:
    x = add_product(context, x, w[3], biases[2], norms[:1], eps[0])
    return x, norm(x, w[4], eps[0])


def gated(x: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], activation: str, algorithm: str) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.mkldnn._linear_pointwise(x, w[5], biases[3], activation, none, algorithm)


def times_up(gate: Tensor, x: Tensor, w: List[Tensor], biases: List[Optional[Tensor]]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, gate, w[6], biases[4], "mul")


def finish(
    x: Tensor, inner: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], norms: List[Tensor], eps: List[float]
) -> Tensor:
    return add_product(inner, x, w[7], biases[5], norms[1:], eps[0])


def run_layer(
    x: Tensor, w: List[Tensor], biases: List[Optional[Tensor]], head_norms: List[Tensor], norms: List[Tensor],
    cos: Tensor, sin: Tensor, blocks: List[List[int]], places: List[Tensor], shape: List[int], eps: List[float],
    scale: float, activation: str, algorithm: str,
) -> Tensor:
    query, key, value = query_key_value(x, w, biases, head_norms, cos, sin, shape, eps)
    x, normed = mix(x, attend(query, key, value, blocks, places, scale), w, biases, norms, eps)
    inner = times_up(gated(normed, w, biases, activation, algorithm), normed, w, biases)
    return finish(x, inner, w, biases, norms, eps)
"""


@cache
def compiled() -> Any | None:
    """Returns the functions; None where the installed torch cannot compile them.

    `w` are the weights of a layer: of its first norm; of the products of queries (or of queries, keys and values) and
    of keys and values; of the context; of the norm before the MLP; of gate, up and down. `biases` are those of the
    products; `head_norms` the weights of the norms of queries and keys, each followed by itself with its halves
    swapped; `norms` those behind attention and MLP, where there are any. Weights of norms are float32. `shape`: heads,
    heads of keys, and their width. `eps`: of the norms, and of those of heads.
    """
    try:
        return torch.jit.CompilationUnit(_SOURCE)
    except (RuntimeError, AttributeError) as error:  # torch drops TorchScript, or renames an operator
        log.warning("decoder_script.unavailable", reason=type(error).__name__)
        return None


class LayerTensors(NamedTuple):
    """The tensors of a layer, as `compiled` describes them."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    head_norms: list[Tensor]
    norms: list[Tensor]


class LayerShape(NamedTuple):
    """What else decides what a layer computes.

    Attributes:
        heads, kv_heads, width: the heads of queries, of keys and values, and their width.
        eps: of the norms, and of those of heads.
        scale: factor of the scores.
        window: exclusive bound of the distance between query and key.
        is_causal: whether a token attends to those before it only.
        activation: of the gate, and its algorithm, as oneDNN names them.
    """

    heads: int
    kv_heads: int
    width: int
    eps: tuple[float, float]
    scale: float
    window: int | None
    is_causal: bool
    activation: tuple[str, str]


class ScriptedLayer:
    """Runs the steps of one layer.

    Args:
        pause: called between steps.
    """

    def __init__(self, tensors: LayerTensors, shape: LayerShape, pause: Callable[[], None]) -> None:
        self._script: Any = compiled()
        self._tensors, self._shape, self._pause = tensors, shape, pause
        self._heads, self._eps = [shape.heads, shape.kv_heads, shape.width], list(shape.eps)

    def attends(self, layout: PackedLayout) -> bool:
        """Whether attention of these texts is computed here; the variant `few` wants it wherever it can be."""
        shape, longest = self._shape, layout.longest_whole
        if not shape.is_causal or layout.num_visible is not None or layout.variant == "many":
            return False
        is_within = shape.window is None or longest <= shape.window
        return is_within and (layout.variant == "few" or (longest <= LONGEST and not layout.in_blocks))

    def is_whole(self, layout: PackedLayout) -> bool:
        """Whether the layer runs in one call for these texts, which `attends` has accepted."""
        return layout.variant == "few" or layout.num_tokens <= _WHOLE_TOKENS

    def __call__(self, x: Tensor, layout: PackedLayout, cos: Tensor, sin: Tensor) -> Tensor:
        """Runs the layer in one call, `[T, H]` to `[T, H]`."""
        shape, blocks = self._shape, layout.causal_blocks(self._shape.heads)
        found: Tensor = self._script.run_layer(
            x, *self._tensors, cos, sin, *blocks, self._heads, self._eps, shape.scale, *shape.activation
        )
        return found

    def query_key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys (both float32) and values, `[T, heads, d]` each, of `[T, H]`."""
        weights, biases, head_norms, _ = self._tensors
        found: tuple[Tensor, Tensor, Tensor] = self._script.query_key_value(
            x, weights, biases, head_norms, cos, sin, self._heads, self._eps
        )
        return found

    def last_query_key_value(self, x: Tensor, last: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the queries of the tokens `last` `[n]`, and keys and values of all; of a layer with two products."""
        weights, biases, head_norms, _ = self._tensors
        found: tuple[Tensor, Tensor, Tensor] = self._script.last_query_key_value(
            x, last, weights, biases, head_norms, cos, sin, self._heads, self._eps
        )
        return found

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        """Returns the context `[T, heads × d]` of what `query_key_value` gives."""
        blocks = layout.causal_blocks(self._shape.heads)
        found: Tensor = self._script.attend(query, key, value, *blocks, self._shape.scale)
        return found

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        """Runs what follows attention, from the layer's input `[T, H]` and the context `[T, heads × d]`."""
        weights, biases, _, norms = self._tensors
        x, normed = self._script.mix(x, context, weights, biases, norms, self._eps)
        self._pause()
        gate = self._script.gated(normed, weights, biases, *self._shape.activation)
        self._pause()
        inner = self._script.times_up(gate, normed, weights, biases)
        self._pause()
        found: Tensor = self._script.finish(x, inner, weights, biases, norms, self._eps)
        return found
