"""Tests attention in bfloat16 by products of several heads, and its shares by powers of two."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers import bfloat16_attention as module
from engines.layers.bfloat16_attention import attend_groups, bfloat16_attention, is_faster, padded_length
from engines.layers.packing import PackedLayout
from engines.layers.softmax import LOG2_E, shares_by_powers, shares_by_softmax, visible_keys


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


def _visible(length: int, num_keys: int, *, causal: bool, window: int | None) -> torch.Tensor:
    ahead = torch.arange(num_keys)[None, :] - torch.arange(num_keys - length, num_keys)[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


@pytest.mark.parametrize(
    ("length", "num_keys", "causal", "window"),
    [
        (70, 70, True, None),
        (300, 300, True, None),
        (90, 130, True, None),
        (1, 40, True, 7),
        (300, 300, True, 70),
        (300, 300, False, 70),
        (300, 300, False, 1),
        (300, 300, False, 900),
    ],
)
@torch.inference_mode()
def test_each_query_sees_its_own_keys_in_every_block(
    monkeypatch: pytest.MonkeyPatch, length: int, num_keys: int, window: int | None, *, causal: bool
) -> None:
    monkeypatch.setattr(module, "SCORES", 2**14)  # blocks of 64 queries and one head
    q = _states(2, 4, length, 32)
    k, v = (_states(2, 2, num_keys, 32) for _ in range(2))
    mask = _visible(length, num_keys, causal=causal, window=window)
    wanted = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)

    found = bfloat16_attention(q, k, v, None, causal=causal, window=window)

    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 9), (False, 9), (False, 2)])
@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.inference_mode()
def test_texts_of_several_lengths_attend_to_themselves(kv_heads: int, window: int | None, *, causal: bool) -> None:
    lengths = [1, 7, 7, 9, 16, 17, 40, 130]
    row = torch.randn(1, sum(lengths), 4 + 2 * kv_heads, 32).to(torch.bfloat16).transpose(1, 2)
    q, k, v = row.split([4, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]  # upstream
    layout = PackedLayout(lengths, torch.device("cpu"))

    found = attend_groups(q, k, v, layout.groups, None, causal=causal, window=window).double()

    for index, length in enumerate(lengths):
        first = sum(lengths[:index])
        text_q, text_k, text_v = (part[:, :, first : first + length].double() for part in (q, k, v))
        mask = _visible(length, length, causal=causal, window=window)
        wanted = scaled_dot_product_attention(text_q, text_k, text_v, attn_mask=mask, enable_gqa=kv_heads < 4)
        wanted = wanted[0].transpose(0, 1)
        texts = found[first : first + length]
        assert float((texts - wanted).norm() / wanted.norm()) < 0.01


def test_texts_are_padded_to_few_lengths_and_cut_into_few_blocks() -> None:
    padded = {padded_length(length) for length in range(1, 513)}
    sizes = {block.stop - block.start for texts in range(1, 90) for block in module._blocks(texts, 12, 1024)}

    assert len(padded) == 16
    assert all(padded_length(length) >= length for length in range(1, 2000))
    assert all(padded_length(length, 3) - length < 3 for length in range(1, 2000))
    assert sizes == {12, 24, 48, 96, 192, 384, 768}
    assert [(block.start, block.stop) for block in module._blocks(2, 12, 9)] == [(0, 9), (9, 12), (12, 21), (21, 24)]


@pytest.mark.parametrize("score", [30.0, 1000.0, -1000.0])
@torch.inference_mode()
def test_scores_of_any_size_give_attention(score: float) -> None:
    q, v = torch.eye(20, 32).expand(2, 3, 20, 32).to(torch.bfloat16), _states(2, 3, 20, 32)
    scores = score * torch.eye(20, dtype=torch.float64)

    found = bfloat16_attention(q, score * q, v, 1.0)

    assert torch.allclose(found.double(), torch.softmax(scores, dim=-1) @ v.double(), atol=0.01)


@pytest.mark.parametrize("moved_by", [0.0, 45.0, -45.0])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3), (False, 3)])
def test_shares_by_powers_are_those_of_softmax(window: int | None, moved_by: float, *, causal: bool) -> None:
    scores = 5 * torch.randn(2, 9, 9) + moved_by
    keys = visible_keys(0, 9, 9, causal=causal, window=window)
    mask = _visible(9, 9, causal=causal, window=window)
    wanted = torch.softmax(scores.double().masked_fill(~mask, float("-inf")), dim=-1)
    by_powers, by_softmax = scores * LOG2_E, scores * LOG2_E

    assert shares_by_powers(by_powers, keys)
    assert torch.allclose(by_powers.double(), wanted, atol=1e-5)
    assert torch.allclose(shares_by_softmax(by_softmax, keys).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("far", [200.0, -200.0, float("nan"), float("inf")])
def test_a_row_that_is_out_of_range_is_reported(far: float) -> None:
    scores = torch.randn(2, 4, 4)
    scores[1, 2] = far

    assert not shares_by_powers(scores, visible_keys(0, 4, 4, causal=False, window=None))


@pytest.mark.skipif(not has_fast_bfloat16(), reason="this CPU has no instructions for bfloat16")
def test_it_is_for_bfloat16() -> None:
    query = _states(1, 2, 600, 32)

    assert is_faster(query)
    assert not is_faster(query.float())
