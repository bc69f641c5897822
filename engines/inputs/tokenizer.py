"""Converts texts to token ids exactly as the model's own tokenizer does. Runs off the event loop; keeps no state.

Truncates ids, between the special tokens that the post-processor adds, so that one tokenizer object serves every kind
of truncation at once; `engines/loading/tokenizer.py` checks at load time that the result is the tokenizer's own.

A request is read in steps (`TextReading`, `IdReading`), each of which takes a bounded time and may return more steps.
`Tokenizer.encode` runs them at once; `TokenizerThreads` interleaves those of a large request with other requests'.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from unicodedata import combining

import numpy as np
from msgspec import Struct, structs

from engines.errors import InvalidValue, UnsupportedModel
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import (
    NO_IDS,
    PIECE_CHARS,
    IdChecks,
    IdReading,
    Ids,
    Step,
    TokenizedRequest,
    TokenizerBackend,
    pieces,
    run_steps,
)  # fmt: skip
from engines.spec import Truncate

__all__ = ["IdReading", "Ids", "TextReading", "TokenizedRequest", "Tokenizer", "TokenizerBackend", "TokenizerLimits"]

# Tokenisers split between two words, and before a punctuation mark after a Chinese or Japanese word.
_BOUNDARY = re.compile(r"(?<=[^\W_]) (?=[^\W_])|(?<=[぀-ヿ一-鿿])(?=[、。，！？；：])")

_CHARS_PER_TOKEN = 8
"""A text longer than twice this for each kept token is tokenised only in part at first."""
_CLIP_GROWTH = 8
"""Factor by which each next part is longer."""

_MIN_CHARS, _MAX_CHARS = 1 << 18, 1 << 21


def first_cap(num_tokens: int) -> int:
    """Returns the characters of the first clips for `num_tokens` tokens to read."""
    return min(num_tokens * _CHARS_PER_TOKEN, _MAX_CHARS // 2)


def max_chars(num_tokens: int) -> int:
    """Returns the most characters of one text that are tokenised at once, at least the first clips of a text.

    Tokenising takes up to a second for each million characters, and 270 bytes for each character.
    """
    return max(2 * first_cap(num_tokens), _MIN_CHARS)


def next_cap(cap: int, limit_chars: int) -> int | None:
    """Returns the characters of the next longer clips; None if `limit_chars` allows none."""
    return min(cap * _CLIP_GROWTH, limit_chars // 2) if 2 * cap < limit_chars else None


def clips(text: str, cap: int, *, keep_end: bool) -> tuple[str, str] | None:
    """Returns two clips of `cap` to `2 × cap` characters from the kept side of a text; None if it needs the whole text.

    A text without boundaries can be clipped anywhere on the right, since tokenisers work from left to right.
    """
    if len(text) <= 2 * cap:
        return None
    low, high = (len(text) - 2 * cap, len(text) - cap) if keep_end else (cap, 2 * cap)
    cuts = [match.start() for match in _BOUNDARY.finditer(text, low, high)]
    if len(cuts) >= 2:
        return (text[cuts[-1] :], text[cuts[0] :]) if keep_end else (text[: cuts[0]], text[: cuts[-1]])
    if keep_end:
        return None
    window = range(cap, min(2 * cap, cap + 64))  # beyond, a cut before `cap` does
    ends = [at for at in window if not (combining(text[at]) or text[at - 1].isspace())]
    if len(ends) >= 2:
        return text[: ends[0]], text[: ends[1]]
    end = _cut_position(text, cap + 1)
    return text[: _cut_position(text, end - 1)], text[:end]


def _cut_position(text: str, position: int) -> int:
    """Returns the last position up to `position` where a cut changes nothing far before it.

    Two things after a cut can affect a whole run of characters before it: Unicode sorts combining marks by their class,
    and a special token may absorb the white space before it (RoBERTa's `<mask>`).
    """
    while position > 0 and combining(text[position]):
        position -= 1
    return len(text[: max(position, 0)].rstrip())


_MIN_MARGIN_TOKENS = 128

_ALONE_CHARS = 1024
"""A single text up to this length is encoded by itself: 25 µs less than as a batch of one. Only a batch leaves out the
places of tokens in the text, which takes more for longer ones."""


class TokenizerLimits(Struct, frozen=True, kw_only=True):
    """A model's limits on token ids.

    `prefix`, `suffix`: ids that the post-processor adds around a text. `max_tokens`: the longest input, special tokens
    included. `vocab_size`: ids from here on have no embedding; the tokenizer may yield such ids if `has_foreign_ids`.
    `truncate`: the side that the tokenizer's own files truncate. `takes_empty`: whether a text may have no tokens.
    `counts_prompt`: whether pooling needs the number of prompt tokens. `max_word_chars`: a longer word becomes one
    unknown token (WordPiece). `fill_to`, `filler`: texts of fewer tokens are filled up with that id.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    max_tokens: int
    vocab_size: int
    has_foreign_ids: bool = False
    truncate: Truncate = "end"
    takes_empty: bool = False
    counts_prompt: bool = False
    max_word_chars: int = 0
    fill_to: int = 0
    filler: int = 0

    @property
    def margin_tokens(self) -> int:
        """The tokens that a clip must have beyond the kept ones.

        More than its last word can have, because the whole word may be longer than the tokenizer's word limit.
        """
        return max(_MIN_MARGIN_TOKENS, self.max_word_chars + 1)

    @property
    def max_text_tokens(self) -> int:
        """The number of tokens that fit between the special tokens."""
        return self.max_tokens - len(self.prefix) - len(self.suffix)


class Tokenizer:
    """A model's tokenizer and its limits.

    Args:
        backend: the fast tokenizer, without truncation and padding.
        limits: the model's limits.
    """

    def __init__(self, backend: TokenizerBackend, limits: TokenizerLimits) -> None:
        if limits.max_text_tokens < 1:
            special = len(limits.prefix) + len(limits.suffix)
            raise UnsupportedModel(
                f"max_tokens is {limits.max_tokens}, but {special} of these are special tokens: raise `max_tokens` in "
                "the registry"
            )
        self.limits = limits
        self.max_text_tokens = limits.max_text_tokens
        self.first_cap = first_cap(limits.max_text_tokens + 2 * limits.margin_tokens)
        self.max_chars = max_chars(limits.max_text_tokens + 2 * limits.margin_tokens)
        self.backend = backend
        self._ids = IdChecks(
            limits.prefix, limits.suffix, limits.max_tokens, limits.vocab_size, takes_empty=limits.takes_empty
        )

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self.limits.max_tokens

    def limited_to(self, max_tokens: int) -> "Tokenizer":
        """Returns the same tokenizer with another `max_tokens`."""
        return Tokenizer(self.backend, structs.replace(self.limits, max_tokens=max_tokens))

    def encode(self, texts: Sequence[str], template: PromptTemplate, truncate: Truncate) -> TokenizedRequest:
        """Encodes texts.

        Raises:
            ContextLengthExceeded: a text exceeds the model's limit, and `truncate` is `error`.
            InvalidValue: a text has no tokens, or the longest allowed part of it does not determine its kept tokens.
        """
        return self.read(texts, template, truncate).run_all()

    def take_ids(
        self, rows: Sequence[Sequence[int]], truncate: Truncate, *, must_be_framed: bool = False
    ) -> TokenizedRequest:
        """Checks token ids from a client; truncates long rows but keeps the special tokens at their ends.

        Raises:
            InvalidTokenId: an id is not in this model's vocabulary, or a row that `must_be_framed` lacks the model's
                special tokens at its ends.
            ContextLengthExceeded, InvalidValue: as `encode`.
        """
        return self.read_ids(rows, truncate, must_be_framed=must_be_framed).run_all()

    def read(self, texts: Sequence[str], template: PromptTemplate, truncate: Truncate) -> "TextReading":
        """Returns the work of `encode` in steps."""
        return TextReading(self, texts, template, truncate)

    def read_ids(self, rows: Sequence[Sequence[int]], truncate: Truncate, *, must_be_framed: bool) -> "IdReading":
        """Returns the work of `take_ids` in steps."""
        return IdReading(self._ids, rows, truncate, must_be_framed=must_be_framed)

    # Used by readings.

    def encode_clips(self, clipped: Sequence[tuple[str, ...]], *, keep_end: bool) -> list[list[int] | None]:
        """Encodes whole texts (tuples of one) and pairs of clips, bare; returns None for each pair that disagrees."""
        flat = list(chain.from_iterable(clipped))
        rows = chain.from_iterable(self.encode_bare(piece) for piece in pieces(flat, len))
        found: list[list[int] | None] = []
        for texts in clipped:
            row = next(rows)
            agree = len(texts) == 1 or self._agree(row, next(rows), keep_end=keep_end)
            found.append(row if agree else None)
        return found

    def add_special_tokens(self, index: int, row: list[int], truncate: Truncate) -> Ids:
        """Truncates a text's ids and adds the special tokens.

        Raises:
            ContextLengthExceeded, InvalidValue, InvalidTokenId: naming the input by its `index`.
        """
        if truncate == "error" and len(row) > self.max_text_tokens:
            raise self._ids.too_long_error(index, len(row) + len(self.limits.prefix) + len(self.limits.suffix))
        limits = self.limits
        if len(row) > self.max_text_tokens:
            row = row[-self.max_text_tokens :] if truncate == "start" else row[: self.max_text_tokens]
        ids = np.array([*limits.prefix, *row, *limits.suffix], np.int64)
        if not len(ids):
            self._ids.check_not_empty(index, ids)
        if limits.has_foreign_ids:
            self._ids.check(index, ids)
        missing = limits.fill_to - len(ids)
        return np.append(ids, np.full(missing, limits.filler)) if missing > 0 else ids

    def count_prompt(self, prompt: str, truncate: Truncate) -> int:
        """Counts the tokens of a prompt as sentence-transformers does: truncated like a text, without a last special
        token."""
        if not self.limits.counts_prompt:
            return 0
        lenient = Tokenizer(self.backend, structs.replace(self.limits, takes_empty=True, has_foreign_ids=False))
        encoded = lenient.encode([prompt], PromptTemplate(), "end" if truncate == "error" else truncate)
        return len(encoded.ids[0]) - min(len(self.limits.suffix), 1)

    def undecidable_error(self, index: int, num_chars: int, *, keep_end: bool) -> InvalidValue:
        """Returns the error for a long text whose longest allowed part does not determine the tokens to keep."""
        return InvalidValue(
            f"input[{index}] has {num_chars} characters, and its {'last' if keep_end else 'first'} {self.max_chars} do "
            f"not determine which {self.max_tokens} tokens to keep (no word boundaries, or too few tokens): shorten it",
            param="input",
        )

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts without special tokens, in one call.

        Raises:
            InvalidValue: a text is not valid Unicode, or the tokenizer cannot encode it.
        """
        try:
            if len(texts) == 1 and len(texts[0]) <= _ALONE_CHARS:
                return [self.backend.encode(texts[0], add_special_tokens=False).ids]
            return [row.ids for row in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except UnicodeEncodeError as error:
            raise InvalidValue(
                "input holds a lone surrogate, which is not valid Unicode: remove it", param="input"
            ) from error
        # The tokenizers library raises bare exceptions, and PyO3's PanicException is not even an `Exception`.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InvalidValue(
                f"the model's tokenizer cannot encode this input ({type(error).__name__}): remove unusual characters",
                param="input",
            ) from error

    def _agree(self, first: list[int], second: list[int], *, keep_end: bool) -> bool:
        """Returns whether two clips prove that a text is too long and give the same tokens to keep."""
        max_text_tokens = self.max_text_tokens
        if min(len(first), len(second)) < max_text_tokens + self.limits.margin_tokens:
            return False
        kept = slice(-max_text_tokens, None) if keep_end else slice(max_text_tokens)
        return first[kept] == second[kept]


class TextReading:
    """Tokenises the texts of one request: equal texts once, long texts in part.

    Its steps may run on any thread and in parallel: each writes the rows of its own inputs.

    Attributes:
        num_chars: characters of all texts with their prompts, an upper bound of what is tokenised.
        rows: the kept ids of each input, special tokens included.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], template: PromptTemplate, truncate: Truncate
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._template = template
        self._template_chars = template.num_chars
        self._truncate = truncate
        self._keep_end = truncate == "start"
        self._is_long = [False] * len(texts)
        self._prompt_tokens = 0
        self._max_unclipped_chars = min(2 * tokenizer.first_cap, PIECE_CHARS)
        self.num_chars = self._template_chars * len(texts) + sum(map(len, texts))
        self.rows: list[Ids] = [NO_IDS] * len(texts)

    def plan_steps(self) -> list[Step]:
        """Groups equal texts and returns one step for each piece; is itself the first step."""
        self._count_prompt()
        return self._steps(range(len(self._texts)), self._tokenizer.first_cap)

    def run_all(self) -> TokenizedRequest:
        """Runs all steps at once and returns the result, for a request that does not take turns."""
        if self.num_chars > self._max_unclipped_chars:
            run_steps(self.plan_steps)
            return self.result()
        self._count_prompt()
        tokenizer, truncate, max_text_tokens = self._tokenizer, self._truncate, self._tokenizer.max_text_tokens
        texts = [self._template.apply(text) for text in self._texts] if self._template_chars else self._texts
        rows = tokenizer.encode_bare(texts)
        self.rows = [tokenizer.add_special_tokens(index, row, truncate) for index, row in enumerate(rows)]
        return self._build_result(tuple([index for index, row in enumerate(rows) if len(row) > max_text_tokens]))

    def result(self) -> TokenizedRequest:
        """Returns all ids; call it when all steps have run.

        Raises:
            InvalidValue: truncation leaves only the prompt of a text, which pooling excludes.
        """
        return self._build_result(tuple(index for index, is_long in enumerate(self._is_long) if is_long))

    def _steps(self, indexes: Sequence[int], cap: int) -> list[Step]:
        """Returns one step for each piece of these texts; a step tokenises up to `2 × cap` characters of each text."""
        equal: dict[str, list[int]] = {}
        for index in indexes:
            text = self._texts[index]
            is_short = self._template_chars + len(text) <= 2 * cap
            equal.setdefault(text if is_short else self._kept_side(text, 2 * cap + 1), []).append(index)
        groups = list(equal.values())
        return [partial(self._read, piece, cap) for piece in pieces(groups, partial(self._cost, cap=cap))]

    def _cost(self, group: Sequence[int], cap: int) -> int:
        num_chars = self._template_chars + len(self._texts[group[0]])
        return num_chars if num_chars <= 2 * cap else 3 * cap

    def _kept_side(self, text: str, size: int) -> str:
        return self._template.tail(text, size) if self._keep_end else self._template.head(text, size)

    def _read(self, groups: Sequence[Sequence[int]], cap: int) -> list[Step]:
        """Tokenises one text of each group; returns steps with longer clips for groups whose clips disagree."""
        clipped: list[tuple[Sequence[int], tuple[str, ...]]] = []
        undecided: list[Sequence[int]] = []
        for group in groups:
            side = self._kept_side(self._texts[group[0]], 2 * cap + 1)
            parts = (side,) if len(side) <= 2 * cap else clips(side, cap, keep_end=self._keep_end)
            if parts is None:
                undecided.append(group)
            else:
                clipped.append((group, parts))
        rows = self._tokenizer.encode_clips([parts for _, parts in clipped], keep_end=self._keep_end)
        for (group, _), row in zip(clipped, rows, strict=True):
            if row is None:
                undecided.append(group)
            else:
                self._store(group, row)
        return [step for group in undecided for step in self._try_longer_clips(group, cap)]

    def _store(self, group: Sequence[int], row: list[int]) -> None:
        ids = self._tokenizer.add_special_tokens(group[0], row, self._truncate)
        is_long = len(row) > self._tokenizer.max_text_tokens
        for index in group:
            self.rows[index], self._is_long[index] = ids, is_long

    def _try_longer_clips(self, group: Sequence[int], cap: int) -> list[Step]:
        longer = next_cap(cap, self._tokenizer.max_chars)
        if longer is None:
            num_chars = self._template_chars + len(self._texts[group[0]])
            raise self._tokenizer.undecidable_error(group[0], num_chars, keep_end=self._keep_end)
        return self._steps(group, longer)

    def _build_result(self, long: tuple[int, ...]) -> TokenizedRequest:
        if self._prompt_tokens:
            self._check_not_prompt_only()
        return TokenizedRequest(tuple(self.rows), long, self._prompt_tokens)

    def _count_prompt(self) -> None:
        if self._template.before:
            self._prompt_tokens = self._tokenizer.count_prompt(self._template.before, self._truncate)

    def _check_not_prompt_only(self) -> None:
        for index, ids in enumerate(self.rows):
            if len(ids) <= self._prompt_tokens:
                raise InvalidValue(
                    f"input[{index}] has {len(ids)} tokens, and the first {self._prompt_tokens} are its prompt, which "
                    "this model excludes from the vector: shorten the prompt",
                    param="input",
                )
