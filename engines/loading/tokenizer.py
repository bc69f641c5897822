"""A model folder's tokenizer, its limits read from every file that may state them, and proof that we use it right."""

from collections.abc import Sequence
from typing import Any, cast

import structlog
from msgspec import Struct, structs
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

# Tokenizers write 1e30 for "no limit"; a model without any other limit reads this many.
_NO_LIMIT = 1_000_000
_DEFAULT_MAX_TOKENS = 8192

_PROBES = ("a", "the quick brown fox", "中文 text 2026")
_CONFIG = "tokenizer_config.json"


class Reader(Struct, frozen=True):
    """What the tokenizer must know of its model.

    `vocab_size`: rows of the embedding table. `position_limit`: how many positions there is room for, None where they
    are computed. `pooling`: modes of the chain behind; `counts_prompt`: whether it leaves the prompt out.
    """

    config: PretrainedConfig
    vocab_size: int
    position_limit: int | None
    pooling: tuple[PoolingMode, ...]
    counts_prompt: bool


def read_tokenizer(folder: Folder, spec: ModelSpec, reader: Reader) -> Tokenizer:
    """The tokenizer of a folder, checked against transformers' own use of it.

    Raises:
        BrokenFiles: the tokenizer's files are missing or corrupt.
        UnsupportedModel: it is another model's, does more than put fixed special tokens around a text, or lost those
            that it should put.
    """
    check_tokenizer_files(folder.weights)
    owner = _load(folder, spec)
    backend: FastTokenizer | None = getattr(owner, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{type(owner).__name__} has no fast form; add a tokenizer.json to the model folder")
    if folder.transformer.get("do_lower_case"):
        _lower_case(backend)
    check_vocabulary(backend, reader.vocab_size)
    prefix, suffix = _special_ids(owner, backend)
    highest = max(owner.added_tokens_decoder, default=0)
    rules = TokenizerLimits(
        prefix=prefix,
        suffix=suffix,
        max_tokens=max_tokens(folder, spec, reader, owner.model_max_length),
        vocab_size=reader.vocab_size,
        has_foreign_ids=max(backend.get_vocab_size(), highest + 1) > reader.vocab_size,
        truncate="start" if owner.truncation_side == "left" else "end",
        counts_prompt=reader.counts_prompt,
        max_word_chars=getattr(backend.model, "max_input_chars_per_word", 0),
    )
    backend.no_padding()
    _check_truncation(Tokenizer(backend, rules), owner, backend)
    rules = structs.replace(rules, suffix=_with_stated_end(folder, owner, suffix))
    _check_special_tokens(rules, owner, reader, is_confirmed=spec.pooling is not None)
    return Tokenizer(backend, rules)


def _load(folder: Folder, spec: ModelSpec) -> Any:
    options = {key: value for key, value in _options(folder).items() if key != "trust_remote_code"}
    try:
        return AutoTokenizer.from_pretrained(
            folder.weights, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
        )
    # A broken tokenizer.json surfaces as whatever its Rust parser raises, a bare Exception among them.
    except Exception as error:
        raise BrokenFiles(
            f"the tokenizer cannot be loaded ({type(error).__name__}); tokenizer.json is missing or corrupt: fetch the "
            "model again, or save its tokenizer in the fast form",
            file="tokenizer.json",
        ) from error


def _options(folder: Folder) -> dict[str, Any]:
    """What the folder asks for when its tokenizer is loaded, in sentence-transformers' newer or older spelling."""
    return dict(folder.transformer.get("processor_kwargs") or folder.transformer.get("tokenizer_args") or {})


def _lower_case(backend: FastTokenizer) -> None:
    """`do_lower_case` of sentence_bert_config.json: lower case comes first, as in sentence-transformers."""
    own = backend.normalizer
    # A Sequence gives its steps by index, which its type stubs do not say.
    steps: list[Any] = [] if own is None else list(cast(Any, own)) if isinstance(own, Normalizers) else [own]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Normalizers([Lowercase(), *steps])


def _special_ids(owner: Any, backend: FastTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and behind any text.

    Raises:
        UnsupportedModel: it does something else than that, or marks segments.
    """
    found: set[tuple[tuple[int, ...], tuple[int, ...]] | None] = set()
    for probe in _PROBES:
        whole = owner(probe, return_token_type_ids=True)
        found.add(_split_around(whole["input_ids"], backend.encode(probe, add_special_tokens=False).ids))
        if "token_type_ids" in owner.model_input_names and any(whole.get("token_type_ids") or ()):
            raise UnsupportedModel(
                "tokenizer.json gives single texts segment ids other than 0, which is not supported; save the "
                "tokenizer anew with segment 0"
            )
    around = found.pop()
    if found or around is None:
        raise UnsupportedModel(
            "the post_processor of tokenizer.json does not put the same special tokens around every text; save the "
            "tokenizer anew with a template"
        )
    return around


def _split_around(whole: Sequence[int], bare: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return None


def max_tokens(folder: Folder, spec: ModelSpec, reader: Reader, tokenizer_limit: int) -> int:
    """The longest input, special tokens included: the registry's word, else sentence-transformers' rule.

    That rule: what the folder says (`model_max_length` for its tokenizer, else `max_seq_length`); without it the
    smaller of the tokenizer's own `model_max_length` and the config's `max_position_embeddings`. Learned position
    tables bound all of it: sentence-transformers lets a RoBERTa run into the end of its table (it forgets the two
    positions that are never used), we do not.
    """
    limit = reader.position_limit
    stated = spec.max_tokens or _options(folder).get("model_max_length") or folder.transformer.get("max_seq_length")
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise BrokenFiles(
            f"the longest input is {stated!r} in sentence_bert_config.json, which is no whole number: fetch the model "
            "again, or set `max_tokens` in the registry",
            file="sentence_bert_config.json",
        )
    if stated is None:
        positions = getattr(reader.config, "max_position_embeddings", None) or _NO_LIMIT
        stated = min(tokenizer_limit, positions if positions > 0 else _NO_LIMIT)
    if stated >= _NO_LIMIT:
        stated = _DEFAULT_MAX_TOKENS
        log.info("model.max_tokens_unstated", model=spec.model_id, max_tokens=stated)
    if limit is not None and stated > limit:
        log.info("model.max_tokens_capped", model=spec.model_id, stated=stated, position_limit=limit)
        stated = limit
    return int(stated)


def _check_truncation(tokenizer: Tokenizer, owner: Any, backend: FastTokenizer) -> None:
    """Our cut must be the tokenizer's own, special tokens and all."""
    text = "one two three four five six seven eight nine ten " * (1 + min(tokenizer.max_tokens, 64) // 8)
    small = tokenizer.limited_to(min(tokenizer.max_tokens, 64))
    theirs = owner(text, truncation=True, max_length=small.max_tokens)["input_ids"]
    backend.no_truncation()  # the call above has left its own in the backend that both share
    if small.encode([text], PromptTemplate(), small.rules.truncate).ids[0].tolist() != list(theirs):
        raise UnsupportedModel(
            "the tokenizer truncates in a way of its own, which cannot be reproduced; save it anew with "
            "tokenizers' own truncation"
        )


def _with_stated_end(folder: Folder, owner: Any, suffix: tuple[int, ...]) -> tuple[int, ...]:
    """The suffix with the end token that tokenizer_config.json demands.

    e5-mistral and its kin say `add_eos_token: true` beside a tokenizer.json that adds none. transformers 4 followed
    the first, transformers 5 follows the second, and the vector of such a model is that of the end token.
    """
    end = owner.eos_token_id
    stated = (read_json(folder.weights, _CONFIG) or {}).get("add_eos_token")
    if stated is not True or end is None or end in suffix:
        return suffix
    log.info("model.end_token_restored", token=owner.eos_token, why=f"add_eos_token in {_CONFIG}")
    return (*suffix, end)


def _check_special_tokens(rules: TokenizerLimits, owner: Any, reader: Reader, *, is_confirmed: bool) -> None:
    """Refuse a tokenizer that lost its post-processor: without `[CLS]` or the end token every vector is wrong.

    Args:
        is_confirmed: the registry names the pooling itself, which says that a last token of the text's own is meant.

    Raises:
        UnsupportedModel: naming the file and the cure.
    """
    cure = "tokenizer.json has no post_processor that adds them: fetch the model again, or save its tokenizer anew"
    knows_both = owner.cls_token is not None and owner.sep_token is not None
    if knows_both and not (rules.prefix and rules.suffix):
        raise UnsupportedModel(f"the tokenizer knows {owner.cls_token} and {owner.sep_token} but adds neither; {cure}")
    if reader.config.model_type.endswith("t5") and not rules.suffix:
        raise UnsupportedModel(f"the tokenizer knows {owner.eos_token}, but appends none; {cure}")
    if "lasttoken" in reader.pooling and not rules.suffix and not is_confirmed:
        raise UnsupportedModel(
            f"the vector is the last token's, but the tokenizer appends no end token; {cure}, or confirm with "
            "`pooling: last_token` in the registry that the text's own last token is meant"
        )
