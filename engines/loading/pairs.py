"""Builds the tokenizer of pairs from a model's own tokenizer, and checks it against transformers' use of that.

There are three ways to read a pair: as the tokenizer pairs two texts (with its special tokens and types), by the chat
template of a folder that sentence-transformers' CrossEncoder saved, and by a published template
(`engines/loading/rerank_templates.py`).
"""

from collections.abc import Callable, Iterable, Sequence

from msgspec import structs

from engines.errors import UnsupportedModel
from engines.inputs.pairs import PairFrame, PairTokenizer, Wording
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import ID_MASK, TYPE_SHIFT
from engines.inputs.tokenizer import Tokenizer
from engines.loading.rerank_templates import TemplateText
from engines.loading.tokenizer import Reference

_QUERIES = ("what is a yard", "Why?", "两个人：", "a 1\n", "x ", '"q"')
_TEXTS = ("The yard keeps.", "1", " two\n\nlines ", "两个人。", "<b>", "émigré …")
_LONG = "one two three four five six seven eight nine ten "

# Texts that a template must pass on unchanged; they are looked for in what it renders.
_MARKS = (("qmarkq", "dmarkd", "smarks"), ("  q{}q\n", "\n d<d ", " s s "))

Render = Callable[[str, str, str | None], str]
"""(query, document, instruction) → the text that the model reads."""


def paired(reference: Reference, prompt: str, num_types: int) -> PairTokenizer:
    """Returns the tokenizer of pairs that are read as the tokenizer pairs two texts.

    Args:
        prompt: put in front of the query, or of a single text.
        num_types: token types that the model has; 0 where it reads none.

    Raises:
        UnsupportedModel: it does anything else than to put fixed tokens around the texts, or it cuts otherwise.
    """
    found = {_frame(reference, query, text, num_types) for query, text in zip(_QUERIES, _TEXTS, strict=True)}
    frame = found.pop()
    if found or frame is None:
        raise UnsupportedModel(
            "the post_processor of tokenizer.json does not put the same special tokens around every pair; save the "
            "tokenizer again with a template"
        )
    pairs = _made(reference, frame, Wording(query=PromptTemplate(prompt)))
    _check_truncation(reference, frame)
    return pairs


def _frame(reference: Reference, query: str, text: str, num_types: int) -> PairFrame | None:
    """Returns what the tokenizer puts around a pair; None where it changes the texts."""
    whole = reference.theirs(query, text, return_token_type_ids=True)
    ids, types, parts = whole["input_ids"], whole.get("token_type_ids"), whole.sequence_ids(0)
    reads_types = num_types and "token_type_ids" in reference.theirs.model_input_names
    types = types if reads_types and types else [0] * len(ids)
    if max(types) >= max(num_types, 1):
        raise UnsupportedModel(
            f"tokenizer.json gives pairs the token type {max(types)}, but the model has {num_types}; they do not "
            "belong together: fetch the model again"
        )
    first, second = ([at for at, part in enumerate(parts) if part == number] for number in (0, 1))
    bare = reference.tokenizer.encode_bare([query, text])
    if [[ids[at] for at in part] for part in (first, second)] != bare or not first or not second:
        return None
    spans = range(first[0]), range(first[-1] + 1, second[0]), range(second[-1] + 1, len(ids))
    prefix, middle, suffix = (tuple(ids[at] | (types[at] << TYPE_SHIFT) for at in span) for span in spans)
    kinds = [{types[at] for at in part} for part in (first, second)]
    if any(len(kind) > 1 for kind in kinds):
        return None
    return PairFrame(prefix=prefix, middle=middle, suffix=suffix, query_type=kinds[0].pop(), text_type=kinds[1].pop())


def _check_truncation(reference: Reference, frame: PairFrame) -> None:
    """Checks that pairs are cut as the tokenizer cuts them: either text, and both.

    Raises:
        UnsupportedModel: they are not.
    """
    limit = min(reference.tokenizer.max_tokens, frame.num_tokens + 15)
    small = reference._replace(tokenizer=reference.tokenizer.limited_to(limit))
    pairs = _made(small, frame, Wording())
    for query, text in ((_LONG, "one"), ("one", _LONG), (_LONG * 3, _LONG * 2), (_LONG * 2, _LONG * 3)):
        theirs = reference.theirs(query, text, truncation="longest_first", max_length=limit)["input_ids"]
        reference.backend.no_truncation()  # the call above enabled it in the shared backend
        if (pairs.encode([query], [text]).ids[0] & ID_MASK).tolist() != list(theirs):
            raise UnsupportedModel(
                "the tokenizer has a custom truncation of pairs, which cannot be reproduced; save it again with the "
                "standard truncation of the tokenizers library"
            )


def _made(reference: Reference, frame: PairFrame, wording: Wording, *, takes_single: bool = True) -> PairTokenizer:
    """Returns a tokenizer of pairs.

    Raises:
        UnsupportedModel: its longest input has no room for a token of either text.
    """
    limits = reference.tokenizer.limits
    if limits.max_tokens < frame.num_tokens + 2:
        raise UnsupportedModel(
            f"max_tokens is {limits.max_tokens}, but {frame.num_tokens} of these stand around every pair: raise "
            "`max_tokens` in the registry"
        )
    bare = structs.replace(limits, prefix=(), suffix=(), max_tokens=limits.max_tokens + 1, takes_empty=True)
    return PairTokenizer(
        reference.tokenizer, Tokenizer(reference.backend, bare), frame, wording, takes_single=takes_single
    )


def by_template(reference: Reference, template: TemplateText, instruction: str | None) -> PairTokenizer:
    """Returns the tokenizer of pairs that are read by a published template.

    Args:
        instruction: of requests without one; None is the template's own.

    Raises:
        UnsupportedModel: the tokenizer is that of another model.
    """
    _check_special_texts(reference, [*template.prefix, *template.suffix])
    bos = (reference.theirs.bos_token_id,) if template.starts_with_bos else ()
    if None in bos:
        raise UnsupportedModel("the template begins with the tokenizer's first token, but it has none; fetch it again")
    frame = PairFrame(
        prefix=(*bos, *_ids(reference, template.prefix)),
        middle=_ids(reference, template.middle),
        suffix=_ids(reference, template.suffix),
    )
    default = instruction or template.default_instruction
    before, behind = template.query
    if default is not None and template.instructed is not None:
        before = f"{template.instructed[0]}{default}{template.instructed[1]}"
    wording = _wording(reference, PromptTemplate(before, behind), template.text, template.instructed)
    pairs = _made(reference, frame, wording, takes_single=False)
    if not template.middle:
        _check_is_apart(reference, pairs, behind, template.text)
    return pairs


def _ids(reference: Reference, texts: Iterable[str]) -> tuple[int, ...]:
    """Returns the ids of texts that are tokenised each by itself."""
    return tuple(token for row in reference.tokenizer.encode_bare(list(texts)) for token in row)


def _wording(reference: Reference, query: PromptTemplate, text: str, instructed: tuple[str, str] | None) -> Wording:
    kept = []
    for column in zip(*reference.tokenizer.encode_bare([f"{text}{probe}" for probe in _TEXTS]), strict=False):
        if len(set(column)) > 1:
            break
        kept.append(column[0])
    return Wording(query=query, instructed=instructed, text=text, kept_ids=tuple(kept), cuts_text_only=True)


def _check_special_texts(reference: Reference, texts: Sequence[str]) -> None:
    """Checks that what looks like a special token of a template is one token.

    Raises:
        UnsupportedModel: it is not: the tokenizer belongs to another family.
    """
    marks = [part.split("|>")[0] for text in texts for part in text.split("<|")[1:]]
    for mark in sorted({f"<|{mark}|>" for mark in marks}):
        if len(reference.tokenizer.encode_bare([mark])[0]) != 1:
            raise UnsupportedModel(
                f"the template has the token {mark}, which this tokenizer does not know: it is the template of another "
                "family; correct `template` in the registry"
            )


def _check_is_apart(reference: Reference, pairs: PairTokenizer, behind: str, text: str) -> None:
    if not _is_apart(reference, [f"{query}{behind}" for query in _QUERIES], [f"{text}{probe}" for probe in _TEXTS]):
        raise UnsupportedModel(
            "the tokenizer joins query and document to common tokens, so that they cannot be read apart; it may belong "
            "to another model: fetch it again"
        )


def _is_apart(reference: Reference, heads: Sequence[str], tails: Sequence[str]) -> bool:
    """Whether every text of one list and every text of the other have the same ids together as apart."""
    encode = reference.tokenizer.encode_bare
    first, second = encode(heads), encode(tails)
    whole = iter(encode([head + tail for head in heads for tail in tails]))
    return all(next(whole) == one + other for one in first for other in second)


def by_chat_template(reference: Reference, render: Render, instruction: str | None) -> PairTokenizer:
    """Returns the tokenizer of pairs that are rendered by a chat template with a query and a document.

    Args:
        render: raises anything where the template does not know a role.
        instruction: of requests without one, from the folder or the registry; None for none.

    Raises:
        UnsupportedModel: the template is not the same text around both of every pair, in this order.
    """
    plain = _parts(render, with_instruction=False)
    instructed = _parts(render, with_instruction=True)
    if plain is None and instructed is None:
        raise UnsupportedModel(
            "the chat template does not render a query and then a document unchanged between fixed texts; fetch the "
            "model again, or set `template` in the registry if it is an original folder of a causal reranker"
        )
    if instruction is not None and instructed is None:
        raise UnsupportedModel("the chat template has no place for the default prompt; remove `default_prompt`")
    used = instructed if instruction is not None or plain is None else plain
    assert used is not None, "one of both is there"
    *around, between, end = used
    before = f"{around[0]}{instruction or ''}{around[1]}" if len(around) == 2 else around[0]
    behind, text = _split(reference, before, between, end)
    takes = (instructed[0], instructed[1]) if instructed is not None and instructed[2:] == used[-2:] else None
    wording = _wording(reference, PromptTemplate(before, behind), text, takes)
    return _made(reference, PairFrame(suffix=_ids(reference, [end])), wording, takes_single=False)


def _parts(render: Render, *, with_instruction: bool) -> tuple[str, ...] | None:
    """Returns the fixed texts around instruction, query and document; None where they are not fixed."""
    found: set[tuple[str, ...] | None] = set()
    for query, document, system in _MARKS:
        marks = [system, query, document] if with_instruction else [query, document]
        try:
            rest = render(query, document, system if with_instruction else None)
        except Exception:  # noqa: BLE001  # templates raise anything for a role that they do not know
            return None
        parts = []
        for mark in marks:
            part, found_mark, rest = rest.partition(mark)
            if not found_mark:
                return None
            parts.append(part)
        found.add((*parts, rest))
    return found.pop() if len(found) == 1 else None


def _split(reference: Reference, before: str, between: str, end: str) -> tuple[str, str]:
    """Returns the text between query and document in two parts, between which tokens never join.

    Raises:
        UnsupportedModel: there is no such place, or the end of the template joins the document.
    """
    places = [at + 1 for at, letter in enumerate(between) if letter == "\n"] + [len(between), 0]
    for at in places:
        behind, text = between[:at], between[at:]
        heads = [f"{before}{query}{behind}" for query in _QUERIES]
        tails = [f"{text}{probe}" for probe in _TEXTS]
        if _is_apart(reference, heads, tails) and _is_apart(reference, tails, [end]):
            return behind, text
    raise UnsupportedModel(
        "the tokenizer joins the texts of the chat template with query or document, so that they cannot be read apart; "
        "a template with a line break between both is supported"
    )
