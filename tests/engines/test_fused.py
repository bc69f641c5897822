"""Fused layers: which models they are for, that they hold nothing twice, and what they leave alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MegatronBertConfig,
    MegatronBertModel,
    MPNetConfig,
    MPNetModel,
    NomicBertConfig,
    NomicBertModel,
)

from engines.adapters import PackedState, storage_bytes
from engines.attention import PACKED
from engines.fused import copied_bytes, fuse, prepack
from engines.layout import Layout
from engines.prepacked import LARGEST_COPY, PrepackedLayers

SHAPE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
BERT: dict[str, Any] = {"vocab_size": 100, **SHAPE}


def build(kind: Any, config: object) -> Any:
    torch.manual_seed(3)
    return kind(config).eval()


def bert(**changes: object) -> Any:
    return build(BertModel, BertConfig(**{**BERT, **changes}))


@pytest.mark.parametrize(
    "model",
    [
        bert(),
        bert(hidden_act="relu"),
        build(MPNetModel, MPNetConfig(**BERT)),
        build(DistilBertModel, DistilBertConfig(vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=96)),
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
@pytest.mark.parametrize("is_prepacked", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_any_number_of_tokens_on_any_number_of_threads_has_the_plain_vectors(
    num_tokens: int, num_threads: int, is_prepacked: bool, activation: str
) -> None:
    model, state = bert(hidden_act=activation), PackedState()
    ids, lengths = torch.arange(num_tokens)[None], [num_tokens // 3, num_tokens - num_tokens // 3]
    layout = Layout([length for length in lengths if length], torch.device("cpu"))
    parts = torch.split(ids[0], layout.lengths)
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            expected = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in parts])
            layers = fuse(model, state)
            prepack(layers, num_threads if is_prepacked else 0)
            model.set_attn_implementation(PACKED)
            positions = layout.positions[None]
            with state.running(layout, is_fused=True):
                found = model(input_ids=ids, position_ids=positions, packed_layout=layout).last_hidden_state[0]
    finally:
        torch.set_num_threads(usual)

    assert torch.allclose(found, expected, atol=1e-6)


def test_outside_a_fused_row_the_layers_do_what_they_always_did() -> None:
    model, state = bert(), PackedState()
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        fuse(model, state)
        plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with state.running(Layout([4], torch.device("cpu")), is_fused=False):
            unfused = model(input_ids=ids, attention_mask=mask).last_hidden_state

    assert torch.allclose(plain, expected, atol=1e-6)
    assert torch.allclose(unfused, expected, atol=1e-6)


def test_a_row_that_gives_way_to_another_has_its_own_state_back() -> None:
    state, first, second = PackedState(), Layout([3], torch.device("cpu")), Layout([2, 2], torch.device("cpu"))

    with state.running(first, is_fused=True):
        with state.running(second, is_fused=False):
            assert (state.layout, state.is_fused) == (second, False)
        assert (state.layout, state.is_fused) == (first, True)
    assert (state.layout, state.is_fused) == (None, False)


@pytest.mark.parametrize(
    ("is_prepacked", "num_threads", "num_tokens", "form"),
    [
        (False, 1, 12, "many"),
        (False, 2, 96, "few"),
        (False, 2, 97, "many"),
        (True, 1, 192, "prepacked"),
        (True, 2, 192, "shared"),
        (True, 2, 12, "shared"),
        (True, 3, 12, "shared"),
        (True, 1, 193, "many"),
        (True, 2, 193, "many"),
    ],
)
def test_the_form_is_the_fastest_for_so_many_tokens_and_threads(
    is_prepacked: bool, num_threads: int, num_tokens: int, form: str
) -> None:
    layers = fuse(bert(), PackedState())
    prepack(layers, 2 if is_prepacked else 0)
    usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert layers[0].best_form(Layout([num_tokens], torch.device("cpu"))) == form
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize(("num_threads", "num_copies"), [(1, 1), (2, 2), (8, 2)])
def test_prepacked_layers_say_how_many_bytes_they_take_in_addition(num_threads: int, num_copies: int) -> None:
    size = copied_bytes(fuse(bert(), PackedState()), LARGEST_COPY, num_threads)

    assert size == num_copies * 2 * 4 * (4 * 48 * 48 + 2 * 48 * 96)


@pytest.mark.parametrize(
    "model", [bert(hidden_act="gelu_new"), bert().to(torch.bfloat16)], ids=["another activation", "another dtype"]
)
def test_layers_that_cannot_be_prepacked_take_no_more(model: Any) -> None:
    assert copied_bytes(fuse(model, PackedState()), LARGEST_COPY, 1) == 0


def test_layers_too_large_for_a_second_copy_have_none() -> None:
    layers = fuse(bert(), PackedState())
    size = copied_bytes(layers, LARGEST_COPY, 1)

    assert copied_bytes(layers, size, 1) == size
    assert copied_bytes(layers, size - 1, 1) == 0
    assert copied_bytes(layers, size, 2) == 0, "one copy on one thread, two where several may share"


@pytest.mark.parametrize(
    ("num_tokens", "calls"), [(5, [(0, 6)]), (192, [(0, 1), (2, 3), (4, 5), (6, 6)]), (800, [(n, n) for n in range(7)])]
)
def test_prepacked_layers_run_several_at_once(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, calls: list[tuple[int, int]]
) -> None:
    model, state = bert(num_hidden_layers=7), PackedState()
    ids, lengths = torch.arange(num_tokens)[None] % 100, [min(num_tokens, 100)] * (num_tokens // 100) or [num_tokens]
    lengths += [num_tokens - sum(lengths)] if sum(lengths) < num_tokens else []
    layout, asked, right = Layout(lengths, torch.device("cpu")), [], PrepackedLayers.__call__

    def note(self: PrepackedLayers, x: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        asked.append((first, last))
        return right(self, x, layout, first, last)

    monkeypatch.setattr(PrepackedLayers, "__call__", note)
    with torch.inference_mode():
        parts = torch.split(ids[0], layout.lengths)
        expected = torch.cat([model(input_ids=part[None]).last_hidden_state[0] for part in parts])
        prepack(fuse(model, state), 1)
        model.set_attn_implementation(PACKED)
        with state.running(layout, is_fused=True, form="prepacked"):
            out = model(input_ids=ids, position_ids=layout.positions[None], packed_layout=layout)

    assert asked == calls
    assert torch.allclose(out.last_hidden_state[0], expected, atol=1e-6)


def test_a_row_that_another_overtakes_goes_on_where_it_was() -> None:
    """Between two layers of which the first has done the work of both."""
    model, state = bert(num_hidden_layers=3), PackedState()
    layouts = Layout([5], torch.device("cpu")), Layout([2], torch.device("cpu"))

    def run(layout: Layout) -> Tensor:
        ids = torch.arange(layout.num_tokens)[None]
        with torch.inference_mode(), state.running(layout, is_fused=True):
            out = model(input_ids=ids, position_ids=layout.positions[None], packed_layout=layout)
            hidden: Tensor = out.last_hidden_state
            return hidden

    prepack(fuse(model, state), 1)
    model.set_attn_implementation(PACKED)
    expected = [run(layout) for layout in layouts]
    overtaking: list[Tensor] = []

    def overtake(*_: Any) -> None:
        if state.layout is layouts[0]:
            overtaking.append(run(layouts[1]))

    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(overtake)
    found = run(layouts[0])

    assert len(overtaking) == 3
    assert torch.equal(found, expected[0])
    assert all(torch.equal(rows, expected[1]) for rows in overtaking)


def test_layers_are_prepacked_once_and_unpacked_for_good() -> None:
    layers = fuse(bert(), PackedState())
    prepack(layers, 2)
    made = layers[0].copies
    prepack(layers, 2)

    assert made.keys() == {"prepacked", "shared"}
    assert all(layer.copies is made for layer in layers)

    prepack(layers, 0)
    assert not any(layer.copies for layer in layers)


def test_on_one_thread_there_is_one_copy() -> None:
    layers = fuse(bert(), PackedState())
    prepack(layers, 1)

    assert layers[0].copies.keys() == {"prepacked"}
