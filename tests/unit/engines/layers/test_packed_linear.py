"""Tests products whose weights are kept in the form of the CPU's instructions."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engines.errors import SelfCheckFailed
from engines.layers import packed_linear
from engines.layers.int8_script import int8_python, int8_script
from engines.layers.packed_linear import (
    Int8Embedding,
    Int8Linear,
    JoinedPart,
    PackedLinear,
    quantize_tokens,
    total_bytes,
)
from engines.layers.static_quantization import EXTRA_COLUMNS, StaticQuantizer


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
    assert product.size_bytes == 48 * (64 + 8) + 8 * 48, "with eight bytes of zeros a row, see `quantize_tokens`"


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

    assert (levels.shape, levels.dtype) == ((len(x), width + 8), torch.uint8)
    assert torch.equal(lowest[:, 0], x.amin(1))
    assert (levels[:, :width] * scale + lowest - x).abs().le(0.501 * scale + 1e-7).all()


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


def _inputs(num_tokens: int = 300) -> torch.Tensor:
    """Inputs as norms give them: a channel that is far wider than the others, and one far from zero."""
    x = torch.randn(num_tokens, 64)
    x[:, 5] *= 12
    x[:, 9] += 6
    return x


def _static_product(layer: nn.Linear, x: torch.Tensor) -> Int8Linear:
    product = Int8Linear(layer.weight, layer.bias)
    product.observe()
    product.multiply(x)
    product.fix_step()
    return product


def test_one_step_for_all_tokens_is_as_near_as_steps_of_their_own_where_a_channel_is_wide() -> None:
    layer, x = _linear(), _inputs()
    by_token, static = Int8Linear(layer.weight, layer.bias), _static_product(layer, x)

    far = [(product(x) - layer(x)).norm() for product in (by_token, static)]

    assert far[1] < far[0]
    assert not torch.equal(by_token(x), static(x))


def test_a_token_that_is_out_of_range_has_a_step_of_its_own() -> None:
    layer, x = _linear(), _inputs()
    product = _static_product(layer, x)
    wide = torch.cat([x[:40], 30 * x[40:43], -200 * x[43:44], torch.full((1, 64), 1e12)])

    found, wanted = product(wide), layer(wide)

    assert torch.cosine_similarity(found.double(), wanted.double()).min() > 0.998
    assert torch.equal(found[:40], product(x[:40]))
    assert torch.equal(found[41], product(wide[41:42])[0])


def test_one_step_gives_the_gelu_and_the_dtype_that_are_asked_for() -> None:
    layer, x = _linear(), torch.cat([_inputs(), 30 * _inputs(2)])
    product = _static_product(layer, x[:300])
    wanted = nn.functional.gelu(product(x))

    assert torch.allclose(product.multiply_and_gelu(x), wanted, rtol=1e-4, atol=1e-4)
    product.out_dtype = torch.bfloat16
    assert product(x).dtype == torch.bfloat16
    assert _cosine(product(x), layer(x)) > 0.998


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_sum_with_a_product_is_the_sum_of_both(is_fixed: bool) -> None:
    layer, x, other = _linear(), _inputs(), torch.randn(300, 48)
    product = _static_product(layer, x) if is_fixed else Int8Linear(layer.weight, layer.bias)

    assert torch.allclose(product.multiply_and_add(x, other), product(x) + other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_fixed", [False, True])
def test_without_scripts_an_int8_product_gives_the_same(monkeypatch: pytest.MonkeyPatch, is_fixed: bool) -> None:
    layer, x, other = _linear(), _inputs(), torch.randn(300, 48)
    product = _static_product(layer, x) if is_fixed else Int8Linear(layer.weight, layer.bias)
    wanted = product(x), product.multiply_and_add(x, other)

    assert isinstance(int8_script(), torch.jit.CompilationUnit)
    monkeypatch.setattr(packed_linear, "int8_script", int8_python)

    assert torch.equal(product(x), wanted[0])
    assert torch.equal(product.multiply_and_add(x, other), wanted[1])


def test_products_that_saw_nothing_or_of_an_odd_width_keep_steps_of_tokens() -> None:
    layer, odd = _linear(), nn.Linear(36, 48)
    unseen, narrow = Int8Linear(layer.weight, layer.bias), Int8Linear(odd.weight, odd.bias)
    x, short = _inputs(), torch.randn(5, 36)
    before = unseen(x), narrow(short)
    unseen.observe()
    unseen.fix_step()
    narrow.observe()
    narrow(short)
    narrow.fix_step()

    assert torch.equal(unseen(x), before[0])
    assert torch.equal(narrow(short), before[1])


@pytest.mark.parametrize(("num_dead", "has_one_step"), [(30, True), (63, False)])
def test_channels_that_never_change_have_no_part_in_the_step(num_dead: int, has_one_step: bool) -> None:
    layer, x = _linear(), torch.randn(300, 64)
    x[:, :num_dead] = torch.randn(num_dead)
    product = _static_product(layer, x)

    assert product.has_one_step == has_one_step
    assert _cosine(product(x), layer(x)) > 0.999


@pytest.mark.parametrize(("width", "has_one_step"), [(10.0, True), (1000.0, False)])
def test_a_token_with_little_in_the_widest_channel_loses_nothing(width: float, has_one_step: bool) -> None:
    layer, x = _linear(), torch.randn(300, 64)
    x[:, 5] *= width
    product = _static_product(layer, x)
    x[:, 5] /= width

    assert product.has_one_step == has_one_step
    assert _cosine(product(x), layer(x)) > 0.999


@pytest.mark.parametrize("spread", [0.0, 1e-7])
@torch.no_grad()
def test_inputs_that_hardly_differ_keep_steps_of_tokens(spread: float) -> None:
    layer, x = _linear(), torch.randn(64) + spread * _inputs()
    product, before = Int8Linear(layer.weight, layer.bias), Int8Linear(layer.weight, layer.bias)(x)
    product.observe()
    product(x)
    product.fix_step()

    assert not product.has_one_step
    assert torch.equal(product(x), before)


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("has_script", [False, True])
@pytest.mark.parametrize("place", [0, 37, 63])
def test_a_token_with_a_nan_gives_no_numbers(
    monkeypatch: pytest.MonkeyPatch, is_fixed: bool, has_script: bool, place: int
) -> None:
    layer, x = _linear(), _inputs()
    product = _static_product(layer, x) if is_fixed else Int8Linear(layer.weight, layer.bias)
    if not has_script:
        monkeypatch.setattr(packed_linear, "int8_script", int8_python)
    right, x[7, place] = product(x), float("nan")

    for found in (product(x), product.multiply_and_gelu(x), product.multiply_and_add(x, torch.zeros(300, 48))):
        assert found[7].isnan().all()
        assert found.isnan().sum() == 48
    assert torch.equal(product(x)[8:], right[8:])


@torch.no_grad()
def test_outputs_that_are_nearly_or_wholly_their_bias_are_not_taken_for_wrong_ones() -> None:
    layer, x = _linear(), _inputs()
    layer.weight[3], layer.bias[3] = 0.0, 0.7
    layer.bias[4] = 500.0
    product = Int8Linear(layer.weight, layer.bias)
    product.out_dtype = torch.bfloat16
    product.observe()
    product.multiply(x)

    product.fix_step()

    assert product.has_one_step
    assert (product(x)[:, 3] - 0.7).abs().max() < 2e-3
    assert (product(x)[:, 4] / 500 - 1).abs().max() < 2e-2


def test_a_product_whose_step_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticQuantizer, "widen", lambda self, weight: nn.functional.pad(weight, (0, EXTRA_COLUMNS)))

    with pytest.raises(SelfCheckFailed, match="one step for all tokens"):
        _static_product(_linear(), _inputs())


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
