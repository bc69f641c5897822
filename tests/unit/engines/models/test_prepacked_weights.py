"""Prepacked weights: which models have them, how large they are, and that a pass from them equals the model's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from engines.layers import encoder_script
from engines.layers.fused import fuse
from engines.layers.packed_linear import can_multiply_int8
from engines.layers.packing import KernelVariant, PackedLayout, PackedState, TokenChoice
from engines.models import prepacked
from engines.models.adapters import Positions, adapt, drop_pooler
from engines.models.prepacked import MAX_PREPACKED_BYTES, PrepackedEncoder, PrepackedWeights
from engines.models.weight_forms import WeightForm, fix_steps
from tests.testkit.random_models import BERT, bert, build

CPU = torch.device("cpu")


def copies_of(model: Any, num_threads: int = 0) -> PrepackedWeights:
    drop_pooler(model)
    copies = PrepackedWeights(model, fuse(model, PackedState()))
    copies.make(num_threads)
    return copies


def run(
    copies: PrepackedWeights,
    model: Any,
    lengths: list[int],
    pause: Any = lambda: None,
    variant: KernelVariant | None = "prepacked",
    kept: TokenChoice = "all",
) -> Tensor:
    """Returns the hidden states of texts of those lengths, from the copies."""
    layout = PackedLayout(lengths, CPU)
    row = torch.arange(layout.num_tokens) % 90 + 5
    assert copies.supports(layout, variant)
    return copies(row, Positions(model)(row, layout), layout, variant, pause, kept)


@contextmanager
def usable_cores(num: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@pytest.fixture
def threads_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads that share each call of a pass."""
    calls: list[int] = []
    right = PrepackedEncoder.__call__

    def note(self: PrepackedEncoder, *args: Any) -> Any:
        calls.append(self.num_threads)
        return right(self, *args)

    monkeypatch.setattr(PrepackedEncoder, "__call__", note)
    return calls


def plain(model: Any, lengths: list[int]) -> Tensor:
    """Returns the same hidden states from the model itself, each text alone."""
    row = torch.arange(sum(lengths)) % 90 + 5
    with torch.inference_mode():
        return torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in torch.split(row, lengths)])


MODELS = {
    "bert": lambda: bert(),
    "bert-relu": lambda: bert(hidden_act="relu"),
    "roberta": lambda: build(RobertaModel, RobertaConfig(**BERT)),
    "distilbert": lambda: build(
        DistilBertModel, DistilBertConfig(vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=96)
    ),
    "electra of one width": lambda: build(ElectraModel, ElectraConfig(**BERT, embedding_size=48)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[7], [1, 2, 7]])
def test_a_pass_from_copies_equals_the_models_own(name: str, lengths: list[int]) -> None:
    model = MODELS[name]()
    expected = plain(model, lengths)

    assert torch.allclose(run(copies_of(model, 1), model, lengths), expected, atol=1e-6)


def packed(model: Any, dtype: torch.dtype = torch.float32) -> PrepackedWeights:
    """The same without copies: the model's own products are packed."""
    drop_pooler(model)
    layers = fuse(model.to(dtype), PackedState())
    WeightForm().apply(model, layers)
    weights = PrepackedWeights(model, layers)
    weights.make(1)
    return weights


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[7], [1, 2, 7], [7, 7], [30, 20, 18, 17, 2], [120, 250]])
@torch.inference_mode()
def test_a_pass_from_packed_products_equals_the_models_own(name: str, lengths: list[int]) -> None:
    model = MODELS[name]()
    expected = plain(model, lengths)

    found = run(packed(model), model, lengths)

    assert torch.allclose(found, expected, atol=2e-6)


@torch.inference_mode()
def test_packed_products_run_texts_of_one_call_however_long_they_are() -> None:
    """The check at load compares texts that a pass would not take."""
    model = bert(max_position_embeddings=700)
    expected = plain(model, [3, 600])

    assert torch.allclose(run(packed(model), model, [3, 600]), expected, atol=2e-6)


@torch.inference_mode()
def test_scores_out_of_the_range_of_powers_are_computed_by_the_largest() -> None:
    model = bert()
    for layer in model.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key):
            part.weight.mul_(300)
    expected = plain(model, [9, 5])

    assert torch.allclose(run(packed(model), model, [9, 5]), expected, atol=1e-4)


@torch.inference_mode()
def test_a_texts_vectors_in_bfloat16_do_not_depend_on_its_batch() -> None:
    model = bert(hidden_size=64, intermediate_size=128)
    weights = packed(model, torch.bfloat16)

    batch = run(weights, model, [90, 12, 11, 3])
    row = torch.arange(116) % 90 + 5
    alone = weights(row[:90], torch.arange(90), PackedLayout([90], CPU), "prepacked", lambda: None)

    assert torch.allclose(batch[:90].float(), alone.float(), atol=0.05)
    assert batch.dtype is torch.bfloat16


def int8_weights(model: Any, *, is_fixed: bool = True) -> tuple[PrepackedWeights, Any]:
    """The same with int8 products, which have their steps; and what runs a row through the fused layers."""
    drop_pooler(model)
    state = PackedState()
    layers = fuse(model, state)
    adapt(model, state)
    WeightForm(is_int8=True, activations=torch.bfloat16).apply(model, layers)

    def run_fused(lengths: list[int]) -> Tensor:
        layout = PackedLayout(lengths, CPU)
        row = torch.arange(layout.num_tokens) % 90 + 5
        with state.running(layout, is_fused=True):
            options: Any = {"position_ids": Positions(model)(row, layout)[None], "packed_layout": layout}
            hidden: Tensor = model(input_ids=row[None], attention_mask=None, **options).last_hidden_state[0]
        return hidden

    def calibrate() -> None:
        run_fused([40, 30, 20, 11])

    if is_fixed:
        fix_steps(model, calibrate)
    weights = PrepackedWeights(model, layers)
    weights.make(1)
    return weights, run_fused


@pytest.mark.skipif(not can_multiply_int8(), reason="this CPU or torch has no fast int8")
@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("lengths", [[7], [1, 2, 7], [30, 20, 18, 17, 2], [120, 250], [3, 500]])
@torch.inference_mode()
def test_a_pass_of_int8_products_gives_what_fused_layers_give(
    lengths: list[int], activation: str, is_fixed: bool
) -> None:
    model = bert(hidden_size=64, intermediate_size=128, hidden_act=activation, max_position_embeddings=512)
    expected = plain(model, lengths)
    weights, run_fused = int8_weights(model, is_fixed=is_fixed)

    found = run(weights, model, lengths)

    assert weights.supports(PackedLayout(lengths, CPU), None)
    assert found.dtype is torch.float32
    assert torch.cosine_similarity(found, run_fused(lengths), dim=-1).min() > 0.9999
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.995


@pytest.mark.skipif(not can_multiply_int8(), reason="this CPU or torch has no fast int8")
@torch.inference_mode()
def test_a_texts_vectors_in_int8_do_not_depend_on_its_batch() -> None:
    """But where bfloat16 sums of attention in another block round to another byte."""
    model = bert(hidden_size=64, intermediate_size=128)
    weights, _ = int8_weights(model)

    batch = run(weights, model, [90, 12, 11, 3])
    row = torch.arange(116) % 90 + 5
    alone = weights(row[:90], torch.arange(90), PackedLayout([90], CPU), "prepacked", lambda: None)

    assert torch.equal(batch[:90], alone)


@pytest.mark.skipif(not can_multiply_int8(), reason="this CPU or torch has no fast int8")
@torch.inference_mode()
def test_int8_products_run_as_scripts_unless_torch_cannot_compile_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = int8_weights(bert())
    assert weights.can_run_packed
    monkeypatch.setattr(encoder_script, "compiled", lambda: None)
    assert not weights.can_run_packed


def test_packed_products_need_no_copies_and_all_threads_of_torch() -> None:
    weights = packed(bert())

    assert weights.can_run_packed
    assert weights.size_bytes(MAX_PREPACKED_BYTES, 2) == 0
    assert weights.supports(PackedLayout([12, 250], CPU), None)
    assert not weights.supports(PackedLayout([257], CPU), None)
    assert not weights.needs_onnxruntime(PackedLayout([12], CPU))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("kept", ["first", "last"])
@pytest.mark.parametrize("lengths", [[130], [40, 44, 50], [1, 2, 7]])
def test_where_one_token_of_each_text_is_read_the_last_layer_leaves_out_the_others(
    name: str, kept: TokenChoice, lengths: list[int]
) -> None:
    """Short rows run in full: a product of a few rows is bound by reading the weights."""
    model = MODELS[name]()
    texts = torch.split(plain(model, lengths), lengths)
    expected = torch.stack([text[0 if kept == "first" else -1] for text in texts])

    found = run(copies_of(model, 1), model, lengths, kept=kept)

    is_short = sum(lengths) < 128
    assert len(found) == (sum(lengths) if is_short else len(lengths))
    assert torch.allclose(found, torch.cat(texts) if is_short else expected, atol=1e-6)


def test_a_model_of_one_layer_runs_it_in_full() -> None:
    model = bert(num_hidden_layers=1)

    assert torch.allclose(run(copies_of(model, 1), model, [130], kept="first"), plain(model, [130]), atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "num_threads", "is_used"), [(256, 1, True), (257, 1, False), (12, 0, False)])
def test_copies_are_used_for_short_texts(num_tokens: int, num_threads: int, is_used: bool) -> None:
    assert copies_of(bert(), num_threads).supports(PackedLayout([num_tokens], CPU), None) is is_used


@pytest.mark.parametrize(("num_threads", "usable", "expected"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (2, 3, 2), (1, 2, 1)])
def test_a_call_uses_the_copy_for_the_usable_threads(
    threads_used: list[int], num_threads: int, usable: int, expected: int
) -> None:
    model = bert()
    with usable_cores(usable):
        run(copies_of(model, num_threads), model, [5], variant=None)

    assert threads_used == [expected]


def test_cores_that_come_and_go_during_a_pass_are_used(
    threads_used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread finds work, and the next call has this thread's own core only."""
    monkeypatch.setattr(prepacked, "_TOKEN_LAYERS", 5)
    model, cores = bert(num_hidden_layers=3), iter([2, 1, 2])
    expected = plain(model, [5])
    with usable_cores(1):
        found = run(copies_of(model, 2), model, [5], lambda: torch.set_num_threads(next(cores)), variant=None)

    assert threads_used == [2, 1, 2]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("num_threads", "num_copies"), [(1, 1), (2, 2), (8, 2)])
def test_the_size_of_copies_is_known_before_they_are_made(num_threads: int, num_copies: int) -> None:
    size = copies_of(bert()).size_bytes(MAX_PREPACKED_BYTES, num_threads)

    assert size == num_copies * 2 * 4 * (4 * 48 * 48 + 2 * 48 * 96)


def with_code_of_its_own() -> Any:
    """Its code may do anything besides."""
    kind = type("BertModel", (BertModel,), {"__module__": "transformers_modules.somebody"})
    return build(kind, BertConfig(**BERT))


def with_more_in_it() -> Any:
    model = bert()
    model.rotate = nn.Linear(48, 48)
    return model


def with_more_in_its_embeddings() -> Any:
    model = bert()
    model.embeddings.rotate = nn.Linear(48, 48)
    return model


def with_more_behind_its_layers() -> Any:
    model = bert()
    model.encoder.norm = nn.LayerNorm(48)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(hidden_act="gelu_new"),
        lambda: bert().to(torch.bfloat16),
        lambda: build(MPNetModel, MPNetConfig(**BERT)),
        lambda: build(ElectraModel, ElectraConfig(**BERT, embedding_size=24)),
        with_code_of_its_own,
        with_more_in_it,
        with_more_in_its_embeddings,
        with_more_behind_its_layers,
    ],
    ids=[
        "another activation", "another dtype", "a bias in its attention", "narrow embeddings", "code of its own",
        "a part of its own",
        "embeddings of its own", "a norm behind the layers",
    ],
)  # fmt: skip
def test_a_model_with_parts_that_such_a_pass_would_leave_out_has_no_copies(make: Any) -> None:
    assert copies_of(make()).size_bytes(MAX_PREPACKED_BYTES, 1) == 0


def test_layers_too_large_for_a_second_copy_have_none() -> None:
    copies = copies_of(bert())
    size = copies.size_bytes(MAX_PREPACKED_BYTES, 1)

    assert copies.size_bytes(size, 1) == size
    assert copies.size_bytes(size - 1, 1) == 0
    assert copies.size_bytes(size, 2) == 0, "one copy on one thread, two where several may share"


def test_copies_are_made_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, layout = copies_of(bert(), 2), PackedLayout([5], CPU)
    monkeypatch.setattr(PrepackedEncoder, "__init__", lambda *_: pytest.fail("made again"))
    copies.make(2)

    assert copies.supports(layout, "prepacked")
    assert copies.supports(layout, "shared")

    copies.make(0)
    assert not copies.supports(layout, "prepacked")
    assert not copies.supports(layout, "shared")


def test_on_one_thread_there_is_one_copy() -> None:
    assert not copies_of(bert(), 1).supports(PackedLayout([5], CPU), "shared")


def test_tables_of_embeddings_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of a small model, and a token reads only one row of each."""
    model, tables = bert(), list[np.ndarray[Any, Any]]()
    right = PrepackedEncoder.__call__

    def note(self: PrepackedEncoder, *args: Any) -> Any:
        tables.extend(self.tables.values())
        return right(self, *args)

    monkeypatch.setattr(PrepackedEncoder, "__call__", note)
    run(copies_of(model, 1), model, [5])

    words = model.embeddings.word_embeddings.weight.detach().numpy()
    assert any(np.shares_memory(table, words) for table in tables)


@pytest.mark.parametrize(("num_tokens", "num_calls"), [(5, 1), (192, 4), (400, 7)])
def test_a_pass_pauses_before_each_of_its_calls(num_tokens: int, num_calls: int) -> None:
    model, pauses = bert(num_hidden_layers=7), []
    lengths = [num_tokens] if num_tokens <= 192 else [100] * (num_tokens // 100)
    expected = plain(model, lengths)

    found = run(copies_of(model, 1), model, lengths, lambda: pauses.append(1))

    assert len(pauses) == num_calls
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_preempted_pass_resumes_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "_TOKEN_LAYERS", 5)
    model = bert(num_hidden_layers=3)
    copies = copies_of(model, 1)
    expected = [run(copies, model, lengths) for lengths in ([5], [2])]
    preempting: list[Tensor] = []

    found = run(copies, model, [5], lambda: preempting.append(run(copies, model, [2])))

    assert len(preempting) == 3
    assert torch.equal(found, expected[0])
    assert all(torch.equal(a, b) for a, b in pairwise([expected[1], *preempting]))
