"""Tokens to which no other attends: packed attention gives what a padded batch with a mask gives."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engines.inputs.token_ids import UNSEEN, Ids
from engines.layers.attention import packed_attention
from engines.layers.packing import PackedLayout

HEADS, WIDTH = 3, 8


def row_of(lengths: list[int], seen: list[int]) -> PackedLayout:
    layout = PackedLayout(lengths, torch.device("cpu"))
    layout.texts = [_text(length, visible) for length, visible in zip(lengths, seen, strict=True)]
    return layout


def _text(length: int, seen: int) -> Ids:
    return np.arange(length, dtype=np.int64) | np.where(np.arange(length) < seen, 0, UNSEEN)


class Module(torch.nn.Module):
    is_causal = False


def draw(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, HEADS, num_tokens, WIDTH, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_text_gets_what_the_mask_of_a_padded_batch_gives(causal: bool, window: int | None, has_bias: bool) -> None:
    lengths, seen = [9, 9, 9, 4, 4], [3, 9, 6, 4, 3]
    query, key, value = draw(sum(lengths))
    bias = torch.randn(1, HEADS, 12, 12, generator=torch.Generator().manual_seed(6)) if has_bias else None

    found, _ = packed_attention(
        Module(), query, key, value, None, packed_layout=row_of(lengths, seen), is_causal=causal,
        sliding_window=window, position_bias=bias,
    )  # fmt: skip

    start = 0
    for length, visible in zip(lengths, seen, strict=True):
        q, k, v = (states[:, :, start : start + length] for states in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        allowed = (torch.arange(length) < visible)[None, :].expand(length, length).clone()
        allowed &= (distance >= 0) if causal else torch.ones_like(allowed)
        allowed &= (distance.abs() < window) if window is not None else torch.ones_like(allowed)
        mask = torch.where(allowed, 0.0, float("-inf"))
        mask = mask if bias is None else mask + bias[..., :length, :length]
        wanted = scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, HEADS, length, length))
        has_keys = allowed.any(-1)
        mine = found[:, start : start + length].transpose(1, 2)
        assert torch.allclose(mine[:, :, has_keys], wanted[:, :, has_keys], atol=1e-6)
        start += length


def test_a_row_without_such_tokens_knows_none() -> None:
    layout = row_of([4, 2], [4, 2])

    assert layout.num_visible is None
