"""Vectors of tokens and MaxSim are sentence-transformers' `MultiVectorEncoder`: every kind of folder, both sides."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES, mixed, text
from engines.batching.engine import EmbeddingEngine
from engines.errors import InvalidValue
from tests.testkit.late_models import FAMILIES, assert_same, outputs, reference, scored, split, vectors, wanted

pytestmark = pytest.mark.slow

NAMES = sorted(FAMILIES)
SIDES = ("query", "document", None)
TEXTS = [*mixed(8, seed=2, longest_words=30), *SENTENCES[:3], "x", "Why? Because!", "a, b. c"]
LONG = [text(400, 1), text(90, 2), "short", text(300, 3)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_each_text_gets_the_vectors_of_sentence_transformers(kit: Kit, name: str, side: str | None) -> None:
    assert_same(vectors(_engine(kit, name), TEXTS, side), wanted(_reference(kit, name), TEXTS, side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_long_texts_are_cut_as_the_reference_cuts_them_and_reported(kit: Kit, name: str, side: str | None) -> None:
    found = outputs(_engine(kit, name), LONG, side)

    assert_same(split(found), wanted(_reference(kit, name), LONG, side))
    assert {0, 3} <= set(found.truncated)
    assert 2 not in found.truncated


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_the_same_alone_in_a_crowd_and_in_any_order(kit: Kit, name: str, side: str) -> None:
    engine = _engine(kit, name)
    crowd = vectors(engine, TEXTS, side)

    assert_same([vectors(engine, [each], side)[0] for each in TEXTS], crowd)
    assert_same(vectors(engine, TEXTS[::-1], side)[::-1], crowd)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("name", ["bert-unseen-fillers", "mpnet"])
def test_no_neighbour_changes_a_texts_vectors(kit: Kit, name: str, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(TEXTS + LONG[:1]), min_size=1, max_size=10))
    side = data.draw(st.sampled_from(["query", "document"]))
    alone = _alone(kit, name, side)

    assert_same(vectors(_engine(kit, name), chosen, side), [alone[each] for each in chosen])


@pytest.mark.parametrize("name", NAMES)
def test_texts_share_a_row_where_the_backbone_can(kit: Kit, name: str) -> None:
    info = _engine(kit, name).info

    assert (info.attention == "packed") == FAMILIES[name].is_packed
    assert (info.outputs, info.dimensions, info.task) == (("multi_vector",), 0, "embed")
    assert info.vector_width == len(wanted(_reference(kit, name), ["a"], "document")[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_references_similarity(kit: Kit, name: str) -> None:
    query = "what is a yard, and why?"

    found = scored(_engine(kit, name), [query], TEXTS + LONG)

    assert (found.num_labels, found.labels) == (1, (_reference(kit, name).similarity_fn_name,))
    assert _far(found.array()[:, 0], _similarity(_reference(kit, name), [query], TEXTS + LONG)[0]) <= 1e-5
    assert {len(TEXTS), len(TEXTS) + 3} <= set(found.truncated)


@pytest.mark.parametrize("name", ["bert-unseen-fillers", "bert-seen-fillers", "pooled"])
def test_each_of_many_queries_is_scored_with_its_own_document(kit: Kit, name: str) -> None:
    queries = [TEXTS[number % 4] for number in range(len(TEXTS))]

    found = scored(_engine(kit, name), queries, TEXTS)

    assert _far(found.array()[:, 0], np.diag(_similarity(_reference(kit, name), queries, TEXTS))) <= 1e-5


@pytest.mark.parametrize("name", ["bert-unseen-fillers", "xlm-roberta"])
def test_a_score_is_the_same_alone_in_a_crowd_and_in_any_order(kit: Kit, name: str) -> None:
    engine = _engine(kit, name)
    crowd = scored(engine, ["a yard"], TEXTS).array()

    assert _far(np.concatenate([scored(engine, ["a yard"], [each]).array() for each in TEXTS]), crowd) <= 1e-5
    assert _far(scored(engine, ["a yard"], TEXTS[::-1]).array()[::-1], crowd) <= 1e-5


def test_the_tokens_of_a_query_are_counted_once_with_its_first_document(kit: Kit) -> None:
    engine = _engine(kit, "bert-unseen-fillers")
    documents = outputs(engine, TEXTS[:3], "document").token_counts

    one = scored(engine, ["a yard"], TEXTS[:3]).token_counts
    zipped = scored(engine, ["b", "a yard", "b"], TEXTS[:3]).token_counts

    assert one == (documents[0] + 24, *documents[1:])
    assert zipped == (documents[0] + 24, documents[1] + 24, documents[2])


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", ["bert-unseen-fillers", "pooled"])
def test_documents_are_merged_by_a_factor_and_queries_are_not(kit: Kit, name: str, factor: int) -> None:
    model, pooling = _reference(kit, name), HierarchicalTokenPooling(factor)

    for side in ("document", "query"):
        merged = vectors(_engine(kit, name), TEXTS, side, pool_factor=factor)
        assert_same(merged, wanted(model, TEXTS, side, token_pooling=pooling))


def test_a_call_without_a_query_and_one_for_probabilities_are_refused(kit: Kit) -> None:
    engine = _engine(kit, "modernbert")

    with pytest.raises(InvalidValue, match="send a query too"):
        scored(engine, [], ["a"])
    with pytest.raises(InvalidValue, match="no probabilities"):
        scored(engine, ["a"], ["a"], activation="probabilities")
    with pytest.raises(InvalidValue, match="2 queries for 3 texts"):
        scored(engine, ["a", "b"], ["a"] * 3)


def test_documents_are_cut_to_the_tokens_that_a_call_allows(kit: Kit) -> None:
    engine, model = _engine(kit, "bert-unseen-fillers"), _reference(kit, "bert-unseen-fillers")

    found = scored(engine, ["a yard"], LONG, max_text_tokens=7)

    assert found.token_counts[1:] == tuple(min(7 + _frame(model), count) for count in _counts(engine)[1:])
    assert found.truncated == (0, 1, 3)


def _frame(model: MultiVectorEncoder) -> int:
    return 2 + len(model.tokenizer.tokenize("[D] "))


def _counts(engine: EmbeddingEngine) -> tuple[int, ...]:
    return outputs(engine, LONG, "document").token_counts


def _similarity(model: MultiVectorEncoder, queries: list[str], documents: list[str]) -> Any:
    with quiet():
        return model.similarity(model.encode_query(queries), model.encode_document(documents)).numpy()


def _far(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float((np.abs(found - expected) / np.maximum(1.0, np.abs(expected))).max())


def _folder(kit: Kit, name: str) -> Path:
    folder = kit.folder / f"late-{name}"
    if not folder.exists():
        FAMILIES[name].build(folder)
    return folder


@cache
def _engine(kit: Kit, name: str) -> EmbeddingEngine:
    return kit.load(_folder(kit, name))


@cache
def _reference(kit: Kit, name: str) -> MultiVectorEncoder:
    return reference(_folder(kit, name))


@cache
def _alone(kit: Kit, name: str, side: str) -> dict[str, Any]:
    texts = TEXTS + LONG[:1]
    return dict(zip(texts, wanted(_reference(kit, name), texts, side), strict=True))
