"""Tests the judgement of reduced dtypes, and the store of what was measured."""

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from engines.precision import FORM_VERSIONS, PrecisionStore, compare, describe_offer, why_refused
from engines.spec import ModelSpec, Precision

SPEC = ModelSpec(model_id="m", source="./m")


def _precision(dtype: str = "bfloat16", worst: float = 0.9999, speedup: float = 2.9) -> Precision:
    return Precision(
        dtype=dtype, worst_cosine=worst, median_cosine=0.99995, recall_at_10=0.99, speedup=speedup, size_ratio=0.5,
        num_texts=50,
    )  # fmt: skip


def test_the_same_vectors_are_perfect_also_at_another_length() -> None:
    vectors = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)

    worst, median, recall = compare(3 * vectors, vectors)

    assert (worst, median, recall) == pytest.approx((1.0, 1.0, 1.0))


def test_one_bad_vector_shows_in_the_worst_cosine_and_in_recall_but_not_in_the_median() -> None:
    vectors = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    damaged = vectors.copy()
    damaged[3] = -damaged[3]

    worst, median, recall = compare(damaged, vectors)

    assert worst == pytest.approx(-1.0)
    assert median == pytest.approx(1.0)
    assert 0.5 < recall < 1.0


@pytest.mark.parametrize(
    ("dtype", "worst", "min_cosine", "is_refused"),
    [
        ("bfloat16", 0.9991, None, False),
        ("bfloat16", 0.9989, None, True),
        ("int8", 0.991, None, False),
        ("int8", 0.989, None, True),
        ("int8", 0.991, 0.995, True),
        ("bfloat16", 0.9989, 0.99, False),
        ("bfloat16", float("nan"), None, True),
    ],
)
def test_a_dtype_is_refused_below_its_bound(
    dtype: str, worst: float, min_cosine: float | None, is_refused: bool
) -> None:
    assert bool(why_refused(_precision(dtype, worst), min_cosine)) == is_refused


def test_a_refusal_names_both_numbers_and_the_remedy() -> None:
    reason = why_refused(_precision("int8", 0.9712), 0.98)

    assert all(part in reason for part in ("0.9712", "0.98", "dtype: float32", "min_cosine"))


def test_a_faster_dtype_is_offered_and_a_slower_or_a_refused_one_is_not() -> None:
    assert "bfloat16 would be 2.9 × as fast here" in describe_offer(_precision())
    assert not describe_offer(_precision(speedup=1.05))
    assert not describe_offer(_precision(worst=0.9))


def test_what_was_measured_is_there_after_a_restart_for_the_same_files_only(tmp_path: Path) -> None:
    PrecisionStore(tmp_path).put(SPEC, "r1", _precision(), "cpu")
    later = PrecisionStore(tmp_path)

    assert later.get(SPEC, "r1", "bfloat16", "cpu") == _precision()
    assert later.get(SPEC, "r2", "bfloat16", "cpu") is None
    assert later.get(SPEC, "r1", "int8", "cpu") is None
    assert len(later.offers(SPEC, "r1", "cpu")) == 1


def test_what_was_measured_on_the_operators_texts_decides_and_the_other_is_kept(tmp_path: Path) -> None:
    own = structs.replace(_precision(worst=0.9), texts="own")
    store = PrecisionStore(tmp_path)
    store.put(SPEC, "r1", own, "cpu")
    store.put(SPEC, "r1", _precision(), "cpu")

    assert store.get(SPEC, "r1", "bfloat16", "cpu") == own
    assert store.get_on("built-in", SPEC, "r1", "bfloat16", "cpu") == _precision()
    assert not store.offers(SPEC, "r1", "cpu")


def test_what_another_process_measured_is_found_and_not_overwritten(tmp_path: Path) -> None:
    server, command = PrecisionStore(tmp_path), PrecisionStore(tmp_path)
    server.put(SPEC, "r1", _precision(worst=0.9991), "cpu")
    command.put(SPEC, "r1", _precision(worst=0.9995), "cpu")

    server.refresh()
    found = server.get(SPEC, "r1", "bfloat16", "cpu")
    command.put(SPEC, "r1", _precision(worst=0.9997), "cpu")
    server.put(SPEC, "r1", _precision("int8"), "cpu")
    later = PrecisionStore(tmp_path).get(SPEC, "r1", "bfloat16", "cpu")

    assert found == _precision(worst=0.9995)
    assert later == _precision(worst=0.9997)


def test_what_was_measured_of_another_way_to_compute_a_dtype_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrecisionStore(tmp_path)
    store.put(SPEC, "r1", _precision("int8"), "cpu")
    before = store.get(SPEC, "r1", "int8", "cpu")
    monkeypatch.setitem(FORM_VERSIONS, "int8", FORM_VERSIONS["int8"] + 1)

    assert before == _precision("int8")
    assert store.get(SPEC, "r1", "int8", "cpu") is None
