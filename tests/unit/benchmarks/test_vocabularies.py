"""The tokenizers of the random models: trained once, and a copy for each caller."""

from benchmarks.lib import vocabularies


def test_what_a_caller_sets_is_not_seen_by_the_next() -> None:
    vocabularies.gemma()(["one two three"], truncation=True, max_length=4)

    assert vocabularies.gemma().backend_tokenizer.truncation is None
