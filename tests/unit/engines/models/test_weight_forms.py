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
from engines.models import weight_forms
from engines.models.weight_forms import WeightForm, fix_steps, weight_form

INT8 = WeightForm(is_int8=True, activations=torch.bfloat16)


def _products(model: nn.Module) -> set[type[Product]]:
    return {type(part) for part in model.modules() if isinstance(part, Product)}


def _packed(model: nn.Module) -> list[PackedLinear]:
    return [part for part in model.modules() if isinstance(part, PackedLinear)]


@torch.inference_mode()
def test_all_products_of_an_encoder_are_int8_and_float32_is_between_them() -> None:
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config)

    INT8.apply(model, fuse(model, PackedState()))

    assert _products(model) == {Int8Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@torch.inference_mode()
def test_products_behind_norms_have_one_step_for_all_tokens_once_texts_have_run() -> None:
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model, ids = BertModel(config, add_pooling_layer=False).train(False), torch.randint(0, 40, (1, 30))
    layers = fuse(model, PackedState())
    INT8.apply(model, layers)
    before = model(ids).last_hidden_state
    products = [part for part in model.modules() if isinstance(part, Int8Linear)]
    behind_norms = [part for part in products if part.is_behind_norm]

    fix_steps(model, lambda: model(ids))

    assert (len(products), len(behind_norms)) == (8, 4)
    assert [part.has_one_step for part in products] == [part.is_behind_norm for part in products]
    after = model(ids).last_hidden_state
    assert not torch.equal(after, before)
    assert torch.cosine_similarity(after, before, dim=-1).min() > 0.999


@torch.inference_mode()
def test_a_model_without_int8_products_runs_no_texts_for_their_steps() -> None:
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)

    fix_steps(BertModel(config), lambda: pytest.fail("it has no products to fix"))


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


def _decoder() -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=64,
        )
    )  # fmt: skip


@torch.inference_mode()
def test_float32_weights_of_a_decoder_are_packed_where_onednn_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_faster in (False, True):
        monkeypatch.setattr(weight_forms, "onednn_is_faster", lambda is_faster=is_faster: is_faster)
        form, model = weight_form("float32", torch.device("cpu")), _decoder()

        assert (form is not None) is is_faster
        if form is not None:
            size = form.apply(model, fuse_decoder(model, PackedState()))
            assert _products(model) == {PackedLinear}
            assert size == 4 * sum(part.in_features * part.out_features for part in _packed(model))


@torch.inference_mode()
def test_float32_weights_of_other_models_are_left_as_they_are() -> None:
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config)

    assert WeightForm(is_for_decoders=True).apply(model, fuse(model, PackedState())) == 0
    assert WeightForm(is_for_decoders=True).apply(model, []) == 0
    assert not _products(model)


@torch.inference_mode()
def test_float32_products_are_compared_with_plain_arithmetic_once_for_each_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(weight_forms, "check_product", lambda made, *_, **__: shapes.append(made.packed.shape))
    model = _decoder()

    WeightForm(is_for_decoders=True).apply(model, fuse_decoder(model, PackedState()))

    assert len(_packed(model)) == 2 * 5 + 1
    assert sorted(shapes) == [(32, 32), (32, 64), (64, 32)]
