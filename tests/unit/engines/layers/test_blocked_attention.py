"""Attention in blocks, and products by oneDNN: the results of torch's own, and when they are used."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.layers import blocked_attention as blocked
from engines.layers import products
from engines.layers.attention import packed_attention
from engines.layers.blocked_attention import blocked_attention, is_faster
from engines.layers.packing import PackedLayout, PackedState
from engines.layers.products import linear, onednn_is_faster, onednn_linear, replace_products

CPU = torch.device("cpu")


def states(length: int, heads: int = 4, kv_heads: int = 2, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value as parts of one product, as the layers have them."""
    torch.manual_seed(5)
    joined = torch.randn(length, heads + 2 * kv_heads, width)
    query, key, value = joined.split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]  # upstream
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def visible(length: int, num_keys: int, *, causal: bool, window: int | None) -> Tensor:
    ahead = torch.arange(num_keys)[None, :] - torch.arange(num_keys - length, num_keys)[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 300, 600, 5000])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_blocks_give_what_torch_gives(length: int, window: int | None, *, causal: bool) -> None:
    q, k, v = states(length)
    mask = visible(length, length, causal=causal, window=window)
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True)

    found = blocked_attention(q, k, v, causal=causal, window=window, scaling=0.2)

    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("length", [1, 300])
def test_queries_may_be_those_of_the_last_keys(length: int, window: int | None) -> None:
    q, k, v = states(600)
    mask = visible(length, 600, causal=True, window=window)
    q = q[:, :, -length:]
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    assert torch.allclose(blocked_attention(q, k, v, causal=True, window=window, scaling=None), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "width", "window", "faster"),
    [
        (256, 32, None, True),
        (255, 64, None, False),
        (192, 128, None, True),
        (191, 128, None, False),
        (2048, 16, None, False),
        (2048, 64, 255, False),
        (2048, 64, 256, True),
    ],
)
def test_blocks_are_used_where_they_measured_faster(
    monkeypatch: pytest.MonkeyPatch, length: int, width: int, window: int | None, *, faster: bool
) -> None:
    monkeypatch.setattr(blocked, "onednn_is_faster", lambda: True)
    query = torch.empty(1, 1, length, width)

    assert is_faster(query, window=window) == faster
    assert not is_faster(query.bfloat16(), window=window)
    monkeypatch.setattr(blocked, "onednn_is_faster", lambda: False)
    assert not is_faster(query, window=window)


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_blocks_give_what_torch_gives_whatever_the_scores(factor: float) -> None:
    q, k, v = states(300)
    q = q * factor
    expected = functional.scaled_dot_product_attention(q, k, v, scale=1.0, is_causal=True, enable_gqa=True)

    found = blocked_attention(q, k, v, causal=True, window=None, scaling=1.0)

    assert torch.allclose(found, expected, atol=1e-5 if factor == 1.0 else 1e-3)


@pytest.mark.parametrize("lengths", [[600], [40, 600, 600], [5, 5]])
def test_a_long_text_of_a_row_runs_in_blocks_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    q, k, v = states(sum(lengths))
    layer, layout = nn.Module(), PackedLayout(lengths, CPU)
    monkeypatch.setattr(blocked, "onednn_is_faster", lambda: False)
    expected, _ = packed_attention(layer, q, k, v, None, packed_layout=layout)
    monkeypatch.setattr(blocked, "onednn_is_faster", lambda: True)
    found, _ = packed_attention(layer, q, k, v, None, packed_layout=layout)
    layout.in_blocks = True
    forced, _ = packed_attention(layer, q, k, v, None, packed_layout=layout)

    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(forced, expected, atol=1e-5)
    assert torch.equal(found, expected) == (max(lengths) < 256)


@pytest.mark.parametrize("rows", [1, 13, 128])
def test_a_product_is_the_same_in_both_libraries(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 2, 48)[:, 1], torch.randn(40, 48), torch.randn(40)

    assert torch.allclose(onednn_linear(x, weight, bias), functional.linear(x, weight, bias), atol=1e-5)
    assert torch.allclose(onednn_linear(x[None], weight), functional.linear(x[None], weight), atol=1e-5)


@pytest.mark.parametrize(("usual_s", "onednn_s", "faster"), [(2.0, 1.0, True), (1.1, 1.0, False), (1.0, 2.0, False)])
def test_onednn_is_taken_where_it_measured_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, usual_s: float, onednn_s: float, *, faster: bool
) -> None:
    monkeypatch.setattr(products, "_fastest_s", lambda *_: (usual_s, onednn_s))

    assert onednn_is_faster.__wrapped__() == faster


def test_onednn_is_not_taken_where_its_products_are_wrong_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_fastest_s", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(products, "onednn_linear", lambda x, weight: functional.linear(x, weight) + 0.1)
    assert not onednn_is_faster.__wrapped__()

    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(products, "onednn_linear", fail)
    assert not onednn_is_faster.__wrapped__()


def test_only_float32_products_of_plain_weights_run_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(x)
        return functional.linear(x, weight, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "onednn_linear", recorded)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    linear(x.bfloat16(), weight.bfloat16())
    linear(x, torch.randn(4, 16)[:, ::2])  # for such strides oneDNN has no fast kernel
    linear(x, weight)

    assert [each is x for each in taken] == [True]


def test_the_products_of_a_model_are_replaced_in_packed_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "linear", lambda x, weight, bias: torch.zeros(len(x), len(weight)))
    model, state, x = nn.Sequential(nn.Linear(4, 3)), PackedState(), torch.randn(2, 4)
    expected = model(x)
    replace_products(model, state)

    assert torch.equal(model(x), expected)
    with state.running(PackedLayout([2], CPU), is_fused=False):
        assert not model(x).any()
    assert torch.equal(model(x), expected)
