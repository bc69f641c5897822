"""Pieces of documents: parity with one pass of transformers over the document, pooled piece by piece."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.lib.engine_kit import Kit, Vectors, assert_same, embed
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import text
from engines.batching.engine import EmbeddingEngine
from engines.errors import DimensionsNotSupported, InvalidValue, TaskNotSupported
from engines.inputs.documents import plan_windows
from engines.types import ContextualCall, Embeddings

MEAN = ["bert-mean-normalize-legacy", "bert-dense-tanh-legacy", "bert-dense-tokens", "jina-v3-mean", "mpnet-mean",
        "nomic-mean", "roberta-mean", "llama-mean", "gemma3-bidirectional", "t5-mean-dense", "deberta-v2-mean",
        "jamba-mean"]  # fmt: skip
PIECES = [f"{text(4 + 3 * seed, seed)}. " for seed in range(4)]


def _ask(engine: EmbeddingEngine, *documents: Sequence[str], **call: Any) -> Embeddings:
    pieces = tuple(piece for document in documents for piece in document)
    counts = tuple(map(len, documents))
    result = asyncio.run(engine.run(ContextualCall(model_id="m", texts=pieces, pieces=counts, **call)))
    assert isinstance(result, Embeddings)
    return result


def late_chunks(model: SentenceTransformer, pieces: Sequence[str], prompt: str = "") -> Vectors:
    """The reference: one pass over the joined text, then the mean of each piece's tokens and the other modules."""
    tokenizer, modules = model.tokenizer, list(model)
    encoded = tokenizer(prompt + "".join(pieces), return_offsets_mapping=True, return_special_tokens_mask=True)
    bounds = np.cumsum([len(prompt), *map(len, pieces)])
    ends = [max(end - 1, start) for start, end in encoded["offset_mapping"]]
    owners = np.clip(np.searchsorted(bounds, ends, side="right") - 1, 0, len(pieces) - 1)
    last = max(at for at, is_special in enumerate(encoded["special_tokens_mask"]) if not is_special)
    owners[last + 1 :] = len(pieces) - 1
    ids = torch.tensor([encoded["input_ids"]])
    with torch.inference_mode(), quiet():
        tokens = modules[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"][0]
        rows = []
        for piece in range(len(pieces)):
            own = tokens[torch.from_numpy(owners == piece)][None]
            features = {"token_embeddings": own, "attention_mask": torch.ones(own.shape[:2], dtype=torch.long)}
            for module in modules[1:]:
                features = module(features)
            rows.append(features["sentence_embedding"][0])
        vectors: Vectors = torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1).numpy()
    return vectors


@pytest.mark.parametrize("name", MEAN)
def test_each_piece_is_the_mean_of_its_tokens_in_the_whole_document(kit: Kit, name: str) -> None:
    got = _ask(kit.engine(name), PIECES, PIECES[1:3], prompt="find: ")

    model = kit.reference(name)
    assert_same(got.array(), np.concatenate([late_chunks(model, each, "find: ") for each in (PIECES, PIECES[1:3])]))


@pytest.mark.parametrize("name", MEAN)
def test_a_document_of_one_piece_gets_the_vector_of_its_text(kit: Kit, name: str) -> None:
    engine = kit.engine(name)

    assert_same(_ask(engine, PIECES[:1]).array(), embed(engine, PIECES[:1]))


def test_a_piece_depends_on_the_rest_of_its_document(kit: Kit) -> None:
    engine = kit.engine("jina-v3-mean")
    together, alone = _ask(engine, PIECES).array(), embed(engine, PIECES)

    assert ((together * alone).sum(axis=1) < 0.999).all()


def test_a_document_longer_than_the_model_is_read_in_windows(kit: Kit) -> None:
    name = "bert-mean-normalize-legacy"
    engine, model = kit.engine(name), kit.reference(name)
    pieces = [f"{text(12 + seed % 7, seed)}. " for seed in range(60)]
    counts = [len(model.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
    plan = plan_windows(counts, engine.info.max_tokens - 2)

    got = _ask(engine, pieces)

    assert len(plan) > 2
    assert sum(got.token_counts) == sum(sum(counts[each.first : each.end]) + 2 for each in plan)
    for window in plan:
        wanted = _in_window(model, pieces, window.first, window.end)
        own = slice(window.first_given, window.end_given)
        assert_same(got.array()[own], wanted[own.start - window.first : own.stop - window.first])


def _in_window(model: SentenceTransformer, pieces: Sequence[str], first: int, end: int) -> Vectors:
    """The reference for the pieces of one window: special tokens are part of the document's first and last piece."""
    ids = torch.tensor([model.tokenizer("".join(pieces[first:end]))["input_ids"]])
    counts = [len(model.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces[first:end]]
    bounds = 1 + np.cumsum([0, *counts])
    spans = [[*span] for span in pairwise(bounds)]
    spans[0][0] -= first == 0
    spans[-1][1] += end == len(pieces)
    with torch.inference_mode(), quiet():
        tokens = model[0]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"][0]
        rows = torch.stack([tokens[a:b].mean(dim=0) for a, b in spans])
    vectors: Vectors = torch.nn.functional.normalize(rows, dim=-1).numpy()
    return vectors


def test_the_same_document_in_other_pieces_is_another_one(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("jina-v3-mean"), cache_bytes=1 << 20)
    first, again = _ask(engine, PIECES), _ask(engine, PIECES)
    joined = _ask(engine, [PIECES[0] + PIECES[1], *PIECES[2:]])

    assert (first.cache_hits, again.cache_hits, joined.cache_hits) == (0, 1, 0)
    np.testing.assert_array_equal(first.array(), again.array())
    assert joined.array().shape[0] == 3
    assert again.token_counts == first.token_counts


def test_widths_and_lengths_are_those_of_ordinary_vectors(kit: Kit) -> None:
    full = _ask(kit.engine("roberta-mean"), PIECES, normalize=False).array()
    engine = kit.engine("nomic-mean")
    cut = _ask(engine, PIECES, dimensions=16).array()

    assert cut.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert (abs(np.linalg.norm(full, axis=1) - 1) > 1e-3).any()
    with pytest.raises(DimensionsNotSupported):
        _ask(engine, PIECES, dimensions=17_000)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert-cls", "pools by cls"), ("qwen2-last", "pools by lasttoken"), ("bert-max", "pools by max"),
     ("bert-weighted", "pools by weightedmean"), ("bert-cls-mean", "pools by cls and mean"), ("static", "no context")],
)  # fmt: skip
def test_a_model_that_pools_otherwise_is_refused_with_the_reason(kit: Kit, name: str, reason: str) -> None:
    with pytest.raises(TaskNotSupported, match=reason):
        _ask(kit.engine(name), PIECES)


def test_pieces_as_token_ids_are_refused(kit: Kit) -> None:
    call = ContextualCall(model_id="m", token_ids=((1, 2),), pieces=(1,))
    with pytest.raises(InvalidValue, match="as texts"):
        asyncio.run(kit.engine("jina-v3-mean").run(call))
