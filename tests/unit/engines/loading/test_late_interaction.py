"""What JSON files say of late interaction is read as sentence-transformers reads it."""

import string
from typing import Any

import pytest

from engines.errors import BrokenFiles, UnsupportedModel
from engines.loading.late_interaction import (
    LateInteraction,
    QueryExpansion,
    legacy_prompts,
    read_late_interaction,
)

OWN = ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
OLD = ["Transformer", "Dense"]
NATIVE = {"model_type": "MultiVectorEncoder"}


def read(st_config: dict[str, Any], kinds: list[str] | None = None, **more: Any) -> LateInteraction | None:
    options = {"transformer": {}, "architectures": (), "artifact": {}, **more}
    return read_late_interaction(
        st_config, options["transformer"], kinds, options["architectures"], options["artifact"]
    )


def test_a_dense_model_has_none() -> None:
    assert read({}, ["Transformer", "Pooling"]) is None
    assert read({"model_type": "SentenceTransformer", "query_prefix": "q: "}, ["Transformer", "Pooling"]) is None
    assert read({}, None) is None


def test_a_folder_of_sentence_transformers_keeps_its_lengths_with_the_transformer() -> None:
    stated = {
        "query_length": 40,
        "document_length": 300,
        "query_expansion": {"strategy": "min", "attend": True, "length": 32, "token": "[X]"},
    }

    found = read({**NATIVE, "similarity_fn_name": "meanmaxsim"}, OWN, transformer=stated)

    assert found is not None
    assert (found.similarity, found.query_tokens, found.document_tokens) == ("meanmaxsim", 40, 300)
    assert found.expansion == QueryExpansion(length=32, token="[X]", is_seen=True, is_cut=False)
    assert not found.is_implied


@pytest.mark.parametrize("kind", ["ColBERT", None])
def test_a_folder_of_pylate_keeps_them_at_the_top(kind: str | None) -> None:
    st_config = {"model_type": kind, "query_prefix": "[Q] ", "document_prefix": "[D] ", "document_length": 180}

    found = read({key: value for key, value in st_config.items() if value is not None}, OLD)

    assert found is not None
    assert found.is_implied
    assert found.skip_words == tuple(string.punctuation)
    assert found.markers == ("[Q] ", "[D] ")
    assert (found.document_tokens, found.expansion) == (180, QueryExpansion(length=32))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"do_query_expansion": False, "query_length": 20}, (20, None)),
        ({"query_expansion": None}, (None, None)),
        ({"query_length": 48, "attend_to_expansion_tokens": True}, (None, QueryExpansion(length=48, is_seen=True))),
        ({"attend_to_mask_tokens": True}, (None, QueryExpansion(length=32, is_seen=True))),
    ],
)
def test_pylate_fills_queries_up_unless_it_says_otherwise(changes: dict[str, Any], wanted: tuple[Any, Any]) -> None:
    found = read({"model_type": "ColBERT", "query_prefix": "[Q] ", "skiplist_words": [","], **changes}, OLD)

    assert found is not None
    assert (found.query_tokens, found.expansion) == wanted
    assert found.skip_words == (",",)


def test_a_folder_of_stanford_keeps_them_in_its_artifact() -> None:
    artifact = {"query_maxlen": 20, "doc_maxlen": 90, "attend_to_mask_tokens": True, "mask_punctuation": False}

    found = read({}, None, architectures=["HF_ColBERT"], artifact=artifact)

    assert found is not None
    assert (found.document_tokens, found.expansion) == (90, QueryExpansion(length=20, is_seen=True))
    assert (found.skip_words, found.has_inline_projection, found.is_implied) == ((), True, True)


def test_prompts_of_older_folders_are_their_markers() -> None:
    pylate = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "prompts": {"query": "[Q] find: ", "document": None}}

    assert legacy_prompts(pylate, (), {}) == {"query": "[Q] find: ", "document": "[D] "}
    assert legacy_prompts({}, ["HF_ColBERT"], {}) == {"query": "[unused0] ", "document": "[unused1] "}
    assert legacy_prompts({}, ["HF_ColBERT"], {"query_token_id": "[Q]"})["query"] == "[Q] "
    assert legacy_prompts({"prompts": {"query": "q: "}}, (), {}) == {}


@pytest.mark.parametrize(
    ("stated", "error", "words"),
    [
        ({"query_expansion": {"strategy": "most"}}, UnsupportedModel, "'fixed' and 'min'"),
        ({"query_expansion": {"strategy": "fixed", "new": 1}}, UnsupportedModel, "'fixed' and 'min'"),
        ({"query_expansion": {"strategy": "fixed"}}, BrokenFiles, "states no length"),
        ({"query_expansion": {"strategy": "fixed", "length": 0}}, BrokenFiles, "not a number of tokens"),
        (
            {"query_expansion": {"strategy": "min", "length": 32}, "query_length": 8},
            UnsupportedModel,
            "less than the 32",
        ),
        ({"document_length": "long"}, BrokenFiles, "document_length is 'long'"),
    ],
)
def test_settings_without_a_meaning_are_refused(stated: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read(NATIVE, OWN, transformer=stated)


def test_a_folder_that_lacks_its_modules_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"there is no modules\.json"):
        read(NATIVE, None)
