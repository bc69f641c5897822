"""Reads what a folder's JSON files say of late interaction: how queries and documents become vectors of tokens.

Three kinds of folders: those of sentence-transformers' `MultiVectorEncoder`; those of PyLate up to version 3, whose
settings stand in `config_sentence_transformers.json`; and those of Stanford's ColBERT, with an `artifact.metadata` and
the projection among the weights of the transformer. Settings mean what sentence-transformers 6.2 takes them to mean
(`MultiVectorEncoder._parse_model_config`, `_maybe_load_stanford_metadata`). Pure: loads nothing.
"""

import string
from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from engines.errors import BrokenFiles, UnsupportedModel
from engines.spec import Similarity

Json = dict[str, Any]

MULTI_VECTOR_KINDS = ("MultiVectorEncoder", "ColBERT")
"""What folders of `MultiVectorEncoder` and of PyLate call themselves."""

LENGTH_KEYS = ("query_length", "document_length", "query_expansion")
"""Settings of the Transformer module that only these models have."""

ARTIFACT = "artifact.metadata"
"""The file in which Stanford's ColBERT keeps its settings."""

_ST_CONFIG = "config_sentence_transformers.json"

_PREFIXES = {"query": "query_prefix", "document": "document_prefix"}

_PYLATE_KEYS = frozenset({
    *LENGTH_KEYS, *_PREFIXES.values(), "do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens",
    "skiplist_words",
})  # fmt: skip

_CLASSIC_LENGTH = 32
"""Tokens of a query in ColBERT's paper, where the files state none."""

_MARKERS = ("[unused0]", "[unused1]")

_MAX_TOKENS = 1 << 20


class QueryExpansion(Struct, frozen=True, kw_only=True):
    """How queries are filled up to `length` tokens.

    `token`: None is the tokenizer's mask token. `is_seen`: whether other tokens attend to those. `is_cut`: whether
    longer queries are cut to `length`.
    """

    length: int
    token: str | None = None
    is_seen: bool = False
    is_cut: bool = True


class LateInteraction(Struct, frozen=True, kw_only=True):
    """What a folder says of its vectors of tokens.

    Args:
        query_tokens, document_tokens: the most that are read; None is as many as the model reads.
        markers: texts in front of queries and documents that the model knows as one token each.
        is_implied: whether a mask and a normalization follow that `modules.json` does not list.
        skip_words: of that mask.
        has_inline_projection: whether the projection is among the weights of the transformer.
    """

    similarity: Similarity = "maxsim"
    query_tokens: int | None = None
    document_tokens: int | None = None
    expansion: QueryExpansion | None = None
    markers: tuple[str, ...] = ()
    is_implied: bool = False
    skip_words: tuple[str, ...] = ()
    has_inline_projection: bool = False


def read_late_interaction(
    st_config: Json, transformer: Json, kinds: Collection[str] | None, architectures: Collection[str], artifact: Json
) -> LateInteraction | None:
    """Returns what the files say of late interaction; None for a folder without it.

    Args:
        st_config: of `config_sentence_transformers.json`.
        transformer: the Transformer module's own config.
        kinds: the modules; None without a `modules.json`.
        architectures: of `config.json`.
        artifact: of `artifact.metadata`.

    Raises:
        BrokenFiles, UnsupportedModel: a setting has no meaning, or is not supported.
    """
    kind = st_config.get("model_type")
    if kinds is None:
        if "HF_ColBERT" in architectures:
            return _read_stanford(artifact)
        if kind in MULTI_VECTOR_KINDS:
            raise UnsupportedModel(
                f"{_ST_CONFIG} declares a {kind}, but there is no modules.json with its projection: fetch the model "
                "again, or save it with sentence-transformers 6 or PyLate"
            )
        return None
    is_unnamed = kind in (None, "SentenceTransformer") and "Pooling" not in kinds
    is_old = is_unnamed and any(key in st_config for key in _PREFIXES.values())
    if kind not in MULTI_VECTOR_KINDS and not is_old:
        return None
    settings = {**_legacy_settings(st_config), **{key: transformer[key] for key in LENGTH_KEYS if key in transformer}}
    words = st_config.get("skiplist_words")
    return LateInteraction(
        similarity="meanmaxsim" if st_config.get("similarity_fn_name") == "meanmaxsim" else "maxsim",
        query_tokens=_length(settings.get("query_length"), "query_length"),
        document_tokens=_length(settings.get("document_length"), "document_length"),
        expansion=_expansion(settings.get("query_expansion"), settings.get("query_length")),
        markers=tuple(str(st_config.get(key) or "") for key in _PREFIXES.values() if key in st_config),
        is_implied=is_old or kind == "ColBERT",
        skip_words=tuple(string.punctuation if words is None else words),
    )


def legacy_prompts(st_config: Json, architectures: Collection[str], artifact: Json) -> Mapping[str, str]:
    """Returns the prompts of queries and documents that older folders keep elsewhere, in front of those they have.

    Raises:
        BrokenFiles: they are no texts.
    """
    given = st_config.get("prompts") or {}
    if "HF_ColBERT" in architectures and not any(given.get(side) for side in _PREFIXES):
        return dict(zip(_PREFIXES, (f"{marker} " for marker in _stanford_markers(artifact)), strict=True))
    found = {}
    for side, key in _PREFIXES.items():
        prefix = st_config.get(key) or ""
        if not isinstance(prefix, str):
            raise BrokenFiles(f"{key} in {_ST_CONFIG} is not a text; fetch the model again", file=_ST_CONFIG)
        if key in st_config:
            found[side] = prefix + (given.get(side) or "").removeprefix(prefix)
    return found


def _read_stanford(artifact: Json) -> LateInteraction:
    length = _length(artifact.get("query_maxlen") or _CLASSIC_LENGTH, "query_maxlen") or _CLASSIC_LENGTH
    return LateInteraction(
        document_tokens=_length(artifact.get("doc_maxlen"), "doc_maxlen"),
        expansion=QueryExpansion(length=length, is_seen=bool(artifact.get("attend_to_mask_tokens"))),
        markers=tuple(f"{marker} " for marker in _stanford_markers(artifact)),
        is_implied=True,
        skip_words=tuple(string.punctuation) if artifact.get("mask_punctuation", True) else (),
        has_inline_projection=True,
    )


def _stanford_markers(artifact: Json) -> tuple[str, str]:
    stated = (artifact.get(key) for key in ("query_token_id", "doc_token_id"))
    first, second = (str(own or usual) for own, usual in zip(stated, _MARKERS, strict=True))
    return first, second


def _legacy_settings(st_config: Json) -> Json:
    """Returns the lengths and the expansion that PyLate keeps in `config_sentence_transformers.json`.

    A folder that has any of its keys, but does not say whether queries are filled up, fills them up.
    """
    found: Json = {key: st_config[key] for key in LENGTH_KEYS[:2] if st_config.get(key) is not None}
    if "query_expansion" in st_config:
        return {**found, "query_expansion": st_config["query_expansion"]}
    if _PYLATE_KEYS.isdisjoint(st_config):
        return found
    if st_config.get("do_query_expansion") is False:
        return {**found, "query_expansion": None}
    attend = st_config.get("attend_to_expansion_tokens", st_config.get("attend_to_mask_tokens"))
    length = found.pop("query_length", None) or _CLASSIC_LENGTH
    return {**found, "query_expansion": {"strategy": "fixed", "attend": bool(attend), "length": length}}


def _expansion(stated: Any, query_length: Any) -> QueryExpansion | None:
    if stated is None:
        return None
    known = {"strategy", "attend", "token", "length"}
    if not isinstance(stated, dict) or not known.issuperset(stated) or stated.get("strategy") not in ("fixed", "min"):
        raise UnsupportedModel(
            f"the folder sets query_expansion to {stated!r}; the strategies 'fixed' and 'min' with attend, token and "
            "length are supported"
        )
    length = _length(stated.get("length"), "query_expansion.length")
    if length is None:
        raise BrokenFiles("query_expansion states no length; fetch the model again", file="sentence_bert_config.json")
    if query_length is not None and query_length < length:
        raise UnsupportedModel(
            f"query_length is {query_length}, less than the {length} of query_expansion, which sentence-transformers "
            "refuses too; correct one of them"
        )
    token = stated.get("token")
    return QueryExpansion(
        length=length,
        token=token if isinstance(token, str) else None,
        is_seen=stated.get("attend", False) is True,
        is_cut=stated["strategy"] == "fixed",
    )


def _length(stated: Any, key: str) -> int | None:
    if stated is None:
        return None
    if type(stated) is not int or not 0 < stated <= _MAX_TOKENS:
        raise BrokenFiles(
            f"{key} is {stated!r}, which is not a number of tokens; fetch the model again",
            file="sentence_bert_config.json",
        )
    return stated
