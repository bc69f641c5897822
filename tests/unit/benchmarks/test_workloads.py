"""Tests the texts of benchmarks: seeded, and of the requested length."""

import pytest

from benchmarks.lib import workloads
from benchmarks.lib.workloads import LENGTHS, NAMES, make


def words(text: str) -> int:
    """Count tokens for tests: one per word or Chinese character, and two special ones."""
    return 2 + (len(text.split()) if " " in text or text.isascii() else len(text))


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_as_long_as_the_workload_says(name: str) -> None:
    workload = make(name, 12, words)

    assert len(workload.texts) == 12
    assert list(workload.tokens) == [words(text) for text in workload.texts]
    assert all(LENGTHS[name].low <= tokens <= LENGTHS[name].high for tokens in workload.tokens)


def test_the_same_seed_gives_the_same_texts_and_another_one_others() -> None:
    assert make("mixed", 5, words).fingerprint == make("mixed", 5, words).fingerprint
    assert make("mixed", 5, words).fingerprint != make("mixed", 5, words, seed=8).fingerprint


def test_calls_hold_every_text_once_in_order() -> None:
    workload = make("short", 7, words)

    assert [len(call) for call in workload.calls(3)] == [3, 3, 1]
    assert sum(workload.calls(3), ()) == workload.texts
    assert workload.num_tokens == sum(workload.tokens)


def test_a_tokenizer_that_never_gives_such_a_length_is_said() -> None:
    with pytest.raises(ValueError, match="gave no text of 8 to"):
        make("short", 1, lambda text: 1000)


def test_the_words_are_those_of_the_language_reference() -> None:
    assert len(workloads.english()) > 10_000
