"""Post-norm encoder layers (BERT and its kin) in fewer steps: the same weights, and the same arithmetic to rounding.

transformers' own layers cost, beside the arithmetic, a twentieth of a full batch and a quarter of a single short text:
three products where one does, results copied into place, and much Python. Here query, key and value are one product,
and sums are made in place. Which layers these are is read off their parts, not off a list of names: every part must be
one that is known, or nothing is touched. As every path, this one serves only when `engines/selfcheck.py` finds the
reference's vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, pad
from transformers.activations import GELUActivation

from engines.adapters import Form, PackedState
from engines.attention import packed_attention
from engines.breaks import end_part
from engines.layout import Layout
from engines.prepacked import Block, Projection

_FEW_ROWS = 96
"""Up to so many tokens several threads share a product better with the weights as its left factor: they divide those
among them, and not what is multiplied with them."""

_ROWS_AT_ONCE = 16
"""Rows that the kernels of such products take at once: 12 cost more than 16."""


@dataclass(frozen=True)
class _Names:
    """Where a family keeps the parts of a layer."""

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
        """Every part that computes something."""
        return {
            self.query, self.key, self.value, self.context, self.first_norm, self.up, self.activation, self.down,
            self.second_norm,
        }  # fmt: skip


_BERT = _Names(
    attention="attention.self", query="attention.self.query", key="attention.self.key", value="attention.self.value",
    context="attention.output.dense", first_norm="attention.output.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
)  # fmt: skip
_MPNET = _Names(
    attention="attention.attn", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    context="attention.attn.o", first_norm="attention.LayerNorm", up="intermediate.dense",
    activation="intermediate.intermediate_act_fn", down="output.dense", second_norm="output.LayerNorm",
    gives_tuple=True,
)  # fmt: skip
_DISTILBERT = _Names(
    attention="attention", query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    context="attention.out_lin", first_norm="sa_layer_norm", up="ffn.lin1", activation="ffn.activation",
    down="ffn.lin2", second_norm="output_layer_norm",
)  # fmt: skip


def fuse(model: nn.Module, state: PackedState) -> "list[FusedLayer]":
    """Teach the layers of `model` to run fused while `state` says so; none, and nothing is changed, for others."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if len(stacks) != 1 or not len(stacks[0]):
        return []
    layers = list(stacks[0])
    names = next((names for names in (_BERT, _MPNET, _DISTILBERT) if all(_is(layer, names) for layer in layers)), None)
    if names is None:
        return []
    fused = []
    for layer in layers:
        fused.append(_teach(layer, names, state))
        end_part()
    return fused


def _is(layer: nn.Module, names: _Names) -> bool:
    """Whether the layer is made of these parts and no other, as an encoder has them."""
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


def _teach(layer: nn.Module, names: _Names, state: PackedState) -> "FusedLayer":
    plain: Callable[..., Any] = layer.forward
    fused = FusedLayer(layer, names)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if state.layout is None or not state.is_fused:
            return plain(hidden_states, *args, **kwargs)
        bias = kwargs.get("position_bias", args[1] if names.gives_tuple and len(args) > 1 else None)
        run = fused.in_form(state.form or fused.best_form(hidden_states[0]))
        out = run(hidden_states[0], state.layout, bias)[None]
        return (out,) if names.gives_tuple else out

    layer.forward = forward
    return fused


def copied_bytes(layers: "list[FusedLayer]", largest: int) -> int:
    """Bytes that the layers take in addition once they are prepacked; 0 where they cannot be or it is too much."""
    size = sum(layer.copied_bytes for layer in layers)
    return size if size <= largest and all(layer.can_be_prepacked for layer in layers) else 0


class FusedLayer:
    """One layer on a packed row."""

    def __init__(self, layer: nn.Module, names: _Names) -> None:
        part: Callable[[str], Any] = layer.get_submodule
        self._attention = part(names.attention)
        projections = [part(name) for name in (names.query, names.key, names.value)]
        self._weight, self._bias = (_join(projections, kind) for kind in ("weight", "bias"))
        self._context, self._up, self._down = part(names.context), part(names.up), part(names.down)
        self._first_norm, self._second_norm = part(names.first_norm), part(names.second_norm)
        activation = part(names.activation)
        is_exact = type(activation) is GELUActivation and activation.act is nn.functional.gelu
        self._activate: Callable[[Tensor], Tensor] = gelu if is_exact else activation
        self._operator = "Gelu" if is_exact else "Relu" if type(activation) is nn.ReLU else None
        self._prepacked: tuple[Projection, Block] | None = None
        heads = getattr(self._attention, "num_attention_heads", None) or self._attention.n_heads
        self._head_shape = (3, int(heads), projections[0].out_features // int(heads))

    @property
    def can_be_prepacked(self) -> bool:
        """Whether `engines/prepacked.py` knows such layers."""
        weight = self._weight
        return self._operator is not None and weight.device.type == "cpu" and weight.dtype == torch.float32

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights of its products."""
        weights = (self._weight, self._context.weight, self._up.weight, self._down.weight)
        return sum(weight.numel() * weight.itemsize for weight in weights)

    def prepack(self) -> None:
        """Make the copy for the form `prepacked`, if there is none."""
        if self._prepacked is not None:
            return
        assert self._operator is not None, "can_be_prepacked has been asked"
        parts = {
            "wc": self._context.weight, "bc": self._context.bias, "wu": self._up.weight, "bu": self._up.bias,
            "wd": self._down.weight, "bd": self._down.bias, "g1": self._first_norm.weight, "e1": self._first_norm.bias,
            "g2": self._second_norm.weight, "e2": self._second_norm.bias,
        }  # fmt: skip
        eps = self._first_norm.eps, self._second_norm.eps
        self._prepacked = Projection(self._weight, self._bias), Block(parts, self._operator, eps)

    def unpack(self) -> None:
        """Free the copy."""
        self._prepacked = None

    def best_form(self, x: Tensor) -> Form:
        """How a row of so many tokens is fastest on the threads that this one may use."""
        if torch.get_num_threads() == 1:
            return "prepacked" if self._prepacked is not None else "many"
        return "few" if len(x) <= _FEW_ROWS else "many"

    def in_form(self, form: Form) -> Callable[[Tensor, Layout, Tensor | None], Tensor]:
        """What runs it so. Few tokens are nothing of their own on a GPU, whose threads are not the CPU's."""
        few = self.few if self._weight.device.type == "cpu" else self.many
        return {"many": self.many, "few": few, "prepacked": self.prepacked}[form]

    def many(self, x: Tensor, layout: Layout, position_bias: Tensor | None) -> Tensor:
        """`[T, H]` to `[T, H]`."""
        context = self._attend(linear(x, self._weight, self._bias), layout, position_bias)
        x = _norm(self._context(context).add_(x), self._first_norm)
        return _norm(self._down(self._activate(self._up(x))).add_(x), self._second_norm)

    def few(self, x: Tensor, layout: Layout, position_bias: Tensor | None) -> Tensor:
        """The same with the weights as the left factor: see `_FEW_ROWS`."""
        num_rows = len(x)
        missing = (0, 0, 0, -num_rows % _ROWS_AT_ONCE)
        x = pad(x, missing)
        joined = torch.addmm(self._bias[:, None], self._weight, x.T).T[:num_rows].contiguous()
        context = pad(self._attend(joined, layout, position_bias), missing)
        x = _norm(x + _left_product(self._context, context.T).T, self._first_norm)
        inner = self._activate(_left_product(self._up, x.T))
        return _norm(x + _left_product(self._down, inner).T, self._second_norm)[:num_rows]

    def prepacked(self, x: Tensor, layout: Layout, position_bias: Tensor | None) -> Tensor:
        """The same on one thread, with weights in the order in which they are read."""
        assert self._prepacked is not None, "only the path of that name takes this form"
        project, finish = self._prepacked
        return finish(self._attend(project(x), layout, position_bias), x)

    def _attend(self, joined: Tensor, layout: Layout, position_bias: Tensor | None) -> Tensor:
        """Queries, keys and values `[T, 3 × H]` to what they find, `[T, H]`."""
        query, key, value = joined.view(-1, *self._head_shape).permute(1, 2, 0, 3)[:, None]  # each [1, heads, T, d]
        context, _ = packed_attention(
            self._attention, query, key, value, None,
            packed_layout=layout, scaling=self._head_shape[2] ** -0.5, is_causal=False, position_bias=position_bias,
        )  # fmt: skip
        return context[0].flatten(1)


def _left_product(part: nn.Linear, columns: Tensor) -> Tensor:
    """What the part makes of rows that stand as columns `[in, T]`, as columns `[out, T]`."""
    return torch.addmm(part.bias[:, None], part.weight, columns)


def _join(linears: list[nn.Linear], name: str) -> Tensor:
    """Their weights (or biases) as one tensor, of which each keeps its part: nothing is held twice."""
    own = [getattr(linear, name) for linear in linears]
    joined = torch.cat([tensor.detach() for tensor in own])
    for tensor, part in zip(own, joined.chunk(len(own)), strict=True):
        tensor.data = part
    return joined


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
