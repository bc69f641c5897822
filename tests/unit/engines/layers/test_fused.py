"""Fused layers: which models they support, that no weight is held twice, and which layers stay unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    MegatronBertConfig,
    MegatronBertModel,
    MPNetConfig,
    MPNetModel,
    NomicBertConfig,
    NomicBertModel,
)

from engines.layers import fused
from engines.layers.attention import PACKED
from engines.layers.fused import fastest_variant, fuse
from engines.layers.packing import PackedLayout, PackedState, TokenChoice
from engines.layers.products import linear, rounded_rows
from engines.models.adapters import storage_bytes
from tests.testkit.random_models import BERT, bert, build


def distilbert() -> Any:
    return build(DistilBertModel, DistilBertConfig(vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=96))


@pytest.mark.parametrize(
    "model",
    [
        bert(),
        bert(hidden_act="relu"),
        build(MPNetModel, MPNetConfig(**BERT)),
        distilbert(),
    ],
    ids=["bert", "bert-relu", "mpnet", "distilbert"],
)
def test_post_norm_layers_are_fused(model: Any) -> None:
    assert fuse(model, PackedState())


@pytest.mark.parametrize(
    "model",
    [
        bert(is_decoder=True),
        build(MegatronBertModel, MegatronBertConfig(**BERT)),
        build(NomicBertModel, NomicBertConfig(**BERT)),
        nn.Linear(2, 2),
    ],
    ids=["bert-decoder", "megatron-bert", "nomic-bert", "no-layers"],
)
def test_other_layers_are_left_alone(model: nn.Module) -> None:
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    assert not fuse(model, PackedState())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_a_layer_with_a_part_that_is_not_known_is_left_alone() -> None:
    model = bert()
    model.encoder.layer[1].attention.self.extra = nn.Linear(2, 2)

    assert not fuse(model, PackedState())


def test_a_projection_without_bias_is_left_alone() -> None:
    model = bert()
    model.encoder.layer[0].attention.self.key = nn.Linear(48, 48, bias=False)

    assert not fuse(model, PackedState())


def test_weights_are_held_once() -> None:
    model = bert()
    before = storage_bytes(list(model.parameters()))

    fuse(model, PackedState())

    assert storage_bytes(list(model.parameters())) == before


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 95, 96, 97])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_any_number_of_tokens_on_any_number_of_threads_has_the_plain_vectors(
    num_tokens: int, num_threads: int, activation: str
) -> None:
    model, state = bert(hidden_act=activation), PackedState()
    ids, lengths = torch.arange(num_tokens)[None], [num_tokens // 3, num_tokens - num_tokens // 3]
    layout = PackedLayout([length for length in lengths if length], torch.device("cpu"))
    parts = torch.split(ids[0], layout.lengths)
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            expected = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in parts])
            fuse(model, state)
            model.set_attn_implementation(PACKED)
            positions = layout.positions[None]
            with state.running(layout, is_fused=True):
                found = model(input_ids=ids, position_ids=positions, packed_layout=layout).last_hidden_state[0]
    finally:
        torch.set_num_threads(usual)

    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("lengths", [(7,), (1, 1), (2, 2, 5, 9), (1, 40, 60)])
@pytest.mark.parametrize("kept", ["first", "last"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_one_token_of_each_text_has_the_plain_hidden_state(
    family: str, kept: TokenChoice, lengths: tuple[int, ...]
) -> None:
    model, state = (bert() if family == "bert" else distilbert()), PackedState()
    layout = PackedLayout(list(lengths), torch.device("cpu"))
    ids = torch.arange(layout.num_tokens) % 90
    place = 0 if kept == "first" else -1
    with torch.inference_mode():
        parts = torch.split(ids, layout.lengths)
        expected = torch.stack([model(input_ids=part[None]).last_hidden_state[0, place] for part in parts])
        fuse(model, state)
        model.set_attn_implementation(PACKED)
        positions = layout.positions[None]
        with state.running(layout, is_fused=True, kept=kept):
            found = model(input_ids=ids[None], position_ids=positions, packed_layout=layout).last_hidden_state[0]

    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_layer_with_a_position_bias_gives_all_tokens() -> None:
    """Its bias is made for whole texts."""
    layers = fuse(build(MPNetModel, MPNetConfig(**BERT)), PackedState())

    assert [layer.skips for layer in layers] == [(), ()]


def test_outside_of_a_fused_row_the_layers_run_as_before() -> None:
    model, state = bert(), PackedState()
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        fuse(model, state)
        plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with state.running(PackedLayout([4], torch.device("cpu")), is_fused=False):
            unfused = model(input_ids=ids, attention_mask=mask).last_hidden_state

    assert torch.allclose(plain, expected, atol=1e-6)
    assert torch.allclose(unfused, expected, atol=1e-6)


def test_a_preempted_row_gets_its_own_state_back() -> None:
    state, first, second = (
        PackedState(),
        PackedLayout([3], torch.device("cpu")),
        PackedLayout([2, 2], torch.device("cpu")),
    )

    with state.running(first, is_fused=True):
        with state.running(second, is_fused=False):
            assert (state.layout, state.is_fused) == (second, False)
        assert (state.layout, state.is_fused) == (first, True)
    assert (state.layout, state.is_fused) == (None, False)


def test_a_row_of_many_tokens_can_be_preempted_between_its_products() -> None:
    """Else a query waits for a whole layer of a larger model: 36 ms at BERT-base's size (512 tokens, 200 GFLOP/s)."""
    model, nested = bert(), list[Tensor]()
    long, short = ([40, 80], torch.arange(120) % 90), ([3, 6], torch.arange(9))

    def run(lengths: list[int], ids: Tensor) -> Tensor:
        layout = PackedLayout(lengths, torch.device("cpu"))
        with torch.inference_mode(), state.running(layout, is_fused=True, variant="many"):
            row = model(input_ids=ids[None], position_ids=layout.positions[None], packed_layout=layout)
        found: Tensor = row.last_hidden_state[0]
        return found

    def pause() -> None:
        if state.layout is not None and state.layout.num_tokens > 9:  # the long row, not the one that preempts it
            nested.append(run(*short))

    state = PackedState(pause)
    with torch.inference_mode():
        expected = [
            torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in torch.split(ids, lengths)])
            for lengths, ids in (long, short)
        ]
    layers = fuse(model, state)
    model.set_attn_implementation(PACKED)

    found = run(*long)

    assert len(nested) == 4 * len(layers)
    assert torch.allclose(found, expected[0], atol=1e-6)
    assert all(torch.allclose(one, expected[1], atol=1e-6) for one in nested)


@pytest.mark.parametrize(
    ("num_threads", "num_tokens", "has_onednn", "variant"),
    [
        (1, 12, False, "many"),
        (2, 12, False, "few"),
        (2, 96, False, "few"),
        (2, 97, False, "many"),
        (2, 12, True, "many"),
    ],
)
def test_the_variant_is_the_fastest_for_so_many_tokens_and_threads(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, num_tokens: int, has_onednn: bool, variant: str
) -> None:
    monkeypatch.setattr(fused, "onednn_is_faster", lambda: has_onednn)
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert fastest_variant(PackedLayout([num_tokens], torch.device("cpu"))) == variant
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("lengths", [[3], [5, 2], [33, 34], [140, 1]])
@pytest.mark.parametrize("kept", ["all", "first", "last"])
@torch.inference_mode()
def test_products_have_few_numbers_of_rows_and_texts_the_same_states(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], kept: TokenChoice
) -> None:
    monkeypatch.setattr(fused, "onednn_is_faster", lambda: True)
    sizes = list[int]()

    def note(x: Tensor, *args: Any) -> Tensor:
        sizes.append(len(x))
        return linear(x, *args)

    monkeypatch.setattr(fused, "linear", note)
    model, state = bert(), PackedState()
    ids = torch.arange(sum(lengths)) % 90 + 5
    texts = [model(input_ids=text[None]).last_hidden_state[0] for text in torch.split(ids, lengths)]
    fuse(model, state)
    model.set_attn_implementation(PACKED)
    layout = PackedLayout(lengths, torch.device("cpu"))

    with state.running(layout, is_fused=True, variant="many", kept=kept):
        found = model(
            input_ids=ids[None], position_ids=layout.positions[None], attention_mask=None, packed_layout=layout
        ).last_hidden_state[0]

    wanted = {"all": texts, "first": [text[:1] for text in texts], "last": [text[-1:] for text in texts]}
    assert torch.allclose(found, torch.cat(wanted[kept]), atol=1e-6)
    assert rounded_rows(sum(lengths)) in sizes
    assert not any(size % 4 for size in sizes)
