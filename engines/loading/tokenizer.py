"""Reads a model folder's tokenizer and its limits, and checks our use of it against transformers'."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import structlog
from msgspec import Struct, structs
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from transformers import AutoTokenizer, PretrainedConfig

from engines.errors import BrokenFiles, UnsupportedModel
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.inputs.vocabulary import check_tokenizer_files, check_vocabulary
from engines.loading.folder import Folder, read_json
from engines.spec import ModelSpec, PoolingMode

log = structlog.get_logger(__name__)

# Tokenizers write 1e30 for "no limit"; a model without any other limit gets the default.
_NO_LIMIT = 1_000_000
_DEFAULT_MAX_TOKENS = 8192

_PROBES = ("a", "the quick brown fox", "中文 text 2026")
_CONFIG = "tokenizer_config.json"


class ModelFacts(Struct, frozen=True):
    """The facts about a model that its tokenizer depends on.

    `vocab_size`: rows of the embedding table. `position_limit`: rows of the position table, None where positions are
    computed. `pooling`: modes of the embedding head; `counts_prompt`: whether pooling excludes the prompt.
    """

    config: PretrainedConfig
    vocab_size: int
    position_limit: int | None
    pooling: tuple[PoolingMode, ...]
    counts_prompt: bool


def read_tokenizer(folder: Folder, spec: ModelSpec, facts: ModelFacts) -> Tokenizer:
    """Reads the tokenizer of a folder; see `read_reference`."""
    return read_reference(folder, spec, facts).tokenizer


class Reference(NamedTuple):
    """A model's tokenizer: ours for single texts, transformers', and the fast one that both use."""

    tokenizer: Tokenizer
    theirs: Any
    backend: FastTokenizer


def read_reference(folder: Folder, spec: ModelSpec, facts: ModelFacts) -> Reference:
    """Reads the tokenizer of a folder and checks it against transformers' own use of it.

    Raises:
        BrokenFiles: the tokenizer's files are missing or corrupt.
        UnsupportedModel: it belongs to another model, does more than add fixed special tokens around a text, or lacks
            the special tokens that it should add.
    """
    check_tokenizer_files(folder.tokenizer)
    reference = load_theirs(folder, spec)
    if folder.late is not None:
        _register_markers(reference, folder.late.markers)
    backend: FastTokenizer | None = getattr(reference, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{type(reference).__name__} has no fast form: add a tokenizer.json to the model folder")
    if folder.transformer.get("do_lower_case"):
        _lower_case(backend)
    check_vocabulary(backend, facts.vocab_size)
    prefix, suffix = _special_ids(reference, backend)
    highest = max(reference.added_tokens_decoder, default=0)
    limits = TokenizerLimits(
        prefix=prefix,
        suffix=suffix,
        max_tokens=max_tokens(folder, spec, facts, reference.model_max_length),
        vocab_size=facts.vocab_size,
        has_foreign_ids=max(backend.get_vocab_size(), highest + 1) > facts.vocab_size,
        truncate="start" if reference.truncation_side == "left" else "end",
        counts_prompt=facts.counts_prompt,
        max_word_chars=getattr(backend.model, "max_input_chars_per_word", 0),
    )
    backend.no_padding()
    _check_truncation(Tokenizer(backend, limits), reference, backend)
    limits = structs.replace(limits, suffix=_restore_end_token(folder, reference, suffix))
    _check_special_tokens(limits, reference, facts, is_confirmed=spec.pooling is not None)
    return Reference(Tokenizer(backend, limits), reference, backend)


def load_theirs(folder: Folder, spec: ModelSpec) -> Any:
    """Loads transformers' own tokenizer of a folder.

    Raises:
        BrokenFiles: its files cannot be read.
    """
    options = {key: value for key, value in _options(folder).items() if key != "trust_remote_code"}
    try:
        return AutoTokenizer.from_pretrained(
            folder.tokenizer, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
        )
    # A broken tokenizer.json surfaces as whatever its Rust parser raises, a bare Exception among them.
    except Exception as error:
        raise BrokenFiles(
            f"the tokenizer cannot be loaded ({type(error).__name__}): tokenizer.json is missing or corrupt; fetch the "
            "model again, or save its tokenizer in the fast form",
            file="tokenizer.json",
        ) from error


def _register_markers(theirs: Any, markers: Sequence[str]) -> None:
    """Makes transformers' tokenizer read each marker as the one token that it knows it as.

    A marker such as `[unused0]` was put in front of ids in training. As text, it would fall into pieces.
    """
    known = set(theirs.get_vocab())
    missing = []
    for marker in markers:
        candidates = (marker, *marker.split(None, 1)[:1])
        token = next((candidate for candidate in candidates if candidate.strip() and candidate in known), None)
        if token is not None and theirs.tokenize(token) != [token]:
            missing.append(AddedToken(token, normalized=False, special=True))
    if missing:
        theirs.add_special_tokens({"additional_special_tokens": missing})


def _options(folder: Folder) -> dict[str, Any]:
    """Returns the folder's options for loading its tokenizer, from sentence-transformers' current or legacy key."""
    return dict(folder.transformer.get("processor_kwargs") or folder.transformer.get("tokenizer_args") or {})


def _lower_case(backend: FastTokenizer) -> None:
    """Applies `do_lower_case` of sentence_bert_config.json: lowercases first, as sentence-transformers does."""
    own = backend.normalizer
    # A Sequence yields its steps by index, which its type stubs do not declare.
    steps: list[Any] = [] if own is None else list(cast(Any, own)) if isinstance(own, Normalizers) else [own]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Normalizers([Lowercase(), *steps])


def _special_ids(reference: Any, backend: FastTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the special tokens that the post-processor adds before and after every text.

    Raises:
        UnsupportedModel: it does anything else, or sets segment ids.
    """
    found: set[tuple[tuple[int, ...], tuple[int, ...]] | None] = set()
    for probe in _PROBES:
        whole = reference(probe, return_token_type_ids=True)
        found.add(_split_around(whole["input_ids"], backend.encode(probe, add_special_tokens=False).ids))
        if "token_type_ids" in reference.model_input_names and any(whole.get("token_type_ids") or ()):
            raise UnsupportedModel(
                "tokenizer.json gives single texts segment ids other than 0, which is not supported; save the "
                "tokenizer again with segment 0"
            )
    around = found.pop()
    if found or around is None:
        raise UnsupportedModel(
            "the post_processor of tokenizer.json does not add the same special tokens around every text; save the "
            "tokenizer again with a template"
        )
    return around


def _split_around(whole: Sequence[int], bare: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return None


def max_tokens(folder: Folder, spec: ModelSpec, facts: ModelFacts, tokenizer_limit: int) -> int:
    """Returns the longest input with its special tokens: the registry's, else by sentence-transformers' rule.

    That rule: the folder's value (`model_max_length` for its tokenizer, else `max_seq_length`); without one, the
    smaller of the tokenizer's own `model_max_length` and the config's `max_position_embeddings`. The size of a learned
    position table caps all of them: sentence-transformers lets a RoBERTa exceed its table (it ignores the two
    positions that are never used), we do not.
    """
    limit = facts.position_limit
    stated = spec.max_tokens or _options(folder).get("model_max_length") or folder.transformer.get("max_seq_length")
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise BrokenFiles(
            f"the longest input is {stated!r} in sentence_bert_config.json, which is not an integer; fetch the model "
            "again, or set `max_tokens` in the registry",
            file="sentence_bert_config.json",
        )
    if stated is None:
        positions = getattr(facts.config, "max_position_embeddings", None) or _NO_LIMIT
        stated = min(tokenizer_limit, positions if positions > 0 else _NO_LIMIT)
    if stated >= _NO_LIMIT:
        stated = _DEFAULT_MAX_TOKENS
        log.info("model.max_tokens_unstated", model=spec.model_id, max_tokens=stated)
    if limit is not None and stated > limit:
        log.info("model.max_tokens_capped", model=spec.model_id, stated=stated, position_limit=limit)
        stated = limit
    return int(stated)


def _check_truncation(tokenizer: Tokenizer, reference: Any, backend: FastTokenizer) -> None:
    """Checks that our truncation gives the same ids as the tokenizer's own, special tokens included.

    Raises:
        UnsupportedModel: it does not.
    """
    text = "one two three four five six seven eight nine ten " * (1 + min(tokenizer.max_tokens, 64) // 8)
    small = tokenizer.limited_to(min(tokenizer.max_tokens, 64))
    theirs = reference(text, truncation=True, max_length=small.max_tokens)["input_ids"]
    backend.no_truncation()  # the call above enabled truncation in the shared backend
    if small.encode([text], PromptTemplate(), small.limits.truncate).ids[0].tolist() != list(theirs):
        raise UnsupportedModel(
            "the tokenizer has a custom truncation, which cannot be reproduced; save it again with the standard "
            "truncation of the tokenizers library"
        )


def _restore_end_token(folder: Folder, reference: Any, suffix: tuple[int, ...]) -> tuple[int, ...]:
    """Adds the end token to the suffix if tokenizer_config.json requires it.

    e5-mistral and similar models set `add_eos_token: true` beside a tokenizer.json that adds none. transformers 4
    followed the first, transformers 5 follows the second, and the vector of such a model is that of the end token.
    """
    end = reference.eos_token_id
    stated = (read_json(folder.tokenizer, _CONFIG) or {}).get("add_eos_token")
    if stated is not True or end is None or end in suffix:
        return suffix
    log.info("model.end_token_restored", token=reference.eos_token, why=f"add_eos_token in {_CONFIG}")
    return (*suffix, end)


def _check_special_tokens(limits: TokenizerLimits, reference: Any, facts: ModelFacts, *, is_confirmed: bool) -> None:
    """Rejects a tokenizer without its post-processor: without `[CLS]` or the end token every vector is wrong.

    Args:
        is_confirmed: the registry sets the pooling, which confirms that the text's own last token is meant.

    Raises:
        UnsupportedModel: naming the file and the remedy.
    """
    remedy = "tokenizer.json has no post_processor that adds them: fetch the model again, or save its tokenizer again"
    has_cls_and_sep = reference.cls_token is not None and reference.sep_token is not None
    if has_cls_and_sep and not (limits.prefix and limits.suffix):
        raise UnsupportedModel(
            f"the tokenizer defines {reference.cls_token} and {reference.sep_token} but does not add both; {remedy}"
        )
    if facts.config.model_type.endswith("t5") and not limits.suffix:
        raise UnsupportedModel(f"the tokenizer defines {reference.eos_token} but does not append it; {remedy}")
    if "lasttoken" in facts.pooling and not limits.suffix and not is_confirmed:
        raise UnsupportedModel(
            f"pooling takes the last token, but the tokenizer appends no end token; {remedy}, or confirm with "
            "`pooling: last_token` in the registry that the text's own last token is meant"
        )
