"""Architectures that need a hand to run packed: those whose attention bypasses transformers' attention interface.

Everything else about an architecture is read from the model itself (`engines/models/base.py`).
"""

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from engines.layers.attention import packed_attention
from engines.layers.packing import PackedLayout, PackedState


def adapt(model: nn.Module, state: PackedState) -> None:
    """Teach the parts of `model` that need it to read `state`; without a layout they do what they always did."""
    relative = [module for module in model.modules() if getattr(module, "has_relative_attention_bias", False)]
    for module in model.modules():
        kind = type(module).__name__
        if kind == "MPNetEncoder":
            _share_bias(module, "compute_position_bias", state, _mpnet_length, keep=True)
        elif kind == "MPNetSelfAttention":
            _pack_mpnet(module, state)
        elif module in relative and hasattr(module, "compute_bias"):
            _share_bias(module, "compute_bias", state, _t5_length, keep=len(relative) == 1)


def why_not_packed(model: Any) -> tuple[str, ...]:
    """What the architecture itself says against packing; nothing where trying will tell (MPNet is taught to)."""
    if model._is_stateful:
        return ("padded: its layers carry a state from token to token, which would run on into the next text",)
    if not model._can_set_attn_implementation() and model.config.model_type != "mpnet":
        return ("padded: its attention takes no function of ours",)
    return ()


def switch_attention(model: Any, implementation: str) -> None:
    """Have the model attend by a function that transformers knows under this name, if it can."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(implementation)
    elif model.config.model_type == "mpnet":  # only decides whether a mask is made
        model.config._attn_implementation = implementation


def padding_id(model: Any) -> int:
    """The token that fills padded batches; configs of models that also see or hear leave it to their text half."""
    ids = (getattr(config, "pad_token_id", None) for config in (model.config, model.config.get_text_config()))
    return next((token for token in ids if isinstance(token, int)), 0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What repeats, one after the other: between two of them a pass can pause."""
    return [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]


def _mpnet_length(longest: int, hidden: Tensor) -> tuple[Any, ...]:
    return (hidden.new_empty(1, longest, 1),)


def _t5_length(longest: int, *_: Any) -> tuple[Any, ...]:
    return (longest, longest)


def _share_bias(
    module: nn.Module, name: str, state: PackedState, shrink: Callable[..., tuple[Any, ...]], *, keep: bool
) -> None:
    """Relative position bias for the longest text instead of the whole row: it depends on `i - j` only.

    Args:
        keep: hold the largest bias so far, as its corner serves every shorter text. Not where every layer has a bias
            of its own (UMT5): all of them together would be large.
    """
    compute: Callable[..., Tensor] = getattr(module, name)
    kept: list[Tensor] = []

    def bias(*args: Any, **kwargs: Any) -> Tensor:
        if state.layout is None:
            return compute(*args, **kwargs)
        longest = state.layout.longest
        if not keep:
            return compute(*shrink(longest, *args), **kwargs)
        held = kept[:1]  # another thread may put another one there meanwhile
        if held and held[0].shape[-1] >= longest:
            return held[0]
        made = compute(*shrink(longest, *args), **kwargs)
        kept[:] = [made]
        return made

    setattr(module, name, bias)


def _pack_mpnet(attention: nn.Module, state: PackedState) -> None:
    """MPNet's self-attention has no attention interface; the same projections around `packed_attention`."""
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
    """Position ids of a packed row, counted as the model's own embeddings would count them for each text alone.

    RoBERTa, XLM-RoBERTa, CamemBERT and MPNet keep a `padding_idx` beside a learned table: they start behind it, and
    pass over a pad token that stands in a text (somebody wrote "<pad>"). All others count from 0.

    Attributes:
        limit: how many tokens the learned table has room for; None where positions are computed.
        filler: a token that takes no place, however often it stands in a row.
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
        """Ids `[T]` for the tokens `row` `[T]`."""
        if self._padding is None:
            return layout.positions
        counted = (row != self._padding).long()
        before = counted.cumsum(0) - counted
        return (before - before[layout.starts][layout.segments] + 1) * counted + self._padding


def drop_pooler(model: nn.Module) -> None:
    """BERT's pooler feeds a vector that no embedder reads; some models call theirs without looking, so one stays."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", nn.Identity())  # noqa: B010  # nn.Module types attributes as modules only


def unused_weights(missing: set[str]) -> set[str]:
    """Of the weights that a checkpoint lacks, those that no embedding passes through."""
    return {name for name in missing if name.split(".")[0] == "pooler"}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: tied weights count once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())
