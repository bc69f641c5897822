"""Tests products whose weights alone are quantised."""

import pytest
import torch
from torch.nn.functional import linear

from engines.layers.packed_linear import quantize_rows
from engines.layers.weight_only import (
    GROUP,
    Int4Linear,
    Int8WeightLinear,
    can_multiply_int4,
    dequantize_groups,
    fits_int4,
    quantize_groups,
)

needs_int4 = pytest.mark.skipif(not can_multiply_int4(), reason="this CPU or torch has no kernel for int4")


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_weights_give_the_product_of_what_they_hold(dtype: torch.dtype, allowed: float, *, has_bias: bool) -> None:
    rounded, scale = quantize_rows(_random(96, 256))
    bias = _random(96, seed=2) if has_bias else None
    x = _random(7, 256, seed=3).to(dtype)

    made = Int8WeightLinear(rounded, bias, scale, dtype)

    found = made(x)
    assert found.dtype is dtype
    assert _error(found, linear(x.float(), rounded * scale[:, None], bias)) < allowed


def test_large_sums_in_float16_do_not_overflow() -> None:
    rounded, scale = quantize_rows(torch.full((32, 2048), 0.01))
    made = Int8WeightLinear(rounded, None, scale, torch.float16)

    assert torch.isfinite(made(torch.full((1, 2048), 8.0, dtype=torch.float16))).all()


def test_int8_weights_are_buffers_that_count_and_move_with_the_model() -> None:
    made = Int8WeightLinear(*_with_bias(quantize_rows(_random(64, 32))), torch.bfloat16)

    assert {buffer.dtype for buffer in made.buffers()} == {torch.int8, torch.float32, torch.bfloat16}
    assert (made.size_bytes, list(made.state_dict())) == (0, [])


def _with_bias(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pair[0], torch.zeros(len(pair[0])), pair[1]


@needs_int4
@pytest.mark.parametrize("num_tokens", [1, 8, 55, 56, 300])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int4_gives_the_product_of_what_it_holds_for_few_tokens_and_many(num_tokens: int, *, has_bias: bool) -> None:
    packed, scales = quantize_groups(_random(192, 128))
    bias = _random(192, seed=2) if has_bias else None
    x = _random(num_tokens, 128, seed=3).bfloat16()

    found = Int4Linear(packed, bias, scales)(x)

    assert _error(found, linear(x.float(), dequantize_groups(packed, scales), bias)) < 5e-3


@needs_int4
def test_four_bits_are_nearer_than_the_span_of_each_group_divided_evenly() -> None:
    weight = _random(128, 256)
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    even = (((groups - low) / step).round() * step + low).flatten(1)

    found = dequantize_groups(*quantize_groups(weight))

    assert _error(found, weight) < 0.97 * _error(even, weight)


@needs_int4
@pytest.mark.parametrize("weight", [torch.zeros(64, 32), torch.full((64, 32), 0.3), torch.eye(64, 32)])
def test_groups_of_one_value_and_of_one_large_value_are_kept(weight: torch.Tensor) -> None:
    found = dequantize_groups(*quantize_groups(weight))

    torch.testing.assert_close(found, weight, rtol=1e-2, atol=1e-2)


@needs_int4
def test_int4_takes_five_bits_a_weight() -> None:
    made = Int4Linear(*_with_bias(quantize_groups(_random(256, 256))))

    assert made.size_bytes == 256 * 256 * 5 // 8


@pytest.mark.parametrize(("shape", "fits"), [((64, 32), True), ((96, 32), False), ((64, 48), False)])
def test_int4_fits_blocks_of_outputs_and_groups_of_inputs(shape: tuple[int, int], *, fits: bool) -> None:
    assert fits_int4(torch.empty(shape)) is fits
