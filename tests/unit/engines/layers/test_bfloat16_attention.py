"""Tests attention in bfloat16 by products of all heads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers.bfloat16_attention import MAX_TOKENS, bfloat16_attention, is_faster


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def _states(texts: int, heads: int, length: int, width: int) -> torch.Tensor:
    return torch.randn(texts, length, heads, width).transpose(1, 2).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("texts", "heads", "kv_heads", "length", "width"),
    [(1, 3, 3, 1, 32), (5, 4, 4, 7, 32), (3, 4, 2, 100, 64), (2, 3, 3, 400, 16), (40, 12, 12, 60, 8)],
)
@pytest.mark.parametrize("scaling", [None, 0.3])
@torch.inference_mode()
def test_it_is_attention(texts: int, heads: int, kv_heads: int, length: int, width: int, scaling: float | None) -> None:
    q = _states(texts, heads, length, width)
    k, v = (_states(texts, kv_heads, length, width) for _ in range(2))
    wanted = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=scaling, enable_gqa=kv_heads < heads
    )

    found = bfloat16_attention(q, k, v, scaling)

    assert found.dtype is torch.bfloat16
    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.01


@torch.inference_mode()
def test_a_text_depends_on_no_other_text_of_the_batch() -> None:
    q, k, v = (_states(6, 4, 30, 32) for _ in range(3))

    together, alone = bfloat16_attention(q, k, v, None), bfloat16_attention(q[2:3], k[2:3], v[2:3], None)

    assert float((together[2] - alone[0]).abs().max()) <= 0.01 * float(alone.abs().max())


@pytest.mark.skipif(not has_fast_bfloat16(), reason="this CPU has no instructions for bfloat16")
def test_it_is_for_whole_texts_of_bfloat16_up_to_a_length() -> None:
    query = _states(1, 2, MAX_TOKENS, 32)

    assert is_faster(query, causal=False, window=None)
    assert not is_faster(query, causal=True, window=None)
    assert not is_faster(query, causal=False, window=9)
    assert not is_faster(query.float(), causal=False, window=None)
    assert not is_faster(_states(1, 2, MAX_TOKENS + 1, 32), causal=False, window=None)
