"""Engines of decoders: queries behind one instruction, alone or together, and checks of what only such passes run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.workloads import SENTENCES
from engines.layers import attention, blocked_attention, packing
from engines.layers.decoder_script import ScriptedLayer
from engines.layers.shared_prefix import SharedPrefixLayout
from engines.models import path_forms, transformer, weight_forms

TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
CAUSAL = ["qwen3-last", "qwen2-last", "mistral-last", "llama-mean"]
QUERIES = list(SENTENCES[:5])


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many tokens the texts of each pass share."""
    found: list[int] = []

    class Recorded(SharedPrefixLayout):
        def __init__(self, lengths: Sequence[int], num_shared: int, device: torch.device) -> None:
            found.append(num_shared)
            super().__init__(lengths, num_shared, device)

    monkeypatch.setattr(transformer, "SharedPrefixLayout", Recorded)
    return found


@pytest.mark.parametrize("name", CAUSAL)
def test_queries_that_share_an_instruction_have_the_vectors_of_sentence_transformers(
    kit: Kit, shared: list[int], name: str
) -> None:
    engine = kit.engine(name)
    assert engine.info.path == "fused"

    got = embed(engine, QUERIES, prompt=TASK)

    assert max(shared) > 10
    assert_same(got, encode(kit.reference(name), QUERIES, prompt=TASK))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_vector_does_not_depend_on_whether_an_instruction_was_shared(kit: Kit, shared: list[int], name: str) -> None:
    engine = kit.engine(name)

    together = embed(engine, QUERIES, prompt=TASK)
    assert shared
    shared.clear()
    alone = np.concatenate([embed(engine, [query], prompt=TASK) for query in QUERIES])
    beside_others = embed(engine, [*(TASK + query for query in QUERIES), "x"], prompt="")[: len(QUERIES)]

    assert not shared
    assert_same(together, alone)
    assert_same(together, beside_others)


@pytest.mark.parametrize("name", ["qwen2-bidirectional", "gemma3-bidirectional", "bert-cls"])
def test_models_that_are_not_causal_share_nothing(kit: Kit, shared: list[int], name: str) -> None:
    got = embed(kit.engine(name), QUERIES, prompt=TASK)

    assert not shared
    assert_same(got, encode(kit.reference(name), QUERIES, prompt=TASK))


def _all_visible(length: int, num_keys: int, *_: Any) -> Tensor:
    return torch.ones(length, num_keys, dtype=torch.bool)


def _first_keys(states: Tensor, prefix: Any, group: Any) -> Tensor:
    return _AFTER_PREFIX(states, prefix, group).roll(1, dims=2)


_AFTER_PREFIX = attention._after_prefix


@pytest.mark.parametrize(("function", "wrong"), [("_suffix_mask", _all_visible), ("_after_prefix", _first_keys)])
def test_shared_tokens_that_change_vectors_are_found_at_load(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, function: str, wrong: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(attention, function, wrong)
    engine = kit.load(kit.recipe_folder("qwen3-last"))

    assert engine.info.path == "packed"
    assert engine.info.notes[0].startswith("packed: the fused path, with shared tokens, is")
    assert_same(embed(engine, QUERIES, prompt=TASK), encode(kit.reference("qwen3-last"), QUERIES, prompt=TASK))


@pytest.mark.parametrize("name", ["qwen3-last", "bert-cls", "eurobert-mean"])
def test_attention_in_blocks_that_is_wrong_is_found_at_load(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = blocked_attention.blocked_attention
    monkeypatch.setattr(blocked_attention, "_NARROWEST", 1)
    monkeypatch.setattr(path_forms, "onednn_is_faster", lambda: True)
    assert kit.load(kit.recipe_folder(name)).info.attention == "packed"

    monkeypatch.setattr(attention, "blocked_attention", lambda *args, **options: 1.01 * right(*args, **options))
    info = kit.load(kit.recipe_folder(name)).info

    assert info.attention == "padded"
    assert "with attention in blocks" in info.notes[-1]


@pytest.mark.parametrize("step", ["__call__", "finish"])
def test_layers_in_torchscript_that_are_wrong_are_found_at_load(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    right = getattr(ScriptedLayer, step)
    monkeypatch.setattr(weight_forms, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(ScriptedLayer, step, lambda self, *states: right(self, *states).roll(1, dims=-1))
    engine = kit.load(kit.recipe_folder("llama-mean"))

    assert engine.info.path == "packed"
    assert engine.info.notes[0].startswith("packed: the fused path is")
    assert_same(embed(engine, QUERIES, prompt=TASK), encode(kit.reference("llama-mean"), QUERIES, prompt=TASK))


def test_blocks_that_leave_out_shared_tokens_are_found_at_load(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_forms, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(packing, "causal_blocks", _without_shared_tokens)
    engine = kit.load(kit.recipe_folder("qwen3-last"))

    assert engine.info.path == "packed"
    assert engine.info.notes[0].startswith("packed: the fused path, with shared tokens, is")
    assert_same(embed(engine, QUERIES, prompt=TASK), encode(kit.reference("qwen3-last"), QUERIES, prompt=TASK))


def _without_shared_tokens(layout: packing.PackedLayout, heads: int) -> Any:
    blocks, places = _CAUSAL_BLOCKS(layout, heads)
    return [[*block[:-1], 0] for block in blocks], places


_CAUSAL_BLOCKS = packing.causal_blocks
