"""Totals of a load while it runs, and its timeline."""

import pytest

from router.loadgen import Sample, percentile
from router.loadgen.results import PhaseStats, latency

BODY = b'{"object":"list","data":[{"embedding":"AAAA"}],"usage":{"prompt_tokens":5,"total_tokens":5}}'


def sample(due_s: float, latency_s: float, status: int = 200) -> Sample:
    return Sample(due_s, latency_s, 2, status, 0.001)


@pytest.fixture
def stats() -> PhaseStats:
    """Three responses in the first second, a failure in the second, a response in the fourth."""
    stats = PhaseStats(100.0)
    for due_s, latency_s in ((100.0, 0.1), (100.2, 0.2), (100.3, 0.4)):
        stats.add(sample(due_s, latency_s), BODY)
    stats.add(sample(101.0, 0.5, 429), b"{}")
    stats.add(sample(100.9, 2.5), BODY)
    return stats


def test_the_figures_are_those_of_all_that_is_done(stats: PhaseStats) -> None:
    figures = stats.figures(104.0)

    assert (figures.seconds, figures.requests, figures.failed) == (4.0, 5, 1)
    assert (figures.texts_per_s, figures.tokens_per_s) == (2.0, 5.0)
    assert figures.latency_s is not None
    assert (figures.latency_s.p50, figures.latency_s.max) == (0.2, 2.5)
    assert figures.texts_each_s == (6, 0, 0, 2)


def test_a_second_is_reported_by_the_responses_in_it(stats: PhaseStats) -> None:
    moments = stats.timeline()

    assert [(m.at_s, m.requests, m.failed, m.texts, m.tokens) for m in moments] == [
        (0, 3, 0, 6, 15),
        (1, 1, 1, 0, 0),
        (2, 0, 0, 0, 0),
        (3, 1, 0, 2, 5),
    ]
    assert [m.latency_s is None for m in moments] == [False, True, True, False]


@pytest.mark.parametrize("body", [b'{"data":[]}', b"not JSON", b""])
def test_a_server_that_counts_no_tokens_has_none(body: bytes) -> None:
    stats = PhaseStats(0.0)
    stats.add(sample(0.0, 0.1), body)

    assert stats.figures(1.0).tokens_per_s is None
    assert stats.figures(1.0).requests == 1


def test_before_the_first_answer_there_are_no_percentiles() -> None:
    assert PhaseStats(0.0).figures(1.0).latency_s is None
    assert PhaseStats(0.0).timeline() == []


def test_percentiles_are_the_ones_of_the_benchmarks() -> None:
    values = [((7 * number) % 101) / 100 for number in range(101)]
    found = latency(values)

    assert found is not None
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.95, found.p95), (0.99, found.p99), (1.0, found.max)):
        assert value == percentile(values, share)
