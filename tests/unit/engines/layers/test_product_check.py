"""Tests that a product of reduced precision which computes something else is found when it is made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines.errors import SelfCheckFailed
from engines.layers import packed_linear
from engines.layers.packed_linear import Int8Linear, PackedLinear
from engines.models.weight_forms import WeightForm

Planted = Callable[..., Any]

FORMS = [
    WeightForm(is_int8=True, activations=torch.float32),
    WeightForm(is_int8=True, activations=torch.bfloat16),
    WeightForm(activations=torch.bfloat16),
]


def _linear(width: int = 96, outputs: int = 40) -> nn.Linear:
    torch.manual_seed(5)
    layer = nn.Linear(width, outputs)
    layer.weight.data[3] *= 30  # a large output, whose rounding is coarse
    layer.weight.data[4] = 0
    layer.bias.data[5] = 50
    return layer


def _made(form: WeightForm, layer: nn.Linear) -> nn.Module:
    dtype = torch.float32 if form.is_int8 else torch.bfloat16
    with torch.inference_mode():
        return form.product(layer.weight.to(dtype), layer.bias.to(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [8, 96, 1000])
def test_right_products_pass(form: WeightForm, width: int) -> None:
    _made(form, _linear(width))


def _one_scale_two_percent_off(weight: Tensor) -> tuple[Tensor, Tensor]:
    rounded, scale = packed_linear_rows(weight)
    scale[7] *= 1.02
    return rounded, scale


packed_linear_rows = packed_linear.quantize_rows


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("is_fast", [True, False])
def test_one_scale_that_is_two_percent_off_is_found(
    monkeypatch: pytest.MonkeyPatch, form: WeightForm, *, is_fast: bool
) -> None:
    monkeypatch.setattr(packed_linear, "quantize_rows", _one_scale_two_percent_off)
    if not is_fast:
        monkeypatch.setattr(packed_linear, "can_multiply_int8", lambda: False)

    with pytest.raises(SelfCheckFailed, match="from plain arithmetic"):
        _made(form, _linear())


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_is_two_percent_off_in_one_output_is_found(
    monkeypatch: pytest.MonkeyPatch, form: WeightForm
) -> None:
    kind = Int8Linear if form.is_int8 else PackedLinear
    right = kind.multiply

    def wrong(self: Any, x: Tensor) -> Tensor:
        found = right(self, x)
        found[:, 9] *= 1.02
        return found

    monkeypatch.setattr(kind, "multiply", wrong)

    with pytest.raises(SelfCheckFailed, match="from plain arithmetic"):
        _made(form, _linear())


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch, form: WeightForm) -> None:
    kind = Int8Linear if form.is_int8 else PackedLinear
    right = kind.multiply
    monkeypatch.setattr(kind, "multiply", lambda self, x: right(self, x) - (self._bias if form.is_int8 else self.bias))

    with pytest.raises(SelfCheckFailed, match="from plain arithmetic"):
        _made(form, _linear())
