"""Fused decoder layers: which models they support, last tokens only, and tokens that all texts share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from engines.layers.attention import PACKED
from engines.layers.decoder import fuse_decoder
from engines.layers.packed_linear import Int8Linear, PackedLinear, Product, total_bytes
from engines.layers.packing import PackedLayout, PackedState, TokenChoice
from engines.layers.shared_prefix import SharedPrefixLayout, num_shared_tokens
from engines.models.adapters import storage_bytes
from tests.testkit.random_models import SHAPE, build

CPU = torch.device("cpu")
GROUPED: dict[str, Any] = {**SHAPE, "vocab_size": 100, "num_key_value_heads": 2, "use_cache": False}
WINDOW = 5


def qwen3(**changes: Any) -> Any:
    return build(Qwen3Model, Qwen3Config(**{**GROUPED, "head_dim": 16, **changes}))


def gemma3(**changes: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    options = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 24, **changes}
    return build(Gemma3TextModel, Gemma3TextConfig(**GROUPED, **options))


def qwen2(**changes: Any) -> Any:
    return build(Qwen2Model, Qwen2Config(**GROUPED, **changes))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": qwen3,
    "qwen3-bias": lambda: qwen3(attention_bias=True),
    "qwen2": qwen2,
    "qwen2-window": lambda: qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0),
    "llama": lambda: build(LlamaModel, LlamaConfig(**GROUPED)),
    "mistral": lambda: build(MistralModel, MistralConfig(**GROUPED, head_dim=16, sliding_window=WINDOW)),
    "gemma3": gemma3,
}
NOT_CAUSAL: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: qwen2(is_causal=False),
    "gemma3": lambda: gemma3(use_bidirectional_attention=True),
}


def _worst_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min())


Texts = Sequence[Sequence[int]]

BEGIN = [7, 8, 9, 10, 11, 12, 13]
TEXTS: Texts = [[*BEGIN, 3], [*BEGIN, 20, 21], [*BEGIN, 30, 31], [*BEGIN, *range(40, 49)]]


@torch.inference_mode()
def alone(model: Any, texts: Texts) -> list[Tensor]:
    """Returns the hidden states of each text by the model itself, `[L, H]` each; with plain attention."""
    model.set_attn_implementation("eager")
    return [model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]


@torch.inference_mode()
def fused(model: Any, state: PackedState, row: Sequence[int], layout: PackedLayout, *, kept: TokenChoice) -> Tensor:
    model.set_attn_implementation(PACKED)
    ids, positions = torch.tensor([row]), layout.positions[None]
    with state.running(layout, is_fused=True, kept=kept):
        hidden: Tensor = model(input_ids=ids, position_ids=positions, packed_layout=layout).last_hidden_state[0]
    return hidden


def in_one_row(texts: Texts) -> tuple[list[int], PackedLayout]:
    return [token for text in texts for token in text], PackedLayout([len(text) for text in texts], CPU)


def behind_shared_tokens(texts: Texts, num_shared: int) -> tuple[list[int], SharedPrefixLayout]:
    row = [*texts[0][:num_shared], *(token for text in texts for token in text[num_shared:])]
    return row, SharedPrefixLayout([len(text) for text in texts], num_shared, CPU)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_has_the_hidden_states_of_each_text_alone(name: str) -> None:
    model, state = MODELS[name](), PackedState()
    expected = torch.cat(alone(model, TEXTS))

    assert len(fuse_decoder(model, state)) == 2
    row, layout = in_one_row(TEXTS)
    assert torch.allclose(fused(model, state, row, layout, kept="all"), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, *(f"{name}-not-causal" for name in NOT_CAUSAL)])
def test_last_tokens_only_are_those_of_each_text_alone(name: str) -> None:
    model = NOT_CAUSAL[name.split("-")[0]]() if name.endswith("-not-causal") else MODELS[name]()
    state, expected = PackedState(), torch.stack([hidden[-1] for hidden in alone(model, TEXTS)])
    fuse_decoder(model, state)

    row, layout = in_one_row(TEXTS)
    assert torch.allclose(fused(model, state, row, layout, kept="last"), expected, atol=1e-5)


@pytest.mark.parametrize("num_shared", [1, 4, len(BEGIN)])
@pytest.mark.parametrize("name", MODELS)
def test_shared_tokens_change_no_hidden_state(name: str, num_shared: int) -> None:
    model, state = MODELS[name](), PackedState()
    whole = alone(model, TEXTS)
    fuse_decoder(model, state)
    row, layout = behind_shared_tokens(TEXTS, num_shared)

    found = fused(model, state, row, layout, kept="all")
    last = fused(model, state, row, layout, kept="last")

    assert len(found) == len(row)
    assert torch.allclose(found[layout.spread], torch.cat(whole), atol=1e-5)
    assert torch.allclose(last, torch.stack([hidden[-1] for hidden in whole]), atol=1e-5)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_layers_that_are_not_causal_share_no_tokens(name: str) -> None:
    model, state = NOT_CAUSAL[name](), PackedState()
    layers = fuse_decoder(model, state)
    row, layout = behind_shared_tokens(TEXTS, 4)

    assert not any(layer.is_causal for layer in layers)
    with pytest.raises(NotImplementedError, match="not causal"):
        fused(model, state, row, layout, kept="all")


def test_a_neighbour_changes_no_last_token() -> None:
    model, state = qwen3(), PackedState()
    fuse_decoder(model, state)
    others = [TEXTS[0], [50] * 9, list(range(60, 90))]

    first = fused(model, state, *in_one_row(TEXTS), kept="last")[0]
    again = fused(model, state, *in_one_row(others), kept="last")[0]

    assert torch.allclose(first, again, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        build(Gemma2Model, Gemma2Config(**{**GROUPED, "head_dim": 16})),
        nn.Linear(2, 2),
    ],
    ids=["gemma2", "no-layers"],
)
def test_other_layers_are_left_alone(model: nn.Module) -> None:
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    assert not fuse_decoder(model, PackedState())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("part", ["self_attn.extra", "mlp.q_proj"])
def test_a_layer_with_a_part_that_is_not_known_is_left_alone(part: str) -> None:
    model = qwen3()
    model.layers[1].get_submodule(part.split(".")[0]).add_module(part.split(".")[1], nn.Linear(2, 2))

    assert not fuse_decoder(model, PackedState())


def test_a_layer_whose_projections_differ_in_bias_is_left_alone() -> None:
    model = qwen3()
    model.layers[0].self_attn.k_proj = nn.Linear(48, 32, bias=True)

    assert not fuse_decoder(model, PackedState())


def test_weights_are_held_once() -> None:
    model = qwen2()
    before = storage_bytes(list(model.parameters()))

    fuse_decoder(model, PackedState())

    assert storage_bytes(list(model.parameters())) == before


@pytest.mark.parametrize(
    ("product", "dtype", "least"),
    [(PackedLinear, torch.float32, 1 - 1e-9), (PackedLinear, torch.bfloat16, 0.999), (Int8Linear, torch.float32, 0.99)],
)
@pytest.mark.parametrize("name", MODELS)
def test_products_of_another_form_serve_a_row_last_tokens_and_the_layers_themselves(
    name: str, product: type[Product], dtype: torch.dtype, least: float
) -> None:
    model, state = MODELS[name](), PackedState()
    expected = torch.cat(alone(model, TEXTS))
    model, (row, layout) = model.to(dtype), in_one_row(TEXTS)
    with torch.inference_mode():
        for layer in fuse_decoder(model, state):
            layer.replace_products(product, product)

    assert _worst_cosine(torch.cat(alone(model, TEXTS)), expected) > least
    assert _worst_cosine(fused(model, state, row, layout, kept="all"), expected) > least
    assert _worst_cosine(fused(model, state, row, layout, kept="last"), expected[layout.ends - 1]) > least


def test_weights_of_another_form_are_held_once() -> None:
    model = qwen3(attention_bias=True)
    linears = [part for layer in model.layers for part in layer.modules() if type(part) is nn.Linear]
    before, in_linears = sum(map(torch.numel, model.parameters())), sum(part.weight.numel() for part in linears)
    biases = sum(part.bias.numel() for part in linears if part.bias is not None)

    with torch.inference_mode():
        for layer in fuse_decoder(model, PackedState()):
            layer.replace_products(PackedLinear, PackedLinear)

    assert sum(map(torch.numel, model.parameters())) == before - in_linears - biases
    assert total_bytes(model.modules()) == 4 * in_linears


def test_outside_of_a_fused_row_the_layers_run_as_before() -> None:
    model = gemma3()
    expected = alone(model, TEXTS)

    fuse_decoder(model, PackedState())

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone(model, TEXTS), expected, strict=True))


@pytest.mark.parametrize(
    ("texts", "num_shared"),
    [
        (TEXTS, len(BEGIN)),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 4),  # each keeps its last token
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]], 4),
        ([[1, 2, 3, 9], [1, 2, 3, 4, 5]], 0),  # too few
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, *range(90)]], 0),  # too small a part of the batch
        ([[5], [5, 6]], 0),
    ],
)
def test_tokens_are_shared_where_that_saves_enough(texts: Texts, num_shared: int) -> None:
    assert num_shared_tokens([np.array(text) for text in texts]) == num_shared


def test_forced_sharing_shares_up_to_half_of_the_shortest_text() -> None:
    first, second = np.array([1, 2, 9, 9]), np.array([1, 2, 3, 4, 5])

    assert num_shared_tokens([first, second], is_forced=True) == 2
    assert num_shared_tokens([second, second], is_forced=True) == 2
    assert num_shared_tokens([np.array([1]), second], is_forced=True) == 0
