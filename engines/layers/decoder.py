"""Runs the layers of decoders (Qwen3, Qwen2, Mistral, Llama, Gemma 3) in fewer steps: the same weights and formulas.

Query, key and value are one product, norms are one step each, the rotary embedding turns queries and keys at once and
in place, and sums are made in place. Gate and up stay two products: one that gives both measures the same (28.9 against
28.5 ms for 512 tokens of 1,024 to 3,072), and its halves are slower to read. No keys or values are kept. Where all
products are packed, layers run by `engines/layers/decoder_script.py`.

Where only the last token of each text is pooled, the last layer computes keys and values of all tokens, and everything
else of the last tokens only. As every path, this one is used only where `engines/models/verification.py` finds that it
gives the vectors of the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import GELUTanh, SiLUActivation

from engines.device.huge_pages import join_rows
from engines.device.load_throttle import throttle_point
from engines.layers.attention import packed_attention, resolve_causal, single_query_attention
from engines.layers.decoder_script import LayerShape, LayerTensors, ScriptedLayer, compiled
from engines.layers.host_layers import resident
from engines.layers.packed_linear import PackedLinear, Product, ProductFactory, replace_joined
from engines.layers.packing import PackedLayout, PackedState
from engines.layers.products import apply, linear

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the positions of a row, `[T, 1, d]` each."""


_LIBRARY = "transformers.models."

_BEFORE = {"input_layernorm", "post_attention_layernorm"}
_AROUND = _BEFORE | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEAR = {*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}


_ACTIVATIONS = {nn.SiLU: ("swish", ""), SiLUActivation: ("swish", ""), GELUTanh: ("gelu", "tanh")}
"""Activations of a gate that oneDNN computes within the product: its names of them and of their algorithms."""


@dataclass(frozen=True)
class DecoderFamily:
    """What distinguishes the layers of one model family.

    Attributes:
        norms: the names of the norms: in front of attention and MLP, or also behind them.
        has_head_norms: whether queries and keys are normalized, each head by itself.
        offset: added to the weights of norms.
        has_config_window: whether every layer has the config's sliding window, not one of its own.
    """

    norms: frozenset[str] = frozenset(_BEFORE)
    has_head_norms: bool = False
    offset: float = 0.0
    has_config_window: bool = False


_FAMILIES = {
    "LlamaDecoderLayer": DecoderFamily(),
    "MistralDecoderLayer": DecoderFamily(has_config_window=True),
    "Qwen2DecoderLayer": DecoderFamily(),
    "Qwen3DecoderLayer": DecoderFamily(has_head_norms=True),
    "Gemma3DecoderLayer": DecoderFamily(frozenset(_AROUND), has_head_norms=True, offset=1.0),
}
"""Families by the name of the library's layer; code that comes with a model may do more than its parts show."""


def _family_of(layer: nn.Module) -> DecoderFamily | None:
    """Returns the family of a layer that has exactly the parts of that family, else None."""
    family = _FAMILIES.get(type(layer).__name__)
    if family is None or not type(layer).__module__.startswith(_LIBRARY):
        return None
    parts = {name: part for name, part in layer.named_modules() if not list(part.children())}
    norms = family.norms | (_HEAD_NORMS if family.has_head_norms else set())
    if set(parts) != _LINEAR | norms | {"mlp.act_fn"}:
        return None
    are_linear = all(type(parts[name]) is nn.Linear for name in _LINEAR)
    return family if are_linear and len({parts[name].bias is None for name in _QKV}) == 1 else None


def fuse_decoder(model: nn.Module, state: PackedState) -> "list[FusedDecoderLayer]":
    """Replaces the forward methods of the layers of `model`, which run fused while `state` says so.

    Returns:
        The fused layers; none where the layers are not supported, and then nothing is changed.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    families = {_family_of(layer) for stack in stacks for layer in stack}
    family = families.pop() if len(stacks) == len(families) == 1 else None
    if family is None:
        return []
    fused = []
    for layer in stacks[0]:
        with resident(layer):
            fused.append(_fuse_layer(layer, family, state, is_last=layer is stacks[0][-1]))
        throttle_point()
    return fused


def _fuse_layer(layer: nn.Module, family: DecoderFamily, state: PackedState, *, is_last: bool) -> "FusedDecoderLayer":
    """Replaces the forward method of a layer, which runs as before outside of a fused row."""
    plain: Callable[..., Any] = layer.forward
    fused = FusedDecoderLayer(layer, family, state.pause, is_last=is_last)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if state.layout is None or not state.is_fused:
            return plain(hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        run = fused.last_tokens if is_last and state.kept == "last" else fused
        return run(hidden_states[0], state.layout.on(hidden_states.device), (cos[0, :, None], sin[0, :, None]))[None]

    layer.forward = forward
    return fused


class FusedDecoderLayer:
    """Runs one layer on a packed row.

    Args:
        pause: called between the layer's products: other rows need not wait for a whole layer.

    Attributes:
        is_causal: whether a token attends to those before it only.
    """

    def __init__(self, layer: Any, family: DecoderFamily, pause: Callable[[], None], *, is_last: bool) -> None:
        self._pause = pause
        self._layer, self._is_last = layer, is_last
        self._attention, self._mlp = layer.self_attn, layer.mlp
        self._width = int(self._attention.head_dim)
        self._scaling = float(self._attention.scaling)
        self._window: int | None = (
            self._attention.config.sliding_window
            if family.has_config_window
            else getattr(self._attention, "sliding_window", None)
        )
        self.is_causal = resolve_causal(self._attention, None)
        parts = [layer.get_submodule(name) for name in _QKV]
        self._weight = _join([part.weight for part in parts])
        self._bias = None if parts[0].bias is None else _join([part.bias for part in parts])
        self._products: list[Product] = []
        self._script: ScriptedLayer | None = None
        self._num_query_rows: int = parts[0].out_features
        self._heads, self._kv_heads = (part.out_features // self._width for part in parts[:2])
        self._before_attention = _Norm(layer.input_layernorm, family.offset)
        if len(family.norms) == len(_BEFORE):
            self._after_attention: Callable[[Tensor], Tensor] = _unchanged
            self._before_mlp = _Norm(layer.post_attention_layernorm, family.offset)
            self._after_mlp: Callable[[Tensor], Tensor] = _unchanged
        else:
            self._after_attention = _Norm(layer.post_attention_layernorm, family.offset)
            self._before_mlp = _Norm(layer.pre_feedforward_layernorm, family.offset)
            self._after_mlp = _Norm(layer.post_feedforward_layernorm, family.offset)
        self._head_norms = None
        if family.has_head_norms:
            norms = (self._attention.q_norm, self._heads), (self._attention.k_norm, self._kv_heads)
            self._head_norms = _HeadNorms(norms, family.offset)

    def __call__(self, x: Tensor, layout: PackedLayout, rope: Rope) -> Tensor:
        """Runs the layer, `[T, H]` to `[T, H]`."""
        if self._script is not None:
            return self._run_scripted(self._script, x, layout, rope)
        heads, values = self._split(self._joined(self._before_attention(x)))
        self._pause()
        heads = _rotate(heads, rope)
        context = self._attend((heads[:, : self._heads], heads[:, self._heads :], values), layout)
        self._pause()
        return self._finish(x, context)

    def _attend(self, states: tuple[Tensor, Tensor, Tensor], layout: PackedLayout) -> Tensor:
        """Returns the context `[T, heads × d]` of queries, keys and values, `[T, count, d]` each."""
        query, key, value = (_as_row(part) for part in states)
        context, _ = packed_attention(
            self._attention, query, key, value, None,
            packed_layout=layout, scaling=self._scaling, is_causal=self.is_causal, sliding_window=self._window,
        )  # fmt: skip
        return context[0].flatten(1)

    def _run_scripted(self, script: ScriptedLayer, x: Tensor, layout: PackedLayout, rope: Rope) -> Tensor:
        """Runs the layer by `engines/layers/decoder_script.py`: at once, or step by step."""
        is_inside = script.attends(layout)
        if is_inside and script.is_whole(layout):
            return script(x, layout, *rope)
        query, key, value = script.query_key_value(x, *rope)
        self._pause()
        if is_inside:
            context = script.attend(query, key, value, layout)
        else:
            context = self._attend((query.to(x.dtype), key.to(x.dtype), value), layout)
        self._pause()
        return script.finish(x, context)

    @property
    def is_scripted(self) -> bool:
        """Whether the layer runs by `engines/layers/decoder_script.py`: short texts at once, others step by step."""
        return self._script is not None

    def last_tokens(self, x: Tensor, layout: PackedLayout, rope: Rope) -> Tensor:
        """Runs the layer for the last token of each text, `[T, H]` to `[n, H]`."""
        last = layout.ends - 1
        if self._script is not None:
            query, key, value = map(_as_row, self._script.last_query_key_value(x, last, *rope))
            context = single_query_attention(query, key, value, layout, scaling=self._scaling, window=self._window)
            return self._script.finish(x[last], context.flatten(1))
        normed = self._before_attention(x)
        queries, others = self._query_and_others(normed[last], normed)
        query, _ = self._split(queries, first=0, count=self._heads)
        key, value = self._split(others, first=self._heads, count=self._kv_heads)
        query, key = _rotate(query, (rope[0][last], rope[1][last])), _rotate(key, rope)
        query, key, value = (_as_row(part) for part in (query, key, value))
        context = single_query_attention(query, key, value, layout, scaling=self._scaling, window=self._window)
        return self._finish(x[last], context.flatten(1))

    def replace_products(self, make: ProductFactory, make_joined: ProductFactory) -> None:
        """Replaces the layer's products (queries, keys and values by `make_joined`), also in the model's own layer, and
        frees their weights.

        The last layer has one for queries and one for keys and values, since `last_tokens` needs them so.
        """
        sizes = [self._num_query_rows, len(self._weight) - self._num_query_rows]
        sizes = sizes if self._is_last else [sum(sizes)]
        biases = [None] * len(sizes) if self._bias is None else torch.split(self._bias, sizes)
        self._products = [make_joined(*both) for both in zip(torch.split(self._weight, sizes), biases, strict=True)]
        self._weight, self._bias = self._weight.new_empty(0), None
        replace_joined(self._layer, _QKV, "self_attn", self._products)
        for name in sorted(_LINEAR - set(_QKV)):
            part: Any = self._layer.get_submodule(name)
            self._layer.set_submodule(name, make(part.weight, part.bias))
        self._script = self._scripted()

    def _scripted(self) -> ScriptedLayer | None:
        """Returns the layer in TorchScript; None where that is not there, or does not know a product or activation."""
        mlp, activation = self._mlp, _ACTIVATIONS.get(type(self._mlp.act_fn))
        products = [*self._products, self._attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        packed = [product for product in products if type(product) is PackedLinear]
        if activation is None or len(packed) < len(products) or compiled() is None:
            return None
        joined = [packed[0], packed[-5]]  # the last layer has two of them
        queries_first = [*joined, *packed[-4:]]
        weights = [self._before_attention.wide(), *(product.packed for product in queries_first)]
        weights.insert(4, self._before_mlp.wide())
        head_norms = [] if self._head_norms is None else self._head_norms.swapped()
        behind = [norm.wide() for norm in (self._after_attention, self._after_mlp) if isinstance(norm, _Norm)]
        tensors = LayerTensors(weights, [product.bias for product in queries_first], head_norms, behind)
        eps = (self._before_attention.eps, 0.0 if self._head_norms is None else self._head_norms.eps)
        shape = LayerShape(
            self._heads, self._kv_heads, self._width, eps, self._scaling, self._window, self.is_causal, activation
        )
        return ScriptedLayer(tensors, shape, self._pause)

    def _joined(self, x: Tensor) -> Tensor:
        """Returns queries, keys and values `[T, rows]` of `[T, H]`."""
        if not self._products:
            return linear(x, self._weight, self._bias)
        found = [product(x) for product in self._products]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _query_and_others(self, last: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the queries of some tokens, and the keys and values of all."""
        if self._products:
            query, others = self._products
            return query(last), others(x)
        split = self._num_query_rows
        biases = (None, None) if self._bias is None else (self._bias[:split], self._bias[split:])
        return linear(last, self._weight[:split], biases[0]), linear(x, self._weight[split:], biases[1])

    def _split(self, joined: Tensor, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns queries and keys, normalized, `[T, count, d]`, and what stands behind them."""
        joined = joined.view(len(joined), -1, self._width)
        count = self._heads + self._kv_heads if count is None else count
        heads, rest = joined[:, :count], joined[:, count:]
        return (heads if self._head_norms is None else self._head_norms(heads, first)), rest

    def _finish(self, x: Tensor, context: Tensor) -> Tensor:
        """Runs what follows attention, from the layer's input `[T, H]` and the context `[T, heads × d]`."""
        mlp = self._mlp
        x = self._after_attention(apply(self._attention.o_proj, context)).add_(x)
        normed = self._before_mlp(x)
        self._pause()
        gate = self._gate(normed)
        self._pause()
        inner = gate.mul_(apply(mlp.up_proj, normed))
        self._pause()
        return self._after_mlp(apply(mlp.down_proj, inner)).add_(x)

    def _gate(self, x: Tensor) -> Tensor:
        """Returns the gate of the inner activations, `[T, H]` to `[T, inner]`. In bfloat16 the product computes SiLU:
        torch's takes as long there as half of the product."""
        mlp = self._mlp
        if type(mlp.act_fn) not in (nn.SiLU, SiLUActivation):
            gated: Tensor = mlp.act_fn(apply(mlp.gate_proj, x))
            return gated
        if type(mlp.gate_proj) is PackedLinear:
            return mlp.gate_proj.multiply_and_silu(x)
        return silu(apply(mlp.gate_proj, x), inplace=True)


class _Norm:
    """A root mean square norm in one step; in other dtypes than float32 the model's own, which rounds in its order."""

    def __init__(self, norm: Any, offset: float) -> None:
        self._norm, self._weight, self.eps = norm, _norm_weight(norm, offset), _epsilon(norm)
        self._offset = offset

    def wide(self) -> Tensor:
        """Returns the weights in float32."""
        return self._norm.weight.detach().float() + self._offset  # type: ignore[no-any-return]  # a norm of any kind

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            normed: Tensor = self._norm(x)
            return normed
        return rms_norm(x, x.shape[-1:], self._weight, self.eps)


class _HeadNorms:
    """The norms of queries and keys, which have weights of their own, in one step."""

    def __init__(self, norms: tuple[tuple[Any, int], ...], offset: float) -> None:
        self._norms = norms
        self._weight = torch.cat([_norm_weight(norm, offset).expand(count, -1) for norm, count in norms])
        self.eps = _epsilon(norms[0][0])
        self._offset = offset

    def swapped(self) -> list[Tensor]:
        """Returns the weights of both norms in float32, each followed by itself with its halves swapped."""
        wide = [norm.weight.detach().float() + self._offset for norm, _ in self._norms]
        return [tensor for weight in wide for tensor in (weight, weight.roll(len(weight) // 2))]

    def __call__(self, heads: Tensor, first: int) -> Tensor:
        """Normalizes `[T, count, d]`, the heads from `first` on."""
        if heads.dtype is torch.float32:
            normed = rms_norm(heads, heads.shape[-1:], None, self.eps)
            return normed.mul_(self._weight[first : first + heads.shape[1]])
        (of_query, num_queries), (of_key, _) = self._norms
        split = max(0, num_queries - first)
        return torch.cat([of_query(heads[:, :split]), of_key(heads[:, split:])], dim=1)


def _norm_weight(norm: Any, offset: float) -> Tensor:
    weight: Tensor = norm.weight.detach()
    return weight + offset if offset else weight


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _as_row(heads: Tensor) -> Tensor:
    """Views heads `[T, count, d]` as `[1, count, T, d]`."""
    return heads.transpose(0, 1)[None]


def _rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Applies the rotary embedding to `[T, count, d]`: of each pair of halves, both turned by the same angles."""
    cos, sin = rope
    half = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def _join(parts: list[Tensor]) -> Tensor:
    """Joins weights (or biases) of any number of rows to one tensor, of which each part becomes a view."""
    joined = join_rows([part.detach() for part in parts])
    for part, rows in zip(parts, torch.split(joined, [len(part) for part in parts]), strict=True):
        part.data = rows
    return joined
