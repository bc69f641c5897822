"""Builds what gives vectors of tokens: the head of a model of late interaction or of bge-m3, and a tokenizer a side."""

from typing import Any, NamedTuple

import structlog
import torch
from msgspec import structs
from torch.nn.functional import linear, normalize

from engines.batching.outputs import OutputFacts
from engines.errors import BrokenFiles, UnsupportedModel
from engines.hub.file_selection import COLBERT_LINEAR
from engines.inputs.token_ids import UNSEEN
from engines.inputs.tokenizer import Tokenizer
from engines.layers.token_pooling import TokenPooling, has_clustering
from engines.loading.flag_heads import read_linear
from engines.loading.folder import Folder, ModuleRef, require_json
from engines.loading.late_interaction import LateInteraction, QueryExpansion
from engines.loading.module_settings import Json
from engines.loading.module_weights import read_module_weights
from engines.loading.modules import TOKEN_MODULES, build_token_chain
from engines.loading.tokenizer import Reference
from engines.models.head import TOKENS
from engines.models.observation import Observed
from engines.models.outputs import Side, TokenHead
from engines.models.token_head import BehindFirstHead, LateInteractionHead, ScoringMask
from engines.spec import ModelSpec

log = structlog.get_logger(__name__)

_ANY = 1 << 40
"""More positions than any text has."""

_SIDES: tuple[Side, ...] = ("query", "document")


class TokenFacts(NamedTuple):
    """What heads of tokens need to know of a transformer: the width of its hidden states, the positions that it has
    (None for any number), and what a pass showed."""

    width: int
    position_limit: int | None
    observed: Observed


def build_token_head(
    folder: Folder, spec: ModelSpec, reference: Reference, facts: TokenFacts, device: torch.device
) -> tuple[TokenHead | None, OutputFacts]:
    """Builds the head that gives vectors of tokens, and says how queries and documents differ; None without such.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    late = folder.late
    if late is None:
        behind_first = build_behind_first_head(folder, facts.width, device)
        return behind_first, OutputFacts(similarity=None if behind_first is None else "meanmaxsim")
    if spec.pooling is not None:
        raise UnsupportedModel("the model gives a vector for each token: remove `pooling` from the registry")
    _check_window(late, facts.observed)
    modules = read_token_modules(folder, late)
    sides = side_tokenizers(reference, late, facts.position_limit, spec.max_tokens)
    return build_late_head(folder, late, modules, facts.width, device, reference.theirs), OutputFacts(
        query_tokenizer=sides["query"],
        document_tokenizer=sides["document"],
        similarity=late.similarity,
        pooling=modules.pooling,
        pooled_on=modules.pooled_on,
    )


def _check_window(late: LateInteraction, observed: Observed) -> None:
    """Rejects fillers that would attend to no token at all, because all others are beyond a layer's window.

    Raises:
        UnsupportedModel
    """
    expansion = late.expansion
    narrowest = min(observed.windows, default=None)
    if expansion is None or expansion.is_seen or narrowest is None or narrowest // 2 > expansion.length:
        return
    raise UnsupportedModel(
        f"queries are filled up to {expansion.length} tokens that attend to the query, but some layers see only "
        f"{narrowest // 2} tokens to each side, which is not supported"
    )


class TokenModules(NamedTuple):
    """The modules behind the transformer of a model of late interaction, by what they do.

    `chain`: those that work on one token at a time. `pooled_on`: the sides on which `pooling` merges vectors.
    """

    chain: tuple[ModuleRef, ...]
    mask: Json | None
    pooling: TokenPooling | None = None
    pooled_on: tuple[Side, ...] = ()


def read_token_modules(folder: Folder, late: LateInteraction) -> TokenModules:
    """Reads the modules behind the transformer.

    Raises:
        BrokenFiles, UnsupportedModel: one of them is not supported, or where it stands.
    """
    chain: list[ModuleRef] = []
    mask: Json | None = {"skiplist_words": list(late.skip_words)} if late.is_implied else None
    pooling: TokenPooling | None = None
    pooled_on: tuple[Side, ...] = ()
    for ref in (folder.modules or ())[1:]:
        if pooling is not None:
            raise UnsupportedModel(
                f"modules.json has a {ref.kind} behind the pooling of tokens, which is not supported"
            )
        if ref.kind == "MultiVectorMask" and mask is None:
            mask = require_json(folder.root, ref.file("config.json"))
        elif ref.kind == "HierarchicalTokenPooling":
            pooling, pooled_on = _read_pooling(require_json(folder.root, ref.file("config.json")))
        elif ref.kind in TOKEN_MODULES:
            chain.append(ref)
        else:
            known = ", ".join((*TOKEN_MODULES, "MultiVectorMask (once)", "HierarchicalTokenPooling"))
            raise UnsupportedModel(
                f"modules.json names the module {ref.kind!r}, which is not supported in a model of late interaction; "
                f"supported: {known}"
            )
    if late.expansion is not None and mask is None:
        raise UnsupportedModel(
            "queries are filled up (query_expansion), but modules.json has no MultiVectorMask that has the fillers "
            "scored; add one, or remove query_expansion"
        )
    return TokenModules(tuple(chain), mask, pooling, pooled_on)


class StatedVectors(NamedTuple):
    """What a folder says of its vectors of tokens: their width, and how they are merged, by side."""

    width: int
    token_pooling: dict[Side, str]


def read_stated_vectors(folder: Folder, hidden_size: int) -> StatedVectors | None:
    """Reads what can be known of the vectors of tokens without the transformer; None where the folder gives none.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    late = folder.late
    if late is None:
        weights = read_linear(folder, COLBERT_LINEAR, lambda shape: len(shape) == 2 and shape[1] == hidden_size)
        return None if weights is None else StatedVectors(len(weights[0]), {})
    modules = read_token_modules(folder, late)
    width = hidden_size
    for ref in modules.chain:
        if ref.kind == "Dense":
            width = int(require_json(folder.root, ref.file("config.json"))["out_features"])
    if late.has_inline_projection:
        width = len(read_module_weights(folder.root, ModuleRef("Transformer", "")).take_raw("linear.weight"))
    facts = OutputFacts(pooling=modules.pooling, pooled_on=modules.pooled_on)
    return StatedVectors(width, facts.token_pooling)


def build_late_head(
    folder: Folder, late: LateInteraction, modules: TokenModules, hidden_size: int, device: torch.device, theirs: Any
) -> LateInteractionHead:
    """Builds the head of a model of late interaction.

    Args:
        theirs: transformers' tokenizer, which knows the words of the skip list.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    chain = build_token_chain(folder, hidden_size, device, modules.chain)
    if late.has_inline_projection:
        weights = read_module_weights(folder.root, ModuleRef("Transformer", ""))
        weight = weights.take_raw("linear.weight").to(device, torch.float32)
        if weight.ndim != 2 or weight.shape[1] != hidden_size:
            raise BrokenFiles(
                f"'linear.weight' in {weights.file} does not fit hidden states {hidden_size} wide; fetch the model "
                "again",
                file=weights.file,
            )
        chain.weights.append(weight)
        chain.add(lambda x: linear(x, weight), TOKENS, TOKENS, len(weight))
    if late.is_implied:
        chain.add(lambda x: normalize(x, dim=-1), TOKENS, TOKENS, chain.dimensions)
    return LateInteractionHead(chain, _scoring_mask(modules.mask or {}, theirs))


def build_behind_first_head(folder: Folder, hidden_size: int, device: torch.device) -> BehindFirstHead | None:
    """Builds bge-m3's head of vectors of tokens; None for a folder without its file.

    Raises:
        BrokenFiles: the file cannot be read, or holds something else.
    """
    weights = read_linear(folder, COLBERT_LINEAR, lambda shape: len(shape) == 2 and shape[1] == hidden_size)
    return None if weights is None else BehindFirstHead(*(weight.to(device) for weight in weights))


def side_tokenizers(
    reference: Reference, late: LateInteraction, position_limit: int | None, max_tokens: int | None
) -> dict[Side, Tokenizer]:
    """Returns a tokenizer for each side: queries filled up and both cut, as the folder says.

    Args:
        max_tokens: the registry's, of documents.

    Raises:
        UnsupportedModel: there is no token to fill up with, or not so many positions.
    """
    tokenizer = reference.tokenizer
    longest = position_limit or _ANY
    documents = tokenizer.limited_to(min(max_tokens or late.document_tokens or tokenizer.max_tokens, longest))
    expansion = late.expansion
    if expansion is None:
        queries = tokenizer.limited_to(min(late.query_tokens or tokenizer.max_tokens, longest))
        return {"query": queries, "document": documents}
    if expansion.length > longest:
        raise UnsupportedModel(
            f"queries are filled up to {expansion.length} tokens, but the model has {longest} positions; correct "
            "query_expansion in sentence_bert_config.json"
        )
    filler = _filler(expansion, reference.theirs)
    most = expansion.length if expansion.is_cut else (late.query_tokens or tokenizer.max_tokens)
    limits = structs.replace(
        tokenizer.limits,
        max_tokens=min(most, longest),
        fill_to=expansion.length,
        filler=filler if expansion.is_seen else filler | UNSEEN,
    )
    return {"query": Tokenizer(tokenizer.backend, limits), "document": documents}


def _filler(expansion: QueryExpansion, theirs: Any) -> int:
    if getattr(theirs, "padding_side", "right") == "left":
        raise UnsupportedModel(
            "the tokenizer pads at the start, where fillers of queries (query_expansion) would stand; such a model is "
            "not supported"
        )
    if expansion.token is None:
        token = theirs.mask_token_id if theirs.mask_token_id is not None else theirs.eos_token_id
    else:
        token = theirs.convert_tokens_to_ids(expansion.token)
        token = None if token == theirs.unk_token_id and expansion.token != theirs.unk_token else token
    if token is None:
        raise UnsupportedModel(
            f"queries are filled up with {expansion.token or 'a mask token'}, which the tokenizer does not have; "
            "correct `token` of query_expansion in sentence_bert_config.json"
        )
    return int(token)


def _scoring_mask(config: Json, theirs: Any) -> ScoringMask:
    words = _strings(config, "skiplist_words")
    unknown = theirs.unk_token_id
    skipped = {word: theirs.convert_tokens_to_ids(word) for word in words}
    missing = [word for word, token in skipped.items() if token is None or (token == unknown != theirs.unk_token)]
    missing = [word for word in missing if word != theirs.unk_token]
    if missing:
        log.warning("model.skip_words_unknown", words=missing, why="they are not single tokens of the vocabulary")
    tasks = config.get("skiplist_tasks")
    kept = config.get("keep_only_token_ids") or ()
    if not all(type(token) is int for token in kept):
        raise BrokenFiles("keep_only_token_ids of MultiVectorMask is not a list of ids; fetch the model again")
    return ScoringMask(
        skipped_ids=tuple(token for word, token in skipped.items() if word not in missing),
        skipped_on=_sides(tasks),
        kept_ids=tuple(kept),
    )


def _read_pooling(config: Json) -> tuple[TokenPooling | None, tuple[Side, ...]]:
    """Returns how `HierarchicalTokenPooling` merges vectors, and on which sides; None where it changes nothing."""
    factor, protected = config.get("pool_factor", 1.0), config.get("num_protected_tokens", 1)
    is_right = isinstance(factor, int | float) and factor >= 1 and type(protected) is int and protected >= 0
    if not is_right:
        raise BrokenFiles(
            f"HierarchicalTokenPooling has pool_factor {factor!r} and num_protected_tokens {protected!r}; fetch the "
            "model again"
        )
    pooling = TokenPooling(
        factor=factor, num_protected=protected, normalized=bool(config.get("normalize_embeddings", False))
    )
    if pooling.factor > 1 and not has_clustering():
        raise UnsupportedModel(
            "modules.json has a HierarchicalTokenPooling, which needs scipy: pip install 'embedyard[multi-vector]'"
        )
    if pooling.factor == 1 and not pooling.normalized:
        return None, ()
    return pooling, _sides(config.get("tasks"))


def _sides(tasks: Any) -> tuple[Side, ...]:
    """Returns the sides that a module names; sentence-transformers' default is documents only."""
    named = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    return tuple(side for side in _SIDES if side in named)


def _strings(config: Json, key: str) -> list[str]:
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise BrokenFiles(f"{key} of MultiVectorMask is not a list of texts; fetch the model again")
    return found
