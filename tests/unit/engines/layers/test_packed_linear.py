"""Tests products whose weights are kept in the form of the CPU's instructions."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engines.layers import packed_linear
from engines.layers.packed_linear import (
    Int8Embedding,
    Int8Linear,
    JoinedPart,
    PackedLinear,
    quantize_tokens,
    total_bytes,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.inference_mode():
        yield


def _linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(64, 48).to(dtype)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 130])
def test_a_packed_product_gives_what_torch_gives(dtype: torch.dtype, num_rows: int) -> None:
    layer, x = _linear(dtype), torch.randn(num_rows, 64, dtype=dtype)
    packed = PackedLinear(layer.weight, layer.bias)

    assert packed(x).dtype == dtype
    assert _cosine(packed(x), layer(x)) > (1 - 1e-10 if dtype == torch.float32 else 0.9999)
    assert packed(x[None]).shape == (1, num_rows, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_product_is_near_float32_and_a_quarter_of_its_size(dtype: torch.dtype) -> None:
    layer, x = _linear(), torch.randn(33, 64)
    product = Int8Linear(layer.weight, layer.bias.to(dtype))

    assert _cosine(product(x.to(dtype)), layer(x)) > 0.999
    assert product.size_bytes == 48 * 64 + 8 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_with_its_gelu_gives_what_both_give(dtype: torch.dtype) -> None:
    layer, x = _linear(dtype), torch.randn(2, 30, 64, dtype=dtype)

    found = PackedLinear(layer.weight, layer.bias).multiply_and_gelu(x)

    assert (found.shape, found.dtype) == ((2, 30, 48), dtype)
    wanted = nn.functional.gelu(layer.double()(x.double()))
    assert _cosine(found, wanted) > (1 - 1e-10 if dtype == torch.float32 else 0.9999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_with_its_silu_gives_what_both_give(dtype: torch.dtype) -> None:
    layer, x = _linear(dtype), torch.randn(2, 30, 64, dtype=dtype)

    found = PackedLinear(layer.weight, layer.bias).multiply_and_silu(x)

    assert (found.shape, found.dtype) == ((2, 30, 48), dtype)
    wanted = nn.functional.silu(layer.double()(x.double()))
    assert _cosine(found, wanted) > (1 - 1e-10 if dtype == torch.float32 else 0.9999)


def test_an_int8_product_gives_the_dtype_that_is_asked_for() -> None:
    layer, x = _linear(), torch.randn(5, 64, dtype=torch.bfloat16)
    product = Int8Linear(layer.weight, layer.bias)
    wide = Int8Linear(layer.weight, layer.bias)
    wide.out_dtype = torch.float32

    assert (product(x).dtype, wide(x).dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(wide(x).to(torch.bfloat16), product(x))


def test_a_row_of_an_int8_product_depends_on_no_other_row() -> None:
    layer, x = _linear(), torch.randn(20, 64)
    product = Int8Linear(layer.weight, layer.bias)
    beside_large = torch.cat([x[:1], 1000 * x[1:]])

    assert torch.equal(product(x)[0], product(beside_large)[0])
    assert torch.equal(product(x)[0], product(x[:1])[0])


@pytest.mark.parametrize("width", [3, 33, 64, 1536])
def test_a_token_is_rounded_between_its_least_and_its_largest_element(width: int) -> None:
    x = torch.cat([torch.rand(4, width) - 0.1, 100 * torch.randn(1, width), torch.full((1, width), 0.3)])

    levels, scale, lowest = quantize_tokens(x)

    assert (levels.shape, levels.dtype) == (x.shape, torch.uint8)
    assert torch.equal(lowest[:, 0], x.amin(1))
    assert (levels * scale + lowest - x).abs().le(0.501 * scale + 1e-7).all()


def test_activations_of_one_sign_are_rounded_twice_as_fine_as_by_their_magnitude() -> None:
    layer, x = nn.Linear(512, 48), nn.functional.gelu(torch.randn(33, 512))
    product, step = Int8Linear(layer.weight, layer.bias), x.abs().amax(1, keepdim=True) / 127
    by_magnitude = (x / step).round() * step

    far = (product(x) - layer(x)).norm()

    assert far < 0.8 * (_plain(layer, by_magnitude) - layer(x)).norm()


def _plain(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Multiplies by the rounded weights of a product in float32."""
    rounded, scale = packed_linear.quantize_rows(layer.weight)
    return nn.functional.linear(x, rounded * scale[:, None], layer.bias)


def test_rows_of_zeros_give_the_bias() -> None:
    layer = _linear()
    product = Int8Linear(torch.zeros_like(layer.weight), layer.bias)

    assert torch.equal(product(torch.zeros(2, 64)), layer.bias.expand(2, 48))


def test_without_instructions_for_int8_the_weights_are_as_small_and_the_results_as_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_linear, "can_multiply_int8", lambda: False)
    layer, x = _linear(), torch.randn(5, 64)
    product = Int8Linear(layer.weight, layer.bias)

    assert _cosine(product(x), layer(x)) > 0.9999
    assert product.size_bytes == 48 * 64 + 8 * 48


def test_a_part_of_a_joined_product_is_that_part() -> None:
    layers = [_linear() for _ in range(3)]
    joined = PackedLinear(torch.cat([one.weight for one in layers]), torch.cat([one.bias for one in layers]))
    x = torch.randn(4, 64)

    for index, layer in enumerate(layers):
        assert _cosine(JoinedPart(joined, 48 * index, 48)(x), layer(x)) > 1 - 1e-10


def test_int8_embeddings_are_near_the_table() -> None:
    table, ids = nn.Embedding(100, 64), torch.tensor([[0, 99, 5]])
    small = Int8Embedding(table.weight, torch.float32)

    assert _cosine(small(ids), table(ids)) > 0.9999
    assert small.weight.dtype == torch.int8


def test_the_bytes_of_products_are_summed_over_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), PackedLinear(torch.zeros(8, 4), None))

    assert total_bytes(model.modules()) == 8 * 4 * 4
