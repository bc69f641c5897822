"""Adapts architectures that bypass transformers' attention interface so that they run packed.

Everything else about an architecture is read from the model itself (`engines/models/observation.py`).
"""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from engines.errors import UnsupportedModel
from engines.layers.attention import packed_attention
from engines.layers.packing import PackedLayout, PackedState


def adapt(model: nn.Module, state: PackedState) -> None:
    """Replaces methods of `model` that must know the packed layout in `state`; without a layout they run as before."""
    relative = [module for module in model.modules() if getattr(module, "has_relative_attention_bias", False)]
    for module in model.modules():
        kind = type(module).__name__
        if kind == "MPNetEncoder":
            _limit_bias(module, "compute_position_bias", state, _mpnet_arguments, keep=True)
        elif kind == "MPNetSelfAttention":
            _pack_mpnet(module, state)
        elif module in relative and hasattr(module, "compute_bias"):
            _limit_bias(module, "compute_bias", state, _t5_arguments, keep=len(relative) == 1)


def why_not_packed(model: Any) -> tuple[str, ...]:
    """Returns why the architecture cannot run packed; empty where the check at load decides (MPNet is adapted)."""
    if model._is_stateful:
        return ("padded: its layers carry a state from token to token, which would run on into the next text",)
    if not model._can_set_attn_implementation() and model.config.model_type != "mpnet":
        return ("padded: transformers cannot replace its attention function",)
    return ()


def switch_attention(model: Any, implementation: str) -> None:
    """Makes the model use the attention function that transformers knows under this name, if it can."""
    if model._can_set_attn_implementation():
        try:
            model.set_attn_implementation(implementation)
        except ValueError as error:
            raise UnsupportedModel(
                f"config.json describes a {model.config.model_type}, a part of which cannot use the attention of its "
                f"text part ({implementation}); serve the folder of its text model"
            ) from error
    elif model.config.model_type == "mpnet":  # only decides whether a mask is made
        model.config._attn_implementation = implementation


def padding_id(model: Any) -> int:
    """Returns the token that fills padded batches; multimodal configs state it in their text config."""
    ids = (getattr(config, "pad_token_id", None) for config in (model.config, model.config.get_text_config()))
    return next((token for token in ids if isinstance(token, int)), 0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated layers in order; a pass can be preempted between two of them."""
    return [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]


def _mpnet_arguments(longest: int, hidden: Tensor) -> tuple[Any, ...]:
    return (hidden.new_empty(1, longest, 1),)


def _t5_arguments(longest: int, *_: Any) -> tuple[Any, ...]:
    return (longest, longest)


def _limit_bias(
    module: nn.Module, name: str, state: PackedState, arguments: Callable[..., tuple[Any, ...]], *, keep: bool
) -> None:
    """Makes a module compute its relative position bias for the longest text instead of the whole row.

    The bias depends on `i - j` only.

    Args:
        name: of the method that computes the bias.
        arguments: returns the arguments of that method for texts of a length, from the original ones.
        keep: whether to keep the largest bias so far, whose corner serves every shorter text. Not where every layer
            has a bias of its own (UMT5): all of them together would be large.
    """
    compute: Callable[..., Tensor] = getattr(module, name)
    kept: list[Tensor] = []

    def bias(*args: Any, **kwargs: Any) -> Tensor:
        if state.layout is None:
            return compute(*args, **kwargs)
        longest = state.layout.longest
        if not keep:
            return compute(*arguments(longest, *args), **kwargs)
        largest = kept[:1]  # another thread may replace it meanwhile
        if largest and largest[0].shape[-1] >= longest:
            return largest[0]
        computed = compute(*arguments(longest, *args), **kwargs)
        kept[:] = [computed]
        return computed

    setattr(module, name, bias)


def _pack_mpnet(attention: nn.Module, state: PackedState) -> None:
    """Makes MPNet's self-attention, which has no attention interface, call `packed_attention` on its projections."""
    plain: Callable[..., Any] = attention.forward

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Any = None, **kwargs: Any
    ) -> Any:
        if state.layout is None:
            return plain(hidden_states, attention_mask, position_bias, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        context, _ = packed_attention(
            self, query, key, value, attention_mask,
            packed_layout=state.layout, scaling=1 / math.sqrt(self.attention_head_size), is_causal=False,
            position_bias=position_bias,
        )  # fmt: skip
        return (self.o(context.flatten(2)),)

    attention.forward = MethodType(forward, attention)


class Positions:
    """Computes the position ids of a packed row, as the model's own embeddings count them for each text alone.

    RoBERTa, XLM-RoBERTa, CamemBERT and MPNet have a `padding_idx` beside a learned table: they start after it, and
    skip a pad token inside a text (a caller wrote "<pad>"). All others count from 0.

    Attributes:
        limit: the number of tokens that the learned table has positions for; None where positions are computed.
        filler: a token that uses no further position, however often it is in a row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._padding: int | None = None
        self.limit: int | None = None
        self.filler = 0
        for module in model.modules():
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, nn.Embedding):
                padding = getattr(module, "padding_idx", None)
                self._padding = padding if isinstance(padding, int) else None
                self.filler = self._padding or 0
                self.limit = table.num_embeddings - (0 if self._padding is None else self._padding + 1)
                return

    def __call__(self, row: Tensor, layout: PackedLayout) -> Tensor:
        """Returns position ids `[T]` for the tokens `row` `[T]`."""
        if self._padding is None:
            return layout.positions
        counted = (row != self._padding).long()
        before = counted.cumsum(0) - counted
        return (before - before[layout.starts][layout.segments] + 1) * counted + self._padding


def drop_pooler(model: nn.Module) -> None:
    """Replaces BERT's pooler, whose result no embedder uses, by an identity: some models always call theirs."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", nn.Identity())  # noqa: B010  # nn.Module types attributes as modules only


def unused_weights(missing: set[str]) -> set[str]:
    """Returns the weights that a checkpoint lacks and that no embedding depends on."""
    return {name for name in missing if name.split(".")[0] == "pooler"}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Returns the bytes of the distinct storages of tensors: tied weights count once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())
