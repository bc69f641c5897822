"""Decoder layers in TorchScript: each way that they run gives the hidden states of each text alone."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.layers import decoder, decoder_script
from engines.layers.decoder import FusedDecoderLayer, fuse_decoder
from engines.layers.packed_linear import Int8Linear, PackedLinear
from engines.layers.packing import KernelVariant, PackedLayout, PackedState, TokenChoice
from tests.unit.engines.layers.test_decoder import (
    BEGIN,
    CPU,
    MODELS,
    NOT_CAUSAL,
    TEXTS,
    alone,
    behind_shared_tokens,
    fused,
    gemma3,
    in_one_row,
    qwen3,
)

LEAST = {torch.float32: 1 - 1e-9, torch.bfloat16: 0.999}
VARIANTS: list[KernelVariant | None] = [None, "few", "many"]


def scripted(model: Any, dtype: torch.dtype, state: PackedState) -> list[FusedDecoderLayer]:
    """Fuses a model whose products are packed."""
    layers = fuse_decoder(model.to(dtype), state)
    with torch.inference_mode():
        for layer in layers:
            layer.replace_products(PackedLinear, PackedLinear)
    assert all(layer.is_scripted for layer in layers)
    return layers


def worst_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min())


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("name", MODELS)
def test_every_variant_gives_the_hidden_states_of_each_text_alone(name: str, dtype: torch.dtype) -> None:
    model, state = MODELS[name](), PackedState()
    whole = alone(model, TEXTS)
    scripted(model, dtype, state)

    for variant in VARIANTS:
        for row, layout in (in_one_row(TEXTS), behind_shared_tokens(TEXTS, len(BEGIN))):
            layout.variant = variant
            found = fused(model, state, row, layout, kept="all")
            last = fused(model, state, row, layout, kept="last")
            every = found[layout.spread] if layout.prefix is not None else found  # type: ignore[attr-defined]  # shared

            assert worst_cosine(every, torch.cat(whole)) > LEAST[dtype]
            assert worst_cosine(last, torch.stack([hidden[-1] for hidden in whole])) > LEAST[dtype]


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_layers_that_are_not_causal_attend_outside(name: str) -> None:
    model, state = NOT_CAUSAL[name](), PackedState()
    expected = torch.cat(alone(model, TEXTS))
    scripted(model, torch.float32, state)
    row, layout = in_one_row(TEXTS)
    layout.variant = "few"

    assert torch.allclose(fused(model, state, row, layout, kept="all"), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", LEAST)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), shared=st.integers(0, 9))
def test_neighbours_and_shared_tokens_change_no_text(dtype: torch.dtype, lengths: list[int], shared: int) -> None:
    model, state = _qwen3(dtype)
    begin = list(range(50, 50 + shared))
    texts = [[*begin, *((7 * index + place) % 90 for place in range(length))]
             for index, length in enumerate(sorted(lengths))]  # fmt: skip
    row, layout = behind_shared_tokens(texts, shared) if shared else in_one_row(texts)
    layout.variant = "few"

    found = fused(model, state, row, layout, kept="all")
    every = found[layout.spread] if layout.prefix is not None else found  # type: ignore[attr-defined]  # shared
    by_itself = torch.cat([fused(model, state, *in_one_row([text]), kept="all") for text in texts])

    assert worst_cosine(every, by_itself) > (1 - 1e-9 if dtype is torch.float32 else 0.9995)


_MADE: dict[torch.dtype, tuple[Any, PackedState]] = {}


def _qwen3(dtype: torch.dtype) -> tuple[Any, PackedState]:
    if dtype not in _MADE:
        model, state = qwen3(), PackedState()
        scripted(model, dtype, state)
        _MADE[dtype] = model, state
    return _MADE[dtype]


@pytest.mark.parametrize("texts", [1, 2])
def test_scores_out_of_range_are_computed_again(texts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        (factor * torch.randn(20 * texts, 2, 16, generator=generator)).bfloat16() for factor in (40.0, 40.0, 1.0)
    )
    layout, script = PackedLayout([20] * texts, CPU), decoder_script.compiled()
    assert script is not None

    found = script.attend(query.float(), key.float(), value, *layout.causal_blocks(2), 1.0)

    q, k, v = (part.float().view(texts, 20, 2, 16).transpose(1, 2) for part in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert torch.isfinite(found).all()
    assert worst_cosine(found.float(), wanted.transpose(1, 2).reshape(20 * texts, 32)) > 0.99


def test_a_window_that_a_text_exceeds_is_attended_outside_and_one_that_it_does_not_inside() -> None:
    windowed, full = scripted(gemma3(), torch.float32, PackedState())

    assert not windowed._script.attends(PackedLayout([6], CPU))  # type: ignore[union-attr]  # it is scripted
    assert windowed._script.attends(PackedLayout([5], CPU))  # type: ignore[union-attr]
    assert full._script.attends(PackedLayout([6], CPU))  # type: ignore[union-attr]


@pytest.mark.parametrize("kept", ["all", "last"])
def test_without_torchscript_and_for_other_products_layers_run_step_by_step(
    monkeypatch: pytest.MonkeyPatch, kept: TokenChoice
) -> None:
    expected = torch.cat(alone(qwen3(), TEXTS))
    row, layout = in_one_row(TEXTS)
    wanted = expected if kept == "all" else expected[layout.ends - 1]

    def steps(product: type[Any]) -> Tensor:
        model, state = qwen3(), PackedState()
        layers = fuse_decoder(model, state)
        with torch.inference_mode():
            for layer in layers:
                layer.replace_products(product, product)
        assert not any(layer.is_scripted for layer in layers)
        return fused(model, state, row, layout, kept=kept)

    assert worst_cosine(steps(Int8Linear), wanted) > 0.99
    monkeypatch.setattr(decoder, "compiled", lambda: None)
    assert worst_cosine(steps(PackedLinear), wanted) > 1 - 1e-9


def test_other_rows_run_between_the_steps_of_a_long_row_only() -> None:
    pauses: list[int] = []
    model, state = qwen3(), PackedState(partial(pauses.append, 1))
    scripted(model, torch.float32, state)

    fused(model, state, *in_one_row([list(range(20))]), kept="all")
    assert not pauses
    fused(model, state, *in_one_row([list(range(20))] * 4), kept="all")
    assert len(pauses) == 2 * 5
