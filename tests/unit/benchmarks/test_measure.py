"""Tests comparisons: interleaved rounds, ratios of medians, and ties."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lib.measure import interleave, percentile, quotient, speedup


def test_every_run_has_its_turn_in_every_round_and_another_one_begins_each_time() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({name: partial(run, name) for name in "abc"}, 3, sleep=lambda _: None)

    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_a_cold_contestant_runs_once_uncounted() -> None:
    order: list[str] = []

    def run() -> float:
        order.append("run")
        return 1.0

    assert interleave({"a": run}, 2, is_warm=False, sleep=lambda _: None) == {"a": [1.0, 1.0]}
    assert len(order) == 3


def test_between_two_samples_threads_may_settle() -> None:
    slept: list[float] = []
    interleave({"a": lambda: 1.0, "b": lambda: 1.0}, 2, settle_s=0.25, sleep=slept.append)

    assert slept == [0.25] * 4


def test_a_speedup_is_the_ratio_of_medians_with_its_worst_and_best_pair() -> None:
    ratio = speedup([1.0, 2.0, 1.0], [2.0, 3.0, 4.0])

    assert (ratio.value, ratio.low, ratio.high) == (3.0, 1.5, 4.0)
    assert str(ratio) == "3.00 (1.50–4.00)"
    assert not ratio.is_tie


def test_rounds_that_disagree_are_a_tie() -> None:
    assert speedup([1.0, 2.0], [1.1, 1.9]).is_tie


def test_of_rates_more_is_faster() -> None:
    assert quotient([30.0, 30.0], [10.0, 10.0]).value == 3.0


@given(samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=50), share=st.floats(0, 1))
def test_a_percentile_is_a_sample_that_enough_others_do_not_exceed(samples: list[float], share: float) -> None:
    found = percentile(samples, share)

    assert found in samples
    assert sum(sample <= found for sample in samples) >= share * len(samples)


def test_of_nothing_there_is_no_percentile() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)
