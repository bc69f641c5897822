"""Scores are those of sentence-transformers' CrossEncoder on the same folder: every family, head and template."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES, mixed, text
from engines.batching.engine import EmbeddingEngine
from engines.loading.loader import LoaderSettings
from tests.testkit.rerankers import FAMILIES, answer, card_logits, edit, predicted, reference, scores

pytestmark = pytest.mark.slow

NAMES = sorted(FAMILIES)
COMPARED = [name for name in NAMES if FAMILIES[name].kind != "original"]
ORIGINAL = [name for name in NAMES if FAMILIES[name].kind == "original"]

PAIRS = [(SENTENCES[number % 5], document) for number, document in enumerate(mixed(9, seed=3, longest_words=30))]
PAIRS += [("a", "b"), ("两个人：", "émigré …\n"), ("Why?", "<b>")]
LONG_TEXT = [(text(4, 1), text(400, 2)), (text(9, 3), text(380, 4))]
LONG_BOTH = [(text(400, 1), text(3, 2)), (text(390, 1), text(400, 2)), (text(400, 5), text(390, 6))]

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", COMPARED)
def test_each_pair_gets_the_score_of_sentence_transformers(kit: Kit, name: str) -> None:
    engine, model = _engine(kit, name), _reference(kit, name)

    assert _far(scores(engine, PAIRS), predicted(model, PAIRS)) <= TOLERANCE
    logits = predicted(model, PAIRS, activation_fn=nn.Identity())
    assert _far(scores(engine, PAIRS, activation="none"), logits) <= TOLERANCE


@pytest.mark.parametrize("name", ORIGINAL)
def test_each_pair_gets_the_score_of_the_model_card(kit: Kit, name: str) -> None:
    found = scores(_engine(kit, name), PAIRS, activation="none")

    assert _far(found, card_logits(name, _folder(kit, name), PAIRS)) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_family_would_show_a_difference(kit: Kit, name: str) -> None:
    logits = scores(_engine(kit, name), PAIRS, activation="none")

    assert logits.std(axis=0).min() > 0.03


@pytest.mark.parametrize("name", NAMES)
def test_pairs_share_a_row_where_the_backbone_can(kit: Kit, name: str) -> None:
    info = _engine(kit, name).info

    assert (info.attention == "packed") == FAMILIES[name].is_packed
    assert (info.dimensions, len(info.labels)) == (0, FAMILIES[name].num_labels)
    assert info.task == ("rerank" if FAMILIES[name].num_labels == 1 else "classify")


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_the_same_alone_in_a_crowd_and_in_any_order(kit: Kit, name: str) -> None:
    engine = _engine(kit, name)
    crowd = scores(engine, PAIRS)

    assert _far(np.concatenate([scores(engine, [pair]) for pair in PAIRS]), crowd) <= TOLERANCE
    assert _far(scores(engine, PAIRS[::-1])[::-1], crowd) <= TOLERANCE


@pytest.mark.parametrize("name", COMPARED)
def test_a_document_that_is_too_long_is_cut_as_the_reference_cuts_it(kit: Kit, name: str) -> None:
    found = answer(
        _engine(kit, name), [pair[1] for pair in LONG_TEXT + PAIRS[:2]], queries=[p[0] for p in LONG_TEXT + PAIRS[:2]]
    )

    assert found.truncated == (0, 1)
    assert _far(found.array()[:2], predicted(_reference(kit, name), LONG_TEXT)) <= TOLERANCE


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("name", [name for name in COMPARED if FAMILIES[name].kind == "pair"])
def test_both_texts_are_cut_on_either_side_as_the_reference_cuts_them(kit: Kit, name: str, side: Any) -> None:
    engine = _loaded(kit, name, side)
    pairs = LONG_BOTH + LONG_TEXT
    with _cutting(_reference(kit, name), "left" if side == "start" else "right"):
        wanted = predicted(_reference(kit, name), pairs)

    assert _far(scores(engine, pairs), wanted) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].kind == "pair"])
def test_single_texts_get_the_scores_of_sentence_transformers(kit: Kit, name: str) -> None:
    texts = [pair[1] for pair in PAIRS] + [text(400, 2)]

    found = answer(_engine(kit, name), texts)

    assert _far(found.array(), predicted(_reference(kit, name), texts)) <= TOLERANCE


def test_a_pair_of_equal_ids_and_other_types_is_another_pair(kit: Kit) -> None:
    engine = _engine(kit, "bert-modules")
    pairs = [("one [SEP] two", "three"), ("one", "two [SEP] three")]

    found = answer(engine, [pair[1] for pair in pairs], queries=[pair[0] for pair in pairs])

    assert found.deduplicated == 0
    assert found.token_counts[0] == found.token_counts[1]
    assert abs(found.array()[0] - found.array()[1]) > 1e-4
    assert _far(found.array(), predicted(_reference(kit, "bert-modules"), pairs)) <= TOLERANCE


def test_cached_scores_serve_every_activation_and_tell_types_apart(kit: Kit) -> None:
    engine = kit.load(_folder(kit, "bert-modules"), cache_bytes=1 << 20)
    pairs = [("one [SEP] two", "three"), ("one", "two [SEP] three")]
    first = scores(engine, pairs)

    again = answer(engine, [pair[1] for pair in pairs], queries=[pair[0] for pair in pairs])
    logits = scores(engine, pairs, activation="none")

    assert again.cache_hits == 2
    assert (again.array() == first).all()
    assert _far(1 / (1 + np.exp(-logits)), first) <= TOLERANCE
    engine.close()


def test_probabilities_are_softmax_or_sigmoid(kit: Kit) -> None:
    def logits(name: str) -> NDArray[np.float32]:
        return scores(_engine(kit, name), PAIRS, activation="none")

    nli = scores(_engine(kit, "roberta-nli"), PAIRS, activation="probabilities")
    multi = scores(_engine(kit, "bert-multi-label"), PAIRS, activation="probabilities")
    one = scores(_engine(kit, "bert-legacy-identity"), PAIRS, activation="probabilities")

    powers = np.exp(logits("roberta-nli").astype(np.float64))
    assert np.abs(nli - powers / powers.sum(axis=1, keepdims=True)).max() < 1e-6
    assert np.abs(multi - 1 / (1 + np.exp(-logits("bert-multi-label")))).max() < 1e-6
    assert np.abs(one - 1 / (1 + np.exp(-logits("bert-legacy-identity")))).max() < 1e-6


def test_labels_are_in_the_order_of_id2label(kit: Kit) -> None:
    info = _engine(kit, "roberta-nli").info

    assert info.labels == ("contradiction", "entailment", "neutral")
    assert not info.is_multi_label
    assert _engine(kit, "bert-multi-label").info.is_multi_label


@pytest.mark.parametrize("name", ["bert-modules", "xlm-roberta", "modernbert-mean", "qwen3-logits", "deberta-v2"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(indexes=st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=9), is_small=st.booleans())
def test_neighbours_do_not_show_in_a_score(kit: Kit, name: str, indexes: list[int], is_small: bool) -> None:
    found = scores(_small_batches(kit, name) if is_small else _engine(kit, name), [PAIRS[i] for i in indexes])

    assert _far(found, _alone(kit, name)[indexes]) <= TOLERANCE


def test_a_prompt_of_the_folder_stands_before_the_query(kit: Kit) -> None:
    with_prompt = [(f"Which passage answers this? {query}", document) for query, document in PAIRS]

    plain = scores(_engine(kit, "bert-modules"), with_prompt)

    assert _far(scores(_engine(kit, "bert-prompt"), PAIRS), plain) <= TOLERANCE


def test_a_folder_that_cuts_at_the_start_does_so_unasked(kit: Kit) -> None:
    engine, model = _engine(kit, "bert-left"), _reference(kit, "bert-left")

    assert model.tokenizer.truncation_side == "left"
    assert _far(scores(engine, LONG_BOTH), predicted(model, LONG_BOTH)) <= TOLERANCE


@pytest.mark.parametrize("key", ["activation_fn", "classifier.weight"])
def test_the_files_decide_and_not_a_default(kit: Kit, tmp_path: Path, key: str) -> None:
    """A canary of the suite itself: what the reference reads, we read."""
    FAMILIES["bert-modules"].build(tmp_path / "m")
    if key == "activation_fn":
        edit(tmp_path / "m" / "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Tanh")
    engine = kit.load(tmp_path / "m")

    found = scores(engine, PAIRS)

    assert _far(found, predicted(reference(tmp_path / "m"), PAIRS)) <= TOLERANCE
    assert (_far(found, scores(_engine(kit, "bert-modules"), PAIRS)) > 1e-3) == (key == "activation_fn")
    engine.close()


def _far(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())


@cache
def _folder(kit: Kit, name: str) -> Path:
    folder = kit.folder / "rerankers" / name
    folder.parent.mkdir(exist_ok=True)
    with quiet():
        FAMILIES[name].build(folder)
    return folder


@cache
def _engine(kit: Kit, name: str) -> EmbeddingEngine:
    return kit.load(_folder(kit, name), **FAMILIES[name].spec)


@cache
def _small_batches(kit: Kit, name: str) -> EmbeddingEngine:
    small = LoaderSettings(max_batch_tokens=300, max_batch_items=3)
    return kit.load(_folder(kit, name), settings=small, **FAMILIES[name].spec)


@cache
def _loaded(kit: Kit, name: str, side: str) -> EmbeddingEngine:
    return kit.load(_folder(kit, name), truncate=side, **FAMILIES[name].spec)


@cache
def _reference(kit: Kit, name: str) -> Any:
    return reference(_folder(kit, name))


@cache
def _alone(kit: Kit, name: str) -> NDArray[np.float32]:
    return np.concatenate([scores(_engine(kit, name), [pair]) for pair in PAIRS])


@contextmanager
def _cutting(model: Any, side: str) -> Iterator[None]:
    usual = model.tokenizer.truncation_side
    model.tokenizer.truncation_side = side
    try:
        yield
    finally:
        model.tokenizer.truncation_side = usual
