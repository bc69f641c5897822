"""Runs post-norm encoder layers (BERT-like) in fewer steps: the same weights, and the same arithmetic to rounding.

The overhead of transformers' own layers is a twentieth of the time of a full batch and a quarter of that of a single
short text: three products where one suffices, results copied into place, and much Python. Here query, key and value are
one product, and sums are made in place. Where a head reads one token of each text, the last layer computes keys and
values of all tokens, and everything else of these only. Supported layers are recognized by their parts, not by a list
of names: every part must be known, or the model is left unchanged. As every path, this one is used only where
`engines/models/verification.py` finds that it gives the vectors of the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pad
from transformers.activations import GELUActivation

from engines.device.cpu_features import has_fast_bfloat16
from engines.device.huge_pages import join_rows
from engines.device.load_throttle import throttle_point
from engines.device.torch_runtime import usable_threads
from engines.layers.attention import packed_attention, single_query_attention
from engines.layers.host_layers import resident
from engines.layers.packed_linear import Int8Linear, PackedLinear, ProductFactory, replace_joined
from engines.layers.packing import KernelVariant, PackedLayout, PackedState, TokenChoice
from engines.layers.products import apply, linear, onednn_is_faster, rounded_rows


@dataclass(frozen=True)
class PartNames:
    """The names of the parts of a layer, in one model family.

    Attributes:
        gives_tuple: whether a layer returns a tuple.
    """

    attention: str
    query: str
    key: str
    value: str
    context: str
    first_norm: str
    up: str
    activation: str
    down: str
    second_norm: str
    gives_tuple: bool = False

    @property
    def parts(self) -> set[str]:
        """Every part that computes something, without containers and dropout."""
        return {
            self.query, self.key, self.value, self.context, self.first_norm, self.up, self.activation, self.down,
            self.second_norm,
        }  # fmt: skip


BERT = PartNames(
    attention="attention.self", query="attention.self.query", key="attention.self.key", value="attention.self.value",
    context="attention.output.dense", first_norm="attention.output.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
)  # fmt: skip

MPNET = PartNames(
    attention="attention.attn", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    context="attention.attn.o", first_norm="attention.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
    gives_tuple=True,
)  # fmt: skip

DISTILBERT = PartNames(
    attention="attention", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    context="attention.out_lin", first_norm="sa_layer_norm", up="ffn.lin1", activation="ffn.activation",
    down="ffn.lin2", second_norm="output_layer_norm",
)  # fmt: skip


def part_names_of(layers: Sequence[nn.Module]) -> PartNames | None:
    """Returns the names of the parts of these layers; None where any layer has a part that is not known."""
    return next(
        (names for names in (BERT, MPNET, DISTILBERT) if all(_has_exactly(layer, names) for layer in layers)), None
    )


def _has_exactly(layer: nn.Module, names: PartNames) -> bool:
    """Whether the layer is an encoder's, made of these parts and no others."""
    parts = {name: part for name, part in layer.named_modules() if not list(part.children())}
    working = {name for name, part in parts.items() if not isinstance(part, nn.Dropout)}
    if working != names.parts or getattr(layer, "is_decoder", False):
        return False
    linears = (names.query, names.key, names.value, names.context, names.up, names.down)
    norms = (names.first_norm, names.second_norm)
    return (
        all(type(parts[name]) is nn.Linear and parts[name].bias is not None for name in linears)
        and all(type(parts[name]) is nn.LayerNorm for name in norms)
        and parts[names.query].weight.shape == parts[names.key].weight.shape == parts[names.value].weight.shape
    )


_FEW_ROWS = 96
"""Up to this many tokens, several threads of MKL share a product better with the weights as its left factor: they
divide the rows of the left factor between them."""

_ROW_MULTIPLE = 16
"""The kernels of such products work on this many rows at once: 12 rows cost more than 16."""


_INT8_ROWS = 256
"""Rows at once between two int8 products, where all of their float32 activations are more than `_INT8_INNER`."""

_INT8_INNER = 2**20
"""Activations between two int8 products that run at once. A layer of MiniLM takes 3,619 µs with 424 × 1,536 of them at
once, and 3,830 and 3,908 in blocks of 192 and 256 rows (the shortest of 60 passes)."""


def fuse(model: nn.Module, state: PackedState) -> "list[FusedLayer]":
    """Replaces the forward methods of the layers of `model`, which run fused while `state` says so.

    Returns:
        The fused layers; none where the layers are not supported, and then nothing is changed.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if len(stacks) != 1 or not len(stacks[0]):
        return []
    layers = list(stacks[0])
    names = part_names_of(layers)
    if names is None:
        return []
    fused = []
    for layer in layers:
        with resident(layer):
            fused.append(_fuse_layer(layer, names, state, is_last=layer is layers[-1]))
        throttle_point()
    return fused


def _fuse_layer(layer: nn.Module, names: PartNames, state: PackedState, *, is_last: bool) -> "FusedLayer":
    """Replaces the forward method of a layer, which runs as before outside of a fused row."""
    plain: Callable[..., Any] = layer.forward
    fused = FusedLayer(layer, names, state.pause)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if state.layout is None or not state.is_fused:
            return plain(hidden_states, *args, **kwargs)
        layout = state.layout.on(hidden_states.device)
        if is_last and state.kept in fused.skips:
            return fused.one_token(hidden_states[0], layout, state.kept)[None]
        bias = kwargs.get("position_bias", args[1] if names.gives_tuple and len(args) > 1 else None)
        out = fused(hidden_states[0], layout, bias, state.variant or fastest_variant(layout))
        out = out[None, : layout.num_tokens] if is_last else out[None]
        return (out,) if names.gives_tuple else out

    layer.forward = forward
    return fused


def fastest_variant(layout: PackedLayout) -> KernelVariant:
    """Returns the fastest variant for a row of these texts on the cores that this thread may use."""
    is_few = usable_threads() > 1 and layout.num_tokens <= _FEW_ROWS
    return "few" if is_few and not onednn_is_faster() else "many"


class FusedLayer:
    """Runs one layer on a packed row.

    Args:
        pause: called between the layer's products, of rows of many tokens: other rows need not wait for a whole layer.

    Attributes:
        heads, head_width: the number of attention heads and the width of each.
        operator: the activation as an ONNX operator (`engines/models/onnx_graph.py`); empty where that has none.
    """

    def __init__(self, layer: nn.Module, names: PartNames, pause: Callable[[], None]) -> None:
        self._pause = pause
        part: Callable[[str], Any] = layer.get_submodule
        self._attention = part(names.attention)
        projections = [part(name) for name in (names.query, names.key, names.value)]
        self._weight, self._bias = (_join(projections, kind) for kind in ("weight", "bias"))
        self._context, self._up, self._down = part(names.context), part(names.up), part(names.down)
        self._first_norm, self._second_norm = part(names.first_norm), part(names.second_norm)
        activation = part(names.activation)
        is_exact = type(activation) is GELUActivation and activation.act is nn.functional.gelu
        self._activate: Callable[[Tensor], Tensor] = gelu if is_exact else activation
        self.operator = "Gelu" if is_exact else "Relu" if type(activation) is nn.ReLU else ""
        self._has_bias = names is MPNET
        self._layer, self._names = layer, names
        self._joined: nn.Module | None = None
        self.heads = int(getattr(self._attention, "num_attention_heads", None) or self._attention.n_heads)
        self.head_width: int = projections[0].out_features // self.heads

    @property
    def skips(self) -> tuple[TokenChoice, ...]:
        """The choices of tokens for which the layer can be run alone; none with an attention bias."""
        return () if self._has_bias else ("first", "last")

    @property
    def can_be_prepacked(self) -> bool:
        """Whether `engines/models/prepacked.py` supports the layer: float32 on a CPU, without an attention bias."""
        weight = self._weight
        is_known = bool(self.operator) and not self._has_bias and self._joined is None
        return is_known and weight.device.type == "cpu" and weight.dtype == torch.float32

    @property
    def product_bytes(self) -> int:
        """Bytes of the weights of the layer's matrix products."""
        weights = (self._weight, self._context.weight, self._up.weight, self._down.weight)
        return sum(weight.numel() * weight.itemsize for weight in weights)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The weights under their names in `engines/models/onnx_graph.py`."""
        return {
            "wq": self._weight, "bq": self._bias, "wc": self._context.weight, "bc": self._context.bias,
            "wu": self._up.weight, "bu": self._up.bias, "wd": self._down.weight, "bd": self._down.bias,
            "g1": self._first_norm.weight, "e1": self._first_norm.bias, "g2": self._second_norm.weight,
            "e2": self._second_norm.bias,
        }  # fmt: skip

    @property
    def script_weights(self) -> list[Tensor]:
        """The tensors of the layer as `engines/layers/encoder_script.py` takes them; none where it cannot run it: with
        an attention bias, another activation, or products that are not packed."""
        products = [self._joined, self._context, self._up, self._down]
        packed = [part for part in products if isinstance(part, PackedLinear) and part.bias is not None]
        if len(packed) < len(products) or not self.operator or self._has_bias:
            return []
        tensors = [tensor for part in packed for tensor in (part.packed, part.bias) if tensor is not None]
        return [*tensors, *self.norms]

    @property
    def int8_products(self) -> list[Int8Linear]:
        """The layer's products where `engines/layers/int8_script.py` can run it, else none: see `script_weights`."""
        products = [self._joined, self._context, self._up, self._down]
        small = [part for part in products if isinstance(part, Int8Linear) and part.tensors]
        return small if len(small) == len(products) and self.operator and not self._has_bias else []

    @property
    def norms(self) -> list[Tensor]:
        """Scale and shift of the first and of the second norm."""
        return [tensor for norm in (self._first_norm, self._second_norm) for tensor in (norm.weight, norm.bias)]

    @property
    def eps(self) -> tuple[float, float]:
        """The epsilons of the first and the second norm."""
        return self._first_norm.eps, self._second_norm.eps

    def replace_products(self, make: ProductFactory, make_joined: ProductFactory) -> None:
        """Replaces the layer's products (queries, keys and values by `make_joined`), also in the model's own layer, and
        frees their weights."""
        names = self._names
        joined = make_joined(self._weight, self._bias)
        replace_joined(self._layer, (names.query, names.key, names.value), names.attention, [joined])
        self._joined, self._weight, self._bias = joined, joined.weight, joined.weight
        made = [make(part.weight, part.bias) for part in (self._context, self._up, self._down)]
        for name, part in zip((names.context, names.up, names.down), made, strict=True):
            self._layer.set_submodule(name, part)
        self._context, self._up, self._down = made
        for product in (joined, *made):
            if isinstance(product, Int8Linear):  # gives sums and norms float32; attention is faster in bfloat16
                is_attended = product is joined and has_fast_bfloat16() and not self._has_bias
                product.out_dtype = torch.bfloat16 if is_attended else torch.float32
                product.is_behind_norm = product is joined or product is self._up

    def __call__(self, x: Tensor, layout: PackedLayout, position_bias: Tensor | None, variant: KernelVariant) -> Tensor:
        """Runs the layer, `[≥ T, H]` to `[≥ T, H]`: rows behind those of the tokens mean nothing. The variant `few` is
        for CPU threads: a GPU runs `many` instead."""
        is_few = variant == "few" and x.device.type == "cpu" and self._joined is None
        run = self.few if is_few else self.many
        return run(x, layout, position_bias)

    def many(self, x: Tensor, layout: PackedLayout, position_bias: Tensor | None) -> Tensor:
        """Runs the layer with the tokens as the left factor of each product, `[≥ T, H]` to `[≥ T, H]`."""
        x = self._rounded(x)
        joined = linear(x, self._weight, self._bias) if self._joined is None else self._joined(x)
        self._pause()
        context = self._attend(joined[: layout.num_tokens], layout, position_bias)
        self._pause()
        return self._finish(x, _with_rows(context, len(x)))

    def _rounded(self, x: Tensor) -> Tensor:
        """Appends rows of zeros where oneDNN multiplies: see `rounded_rows`."""
        is_packed = isinstance(self._joined, PackedLinear)
        is_plain = self._joined is None and x.dtype is torch.float32 and x.device.type == "cpu"
        return _with_rows(x, rounded_rows(len(x))) if is_packed or (is_plain and onednn_is_faster()) else x

    def _finish(self, x: Tensor, context: Tensor) -> Tensor:
        """Runs what follows attention, from the layer's input and the context, both `[T, H]`."""
        x = _norm(_apply_and_add(self._context, context, x), self._first_norm)
        self._pause()
        return _norm(self._feed_forward(x), self._second_norm)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Adds the last two products, with the activation between them, to their input, `[T, H]` to `[T, H]`."""
        if type(self._up) is not Int8Linear:
            inner = self._inner(x)
            self._pause()
            return _apply_and_add(self._down, inner, x)
        parts = []
        is_small = len(x) * self._up.out_features <= _INT8_INNER
        for some in [x] if is_small else torch.split(x, _INT8_ROWS):
            inner = self._inner(some)
            self._pause()
            parts.append(_apply_and_add(self._down, inner, some))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _inner(self, x: Tensor) -> Tensor:
        """Returns the activations between the last two products, `[T, H]` to `[T, inner]`."""
        if self._activate is not gelu:
            return self._activate(apply(self._up, x))
        if isinstance(self._up, PackedLinear | Int8Linear):
            return self._up.multiply_and_gelu(x)
        return gelu(apply(self._up, x))

    def one_token(self, x: Tensor, layout: PackedLayout, kept: TokenChoice) -> Tensor:
        """Runs the layer for the first or the last token of each text, `[T, H]` to `[n, H]`.

        Keys and values are computed of all tokens, the rest, five sixths of the products, of these only.
        """
        split = self.heads * self.head_width
        places = layout.starts if kept == "first" else layout.ends - 1
        rows, x = self._rounded(x[places]), self._rounded(x)
        if self._joined is not None:  # gives queries of all tokens, too
            joined = self._joined(x)
            query, others = joined[places, :split], joined[: layout.num_tokens, split:]
        else:
            query = linear(rows, self._weight[:split], self._bias[:split])[: len(places)]
            others = linear(x, self._weight[split:], self._bias[split:])[: layout.num_tokens]
        key, value = others.view(-1, 2, self.heads, self.head_width).permute(1, 2, 0, 3)[:, None]
        query = query.view(-1, self.heads, self.head_width).transpose(0, 1)[None]
        context = single_query_attention(query, key, value, layout, scaling=self.head_width**-0.5, window=None)
        return self._finish(rows, _with_rows(context.flatten(1), len(rows)))[: len(places)]

    def few(self, x: Tensor, layout: PackedLayout, position_bias: Tensor | None) -> Tensor:
        """Runs the layer with the weights as the left factor of each product: see `_FEW_ROWS`."""
        num_rows = layout.num_tokens
        padding = (0, 0, 0, -num_rows % _ROW_MULTIPLE)
        x = pad(x[:num_rows], padding)
        joined = torch.addmm(self._bias[:, None], self._weight, x.T).T[:num_rows].contiguous()
        context = pad(self._attend(joined, layout, position_bias), padding)
        x = _norm(x + _left_product(self._context, context.T).T, self._first_norm)
        inner = self._activate(_left_product(self._up, x.T))
        return _norm(x + _left_product(self._down, inner).T, self._second_norm)[:num_rows]

    def _attend(self, joined: Tensor, layout: PackedLayout, position_bias: Tensor | None) -> Tensor:
        """Computes attention from queries, keys and values `[T, 3 × H]`; gives `[T, H]`."""
        query, key, value = joined.view(-1, 3, self.heads, self.head_width).permute(1, 2, 0, 3)[
            :, None
        ]  # each [1, heads, T, d]
        context, _ = packed_attention(
            self._attention, query, key, value, None,
            packed_layout=layout, scaling=self.head_width**-0.5, is_causal=False, position_bias=position_bias,
        )  # fmt: skip
        return context[0].flatten(1)


def _with_rows(x: Tensor, num_rows: int) -> Tensor:
    """Appends rows of zeros to `[T, H]`."""
    return pad(x, (0, 0, 0, num_rows - len(x))) if len(x) < num_rows else x


def _apply_and_add(part: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """Applies a linear layer, or what replaced it, to `[T, in]` and adds `other`, `[T, out]`.

    Not within the product of `PackedLinear`: rows of MiniLM take as long so (0.98 to 1.00 of the rate, one core, EPYC
    Zen 5, torch 2.13) where the operator's overload is named, and 1 ms more where torch has to find it.
    """
    return part.multiply_and_add(x, other) if isinstance(part, Int8Linear) else apply(part, x).add_(other)


def _left_product(part: nn.Linear, columns: Tensor) -> Tensor:
    """Applies the part to tokens that stand as columns `[in, T]`; gives columns `[out, T]`."""
    return torch.addmm(part.bias[:, None], part.weight, columns)


def _join(linears: list[nn.Linear], name: str) -> Tensor:
    """Joins weights (or biases) to one tensor, of which each part becomes a view: nothing is held twice."""
    own = [getattr(part, name) for part in linears]
    joined = join_rows([tensor.detach() for tensor in own])
    for tensor, part in zip(own, joined.chunk(len(own)), strict=True):
        tensor.data = part
    return joined


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
