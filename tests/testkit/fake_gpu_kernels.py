"""What `tests/testkit/fake_gpu.py` must know of single operations: those that a CPU has not, and those that wait.

The kernels compute on the CPU what the ones of a GPU compute, and refuse the arguments that those refuse.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.testkit.encoders import varlen

READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip
"""Operations whose result, or its shape, is values that the host reads; of some, one overload only."""

_LARGEST_HEAD = 256
_HALF = (torch.float16, torch.bfloat16)

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operation and its arguments."""


def chosen_attention(  # noqa: PLR0913  # the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call | None:
    """Returns the kernel that `scaled_dot_product_attention` runs on a GPU since Ampere; None for single operations.

    Flash attention takes no mask and half precision only; memory-efficient attention takes as many keys as queries.
    """
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= _LARGEST_HEAD:
        return _FLASH, (query, key, value, dropout_p, is_causal), {"scale": scale}
    if query.shape[-3] == key.shape[-3]:
        return _EFFICIENT, (query, key, value, attn_mask, False, dropout_p, is_causal), {"scale": scale}
    return None


def _check_flash(query: Tensor, key: Tensor, value: Tensor, *offsets: Tensor | None) -> None:
    """Refuses what flash attention's kernel for rows of several texts refuses (`mha_varlen_fwd`)."""
    for name, states in {"query": query, "key": key, "value": value}.items():
        _require(states.dtype in _HALF, f"{name} is {states.dtype}")
        _require(states.ndim == 3, f"{name} has {states.ndim} dimensions, not [tokens, heads, width]")
        _require(states.stride(-1) == 1, f"{name} is not contiguous in its last dimension")
    width = query.shape[-1]
    _require(width % 8 == 0 and width <= _LARGEST_HEAD, f"heads are {width} wide")
    _require(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} heads of queries for {key.shape[1]} of keys")
    for cumulated in offsets:
        assert cumulated is not None, "rows of several texts have offsets"
        _require(cumulated.dtype == torch.int32, f"offsets are {cumulated.dtype}")
        _require(cumulated.is_contiguous(), "offsets are not contiguous")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(f"flash attention: {problem}")


def _varlen_operator(  # noqa: PLR0913  # the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    offsets_k: Tensor,
    longest: int,
    longest_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    *unused: Any,
) -> tuple[Tensor]:
    """`torch_attn::_varlen_attn`."""
    assert not any(value is not None for value in unused)
    return _flash_rows(query, key, value, (offsets, offsets_k), (longest, longest_k), is_causal, scale, window_size)


def _flash_operator(  # noqa: PLR0913  # the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    offsets_k: Tensor,
    longest: int,
    longest_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unused: Any,
) -> tuple[Tensor]:
    """`aten::_flash_attention_forward`."""
    assert not dropout and not return_debug_mask and not any(value is not None for value in unused.values())
    window = [-1 if side is None else side for side in (window_size_left, window_size_right)]
    return _flash_rows(query, key, value, (offsets, offsets_k), (longest, longest_k), is_causal, scale, window)


def _flash_rows(  # noqa: PLR0913  # what both operators have in common
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    is_causal: bool,
    scale: float | None,
    window: list[int] | None,
) -> tuple[Tensor]:
    _check_flash(query, key, value, *offsets)
    left, right = window or (-1, -1)
    out = varlen(
        query, key, value, *offsets, *longest,
        scale=scale, window_size=(left, 0 if is_causal else right), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return (out,)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    scale: float | None = None,
) -> tuple[Tensor]:
    is_grouped = query.shape[-3] != key.shape[-3]
    return (
        scaled_dot_product_attention(query, key, value, None, dropout, is_causal, scale=scale, enable_gqa=is_grouped),
    )


def _efficient(  # noqa: PLR0913  # the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor]:
    return (scaled_dot_product_attention(query, key, value, bias, dropout, is_causal, scale=scale),)


def _histogram(values: Tensor, *options: Any, **named: Any) -> tuple[Tensor]:
    return (torch.histc(values.float(), *options, **named).to(values.dtype),)


KERNELS: Mapping[str, Callable[..., tuple[Tensor]]] = {
    "_varlen_attn": _varlen_operator,
    "_flash_attention_forward": _flash_operator,
    "histc": _histogram,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
}
"""By operation: what computes its first result on CPU tensors."""
