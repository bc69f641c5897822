"""Parity with sentence-transformers on the same folder, row by row: every family, pooling and prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from benchmarks.lib.engine_kit import Kit, answer, assert_same, embed, encode
from benchmarks.lib.models import RECIPES
from benchmarks.lib.workloads import SENTENCES, mixed, text
from engines.spec import Matryoshka

pytestmark = pytest.mark.slow

NAMES = sorted(RECIPES)
TEXTS = mixed(18, seed=1)
FEW = [TEXTS[0], *SENTENCES[:6], "x"]

# Widths of the whole model, then those that the folder or the registry allows.
CUT = ["bert-default-width", "gemma3-bidirectional", "jina-v3-mean", "nomic-mean", "qwen3-last"]
PROMPTED = [
    "bert-instructor", "gemma3-bidirectional", "nomic-mean", "qwen3-last", "xlm-roberta-cls",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_text_gets_the_vector_of_sentence_transformers(kit: Kit, name: str) -> None:
    got = embed(kit.engine(name), TEXTS)

    assert_same(got, encode(kit.reference(name), TEXTS))


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_that_is_not_to_be_normalised_keeps_its_length(kit: Kit, name: str) -> None:
    got = embed(kit.engine(name), FEW, normalize=False)

    assert_same(got, encode(kit.reference(name), FEW, normalize_embeddings=False))


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_would_show_a_difference(kit: Kit, name: str) -> None:
    vectors = encode(kit.reference(name), list(SENTENCES))
    likeness = (vectors @ vectors.T)[~np.eye(len(SENTENCES), dtype=bool)]

    assert np.median(likeness) < 0.9
    assert likeness.max() < 0.95


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_path_is_taken_where_possible_and_a_note_gives_the_reason_where_not(kit: Kit, name: str) -> None:
    recipe, info = RECIPES[name], kit.engine(name).info

    assert info.attention == recipe.attention
    assert [recipe.padded_because in note for note in info.notes] == ([True] if recipe.padded_because else [])


@pytest.mark.parametrize("name", NAMES)
def test_token_counts_are_the_tokenizers(kit: Kit, name: str) -> None:
    encoded = answer(kit.engine(name), texts=tuple(TEXTS), prompt="")

    assert list(encoded.token_counts) == [len(ids) for ids in _ids(kit, name, TEXTS)]


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_taken_as_they_are(kit: Kit, name: str) -> None:
    ids = _ids(kit, name, FEW)
    got = answer(kit.engine(name), token_ids=tuple(tuple(row) for row in ids)).array()

    assert_same(got, embed(kit.engine(name), FEW, prompt=""))


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "static"])
def test_a_long_text_is_cut_at_either_end(kit: Kit, name: str, side: str) -> None:
    texts = [text(400, seed) for seed in range(3)]
    model = kit.reference(name)
    with _cutting(model, "left" if side == "start" else "right"):
        wanted = encode(model, texts)
    got = answer(kit.engine(name), texts=tuple(texts), truncate=side)

    assert got.truncated == (0, 1, 2)
    assert_same(got.array(), wanted)


@pytest.mark.parametrize("name", PROMPTED)
def test_each_prompt_stands_in_front_byte_for_byte(kit: Kit, name: str) -> None:
    engine, model = kit.engine(name), kit.reference(name)

    assert engine.info.prompts
    for prompt in engine.info.prompts:
        assert_same(embed(engine, FEW, input_type=prompt), encode(model, FEW, prompt_name=prompt))


@pytest.mark.parametrize("name", [*PROMPTED, "bert-cls", "static"])
def test_a_prompt_of_the_request_is_used_as_it_is(kit: Kit, name: str) -> None:
    for prompt in ("Find this:\n", " ", ""):
        got = embed(kit.engine(name), FEW, prompt=prompt)

        assert_same(got, encode(kit.reference(name), FEW, prompt=prompt))


@pytest.mark.parametrize("name", [*PROMPTED, "bert-cls"])
def test_queries_and_documents_get_what_encode_query_and_encode_document_give(kit: Kit, name: str) -> None:
    engine, model = kit.engine(name), kit.reference(name)
    # With other names for the two (nomic), sentence-transformers' methods leave the prompt out; ours do not.
    query, document = ("search_query", "search_document") if name == "nomic-mean" else ("query", "document")

    assert_same(embed(engine, FEW, input_type="query"), encode(model, FEW, prompt_name=query))
    assert_same(embed(engine, FEW, input_type="document"), encode(model, FEW, prompt_name=document))


@pytest.mark.parametrize("name", CUT)
def test_each_width_is_cut_and_then_normalised(kit: Kit, name: str) -> None:
    engine, model = kit.engine(name), kit.reference(name)
    allowed = engine.info.matryoshka
    for width in _widths(allowed, engine.info.dimensions):
        wanted = encode(model, FEW, truncate_dim=width)
        if allowed.layer_norm and width < engine.info.dimensions:
            whole = torch.from_numpy(encode(model, FEW, normalize_embeddings=False))
            wanted = normalize(layer_norm(whole, (whole.shape[1],))[:, :width], dim=-1).numpy()

        assert_same(embed(engine, FEW, dimensions=width), wanted)


def test_a_width_that_the_folder_cuts_to_by_default_is_the_default(kit: Kit) -> None:
    assert embed(kit.engine("bert-default-width"), FEW).shape[1] == 32
    assert embed(kit.engine("bert-default-width"), FEW, dimensions=48).shape[1] == 48


def _widths(allowed: Matryoshka, native: int) -> list[int]:
    return [allowed.minimum, 17, native] if allowed.minimum is not None else [*allowed.widths, native]


def _ids(kit: Kit, name: str, texts: list[str]) -> list[list[int]]:
    """Returns the ids that the folder's own tokenizer gives for texts, truncated as the folder states."""
    tokenizer = kit.reference(name).tokenizer
    if name == "static":
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids: list[list[int]] = tokenizer(texts, truncation=True)["input_ids"]
    return ids


@contextmanager
def _cutting(model: Any, side: str) -> Iterator[None]:
    """Makes the tokenizer of sentence-transformers truncate on that side."""
    was, model.tokenizer.truncation_side = model.tokenizer.truncation_side, side
    yield
    model.tokenizer.truncation_side = was
