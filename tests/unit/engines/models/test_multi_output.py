"""Models that embed give, from one pass, dense vectors and the hidden states of all tokens, on every path."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, answer, assert_same
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.errors import TaskNotSupported
from engines.layers.packing import PackedLayout
from engines.models.base import ForwardPathFailed
from engines.models.multi_output import MultiOutputEncoder
from engines.models.outputs import Wanted
from engines.types import Outputs, OutputsCall
from tests.testkit.fake_gpu_families import texts_for

TEXTS = [*SENTENCES[:6], "a", SENTENCES[0]]
RECIPES = [
    "bert-cls",
    "bert-mean-normalize-legacy",
    "bert-dense-tokens",
    "qwen3-last",
    "xlm-roberta-cls",
    "modernbert-cls",
    "jamba-mean",
]


def outputs_of(engine: EmbeddingEngine, texts: list[str], *names: Any, **options: Any) -> Outputs:
    result = asyncio.run(engine.run(OutputsCall(model_id="m", texts=tuple(texts), outputs=names, **options)))
    assert isinstance(result, Outputs)
    return result


def encoder_of(engine: EmbeddingEngine) -> MultiOutputEncoder:
    assert engine._runner is not None
    encoder = engine._runner._encoder
    assert isinstance(encoder, MultiOutputEncoder)
    return encoder


@pytest.mark.parametrize("name", RECIPES)
def test_states_of_tokens_are_those_of_sentence_transformers(kit: Kit, name: str) -> None:
    engine = kit.engine(name)
    with quiet():
        wanted = kit.reference(name).encode(TEXTS, output_value="token_embeddings", show_progress_bar=False)

    found = outputs_of(engine, TEXTS, "tokens")

    assert found.num_vectors == tuple(map(len, wanted)) == found.token_counts
    assert_same(found.vectors(), np.concatenate([states.numpy() for states in wanted]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_dense_output_has_the_bytes_of_an_embedding(kit: Kit, name: str) -> None:
    engine = kit.engine(name)

    alone = outputs_of(engine, TEXTS, "dense")
    beside = outputs_of(engine, TEXTS, "dense", "tokens")
    wanted = answer(engine, texts=tuple(TEXTS))

    assert alone.array().tobytes() == wanted.vectors
    assert_same(beside.array(), wanted.array())
    assert (alone.token_counts, alone.dimensions) == (wanted.token_counts, wanted.dimensions)


@pytest.mark.parametrize("name", ["bert-cls", "bert-mean-normalize-legacy", "qwen3-last", "mpnet-mean"])
def test_every_path_gives_the_states_of_all_tokens(kit: Kit, name: str) -> None:
    engine = kit.load(kit.recipe_folder(name))
    encoder = encoder_of(engine)
    texts = texts_for(encoder)
    expected: Tensor | None = None

    for path in reversed(encoder.candidate_paths()):
        encoder.switch_to(path)
        found = encoder.run_outputs(texts, None, Wanted(dense=True, states=True))
        assert found.tokens is not None
        assert found.dense is not None
        expected = found.tokens.vectors if expected is None else expected
        assert_same(found.tokens.vectors.numpy(), expected.numpy())
        assert_same(found.dense.numpy(), encoder.reference(texts).numpy())


def test_a_pass_for_several_outputs_leaves_a_path_that_fails(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(kit.load(kit.recipe_folder("bert-mean-normalize-legacy")))
    encoder.switch_to("fused")
    texts, wanted = texts_for(encoder), Wanted(states=True)
    right = encoder.run_outputs(texts, None, wanted).tokens

    def fail(*_: object) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(encoder, "_row", fail)
    with pytest.raises(ForwardPathFailed):
        encoder.run_outputs(texts, None, wanted)
    found = encoder.run_outputs(texts, None, wanted).tokens

    assert encoder.path == "unpadded"
    assert right is not None
    assert found is not None
    assert_same(found.vectors.numpy(), right.vectors.numpy())


def test_states_of_all_tokens_that_are_wrong_where_vectors_need_one_are_found_at_load(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = MultiOutputEncoder._pooled

    def changed(self: Any, hidden: Tensor, layout: PackedLayout, prompt_tokens: Any = None) -> Tensor:
        wrong = self.path in ("fused", "prepacked") and layout.needs_all
        return pooled(self, hidden + torch.arange(hidden.shape[-1]) * wrong, layout, prompt_tokens)

    monkeypatch.setattr(MultiOutputEncoder, "_pooled", changed)

    info = kit.load(kit.recipe_folder("bert-cls")).info

    assert info.path == "packed"
    assert "with the states of all tokens" in " ".join(info.notes)


def test_a_model_without_states_refuses_them(kit: Kit) -> None:
    engine = kit.engine("static")

    with pytest.raises(TaskNotSupported, match="m gives dense; it has no tokens output"):
        outputs_of(engine, TEXTS, "tokens")
    assert outputs_of(engine, TEXTS, "dense").array().tobytes() == answer(engine, texts=tuple(TEXTS)).vectors


def test_one_text_has_the_same_states_alone_and_in_any_order(kit: Kit) -> None:
    engine = kit.engine("bert-cls")
    whole = outputs_of(engine, TEXTS, "tokens")
    parts = np.split(whole.vectors(), np.cumsum(whole.num_vectors)[:-1])

    backwards = outputs_of(engine, TEXTS[::-1], "tokens")

    assert_same(backwards.vectors(), np.concatenate(parts[::-1]))
    for text, states in zip(TEXTS, parts, strict=True):
        assert_same(outputs_of(engine, [text], "tokens").vectors(), states)


def test_the_description_names_what_a_model_gives(kit: Kit) -> None:
    info = kit.engine("bert-mean-normalize-legacy").info

    assert (info.outputs, info.vocab_size, info.vector_width) == (("dense",), 0, 0)
