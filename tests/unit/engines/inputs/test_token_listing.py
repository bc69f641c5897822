"""Tests that the listed tokens are those of the library, at their places in the text, and bounded."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from engines.errors import InvalidValue, PromptNotFound
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_listing import list_tokens, name_terms
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.spec import ModelSpec
from engines.types import MAX_LISTED_CHARS, Outputs, TokenizeCall, Tokens

VOCABULARY = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "find": 3, ":": 4, "a": 5, "cat": 6, "é": 7}
SPEC = ModelSpec(model_id="m", source="test")
PROMPTS = {"query": "find: "}


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = FastTokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    return Tokenizer(backend, TokenizerLimits(prefix=(1,), suffix=(2,), max_tokens=4, vocab_size=8))


def listed(tokenizer: Tokenizer, *texts: str, spec: ModelSpec = SPEC, **fields: Any) -> Tokens:
    return list_tokens(TokenizeCall(model_id="m", texts=texts, **fields), tokenizer, spec, PROMPTS)


def test_each_token_has_its_id_and_its_place_in_characters(tokenizer: Tokenizer) -> None:
    found = listed(tokenizer, "É  a Cat", "dog")

    assert found.array().tolist() == [
        [1, -1, -1], [7, 0, 1], [5, 3, 4], [6, 5, 8], [2, -1, -1], [1, -1, -1], [0, 0, 3], [2, -1, -1],
    ]  # fmt: skip
    assert found.token_counts == (5, 3)
    assert found.specials == {1: "[CLS]", 2: "[SEP]"}


def test_the_ids_are_those_that_the_model_reads_where_nothing_is_cut(tokenizer: Tokenizer) -> None:
    (read,) = tokenizer.encode(["a cat"], PromptTemplate(), "error").ids

    assert listed(tokenizer, "a cat").array()[:, 0].tolist() == read.tolist()


def test_texts_are_not_cut(tokenizer: Tokenizer) -> None:
    assert listed(tokenizer, "a " * 100).token_counts == (102,)


def test_special_tokens_may_be_left_out(tokenizer: Tokenizer) -> None:
    found = listed(tokenizer, "a", "", add_special_tokens=False)

    assert (found.array().tolist(), found.token_counts, found.specials) == ([[5, 0, 1]], (1, 0), {})


def test_a_prompt_is_part_of_the_text(tokenizer: Tokenizer) -> None:
    found = listed(tokenizer, "a", input_type="query", add_special_tokens=False)

    assert found.array().tolist() == [[3, 0, 4], [4, 4, 5], [5, 6, 7]]
    assert (found.before, found.behind) == ("find: ", "")
    with pytest.raises(PromptNotFound):
        listed(tokenizer, "a", input_type="poem")


def test_a_default_prompt_is_put_in_front_as_for_vectors(tokenizer: Tokenizer) -> None:
    spec = ModelSpec(model_id="m", source="test", default_prompt="query")

    assert listed(tokenizer, "a", spec=spec).before == "find: "


def test_more_characters_than_the_bound_are_refused_before_any_is_read(tokenizer: Tokenizer) -> None:
    half = "a" * (MAX_LISTED_CHARS // 2)

    assert listed(tokenizer, half, half).token_counts == (3, 3)
    with pytest.raises(InvalidValue, match=rf"{MAX_LISTED_CHARS + 1} characters in all, and the tokens of 262144"):
        listed(tokenizer, half, half + "a")
    with pytest.raises(InvalidValue):
        listed(tokenizer, *[half[:-2]] * 2, input_type="query")


def test_entries_of_sparse_outputs_are_named_as_the_vocabulary_writes_them(tokenizer: Tokenizer) -> None:
    """Those behind the tokenizer's last one, where a head is padded, have no name."""
    entries = np.array([5, 6, 4, 6, 100], "<i4")
    found = Outputs(
        body=entries.tobytes() + np.ones(5, "<f4").tobytes(), num_terms=(2, 3), token_counts=(4, 4), dimensions=0
    )

    assert name_terms(found, tokenizer).term_names == {4: ":", 5: "a", 6: "cat", 100: ""}
    assert name_terms(found, tokenizer).body == found.body
