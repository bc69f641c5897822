"""Tests in which form the products of encoders and decoders are kept beside int8."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

from engines.layers.decoder import fuse_decoder
from engines.layers.fused import fuse
from engines.layers.packed_linear import Int8Linear, PackedLinear, Product
from engines.layers.packing import PackedState
from engines.layers.weight_only import Int4Linear, Int8WeightLinear, can_multiply_int4
from engines.models.weight_forms import WeightForm

INT8 = WeightForm(is_int8=True, activations=torch.bfloat16)


def _products(model: nn.Module) -> set[type[Product]]:
    return {type(part) for part in model.modules() if isinstance(part, Product)}


@torch.inference_mode()
def test_all_products_of_an_encoder_are_int8_and_float32_is_between_them() -> None:
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config)

    INT8.apply(model, fuse(model, PackedState()))

    assert _products(model) == {Int8Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@torch.inference_mode()
def test_a_decoder_keeps_queries_keys_and_values_in_the_dtype_between_its_products() -> None:
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64,
    )  # fmt: skip
    model = Qwen3Model(config)

    INT8.apply(model, fuse_decoder(model, PackedState()))

    assert _products(model) == {Int8Linear, PackedLinear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not can_multiply_int4(), reason="this CPU or torch has no kernel for int4")
@pytest.mark.parametrize("shape", [(2048, 256), (256, 2048)])
@torch.inference_mode()
def test_both_kernels_of_int4_pass_the_check_of_products_in_the_size_of_real_models(shape: tuple[int, int]) -> None:
    form = WeightForm(is_int4=True, activations=torch.bfloat16)
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))

    assert isinstance(form.product(weight, None), Int4Linear)
    assert isinstance(form.joined_product(weight, None), Int8WeightLinear)
