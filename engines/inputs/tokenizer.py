"""Text to token ids, as the model's own tokenizer means it. Runs off the event loop; keeps no state between calls.

Truncation is done here on ids, between the special tokens that the post-processor puts around a text, so that one
tokenizer object serves every kind of cut at once; `tokenizer_files.py` proves at load time that this is the same.

A request is read in steps (`TextReading`, `IdReading`), each of which takes a bounded time and may bring further ones.
`Tokenizer.encode` runs them at once; `TokenizerThreads` runs those of a large request in turns with others'.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol
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
    pieces,
    run_steps,
)
from engines.spec import Truncate

# Between two words, or in front of a mark behind a Chinese or Japanese word, tokenisers separate.
_BOUNDARY = re.compile(r"(?<=[^\W_]) (?=[^\W_])|(?<=[぀-ヿ一-鿿])(?=[、。，！？；：])")


_CHARS_PER_TOKEN = 8
"""Of a text longer than twice this for each token that is kept, only a part is tokenised at first."""


_GROWTH = 8
"""By so much each next part is longer."""


_LEAST_CHARS = 1 << 18


_MOST_CHARS = 1 << 21


def first_cap(num_tokens: int) -> int:
    """Characters of the first clips, where so many tokens are to be read."""
    return min(num_tokens * _CHARS_PER_TOKEN, _MOST_CHARS // 2)


def max_chars(num_tokens: int) -> int:
    """The most of one text that is ever tokenised at once: it takes up to a second and 270 bytes for each million
    characters and each character. Never less than the first clips of a text.
    """
    return max(2 * first_cap(num_tokens), _LEAST_CHARS)


def next_cap(cap: int, most_chars: int) -> int | None:
    """Characters of longer clips; None where there are none."""
    return min(cap * _GROWTH, most_chars // 2) if 2 * cap < most_chars else None


def clips(text: str, cap: int, *, keep_end: bool) -> tuple[str, str] | None:
    """Two clips of `cap` to `2 × cap` characters from the kept side of a text; None where only the whole text will do.

    Text without boundaries is clipped anywhere on the right: tokenisers work from left to right.
    """
    if len(text) <= 2 * cap:
        return None
    low, high = (len(text) - 2 * cap, len(text) - cap) if keep_end else (cap, 2 * cap)
    places = [match.start() for match in _BOUNDARY.finditer(text, low, high)]
    if len(places) >= 2:
        return (text[places[-1] :], text[places[0] :]) if keep_end else (text[: places[0]], text[: places[-1]])
    if keep_end:
        return None
    end = _place_before(text, cap + 1)
    return text[: _place_before(text, end - 1)], text[:end]


def _place_before(text: str, place: int) -> int:
    """The last place up to `place` where a cut changes nothing far in front of it.

    Two things reach back from behind a cut as far as a run of characters does: Unicode sorts combining marks by their
    class, and a special token may swallow the white space in front of it (RoBERTa's `<mask>`).
    """
    while place > 0 and combining(text[place]):
        place -= 1
    return len(text[: max(place, 0)].rstrip())


__all__ = ["Backend", "IdReading", "Ids", "TextReading", "TokenizedRequest", "Tokenizer", "TokenizerLimits"]


_LEAST_MARGIN_TOKENS = 128


class Backend(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[Any]:
        """Ids of many texts in one call that releases the GIL."""


class TokenizerLimits(Struct, frozen=True, kw_only=True):
    """What a model asks of its ids.

    `prefix`, `suffix`: ids that the post-processor puts around a text. `max_tokens`: the longest input that the model
    reads, special tokens included. `vocab_size`: ids at and above are not embeddings of the model; the tokenizer may
    know such ids when `has_foreign_ids`. `truncate`: the end that the tokenizer's own files cut. `takes_empty`:
    whether a text may have no token at all. `counts_prompt`: whether pooling wants to know the prompt's tokens.
    `max_word_chars`: a longer word is one unknown token (WordPiece).
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

    @property
    def margin_tokens(self) -> int:
        """How many tokens behind the kept ones a clip of a text must have: more than its last word can have, because
        that word may turn out to be longer than the tokenizer reads."""
        return max(_LEAST_MARGIN_TOKENS, self.max_word_chars + 1)

    @property
    def room(self) -> int:
        """Tokens of a text that fit between the special tokens."""
        return self.max_tokens - len(self.prefix) - len(self.suffix)


class Tokenizer:
    """A model's tokenizer and its limits.

    Args:
        backend: the fast tokenizer, without truncation and padding.
        rules: what the model asks for.
    """

    def __init__(self, backend: Backend, rules: TokenizerLimits) -> None:
        if rules.room < 1:
            special = len(rules.prefix) + len(rules.suffix)
            raise UnsupportedModel(f"max_tokens is {rules.max_tokens}, but {special} are special tokens; raise it")
        self.rules = rules
        self.room = rules.room
        self.first_cap = first_cap(rules.room + 2 * rules.margin_tokens)
        self.max_chars = max_chars(rules.room + 2 * rules.margin_tokens)
        self._backend = backend
        self._ids = IdChecks(
            rules.prefix, rules.suffix, rules.max_tokens, rules.vocab_size, takes_empty=rules.takes_empty
        )

    @property
    def max_tokens(self) -> int:
        """The longest input that the model reads, special tokens included."""
        return self.rules.max_tokens

    def limited_to(self, max_tokens: int) -> "Tokenizer":
        """The same tokenizer with another limit."""
        return Tokenizer(self._backend, structs.replace(self.rules, max_tokens=max_tokens))

    def encode(self, texts: Sequence[str], frame: PromptTemplate, truncate: Truncate) -> TokenizedRequest:
        """Ids of all texts.

        Raises:
            ContextLengthExceeded: a text is longer than the model reads, and `truncate` is `error`.
            InvalidValue: a text has no token at all, or what is kept of it cannot be told from a part of it.
        """
        return self.read(texts, frame, truncate).now()

    def take_ids(
        self, rows: Sequence[Sequence[int]], truncate: Truncate, *, must_be_framed: bool = False
    ) -> TokenizedRequest:
        """Token ids from the client, verbatim; too long ones are cut and keep the special tokens that they end in.

        Raises:
            InvalidTokenId: an id is not of this model, or the model's special tokens do not stand around a row that
                `must_be_framed`.
            ContextLengthExceeded, InvalidValue: as `encode`.
        """
        return self.read_ids(rows, truncate, must_be_framed=must_be_framed).now()

    def read(self, texts: Sequence[str], frame: PromptTemplate, truncate: Truncate) -> "TextReading":
        """What `encode` does, in steps."""
        return TextReading(self, texts, frame, truncate)

    def read_ids(self, rows: Sequence[Sequence[int]], truncate: Truncate, *, must_be_framed: bool) -> "IdReading":
        """What `take_ids` does, in steps."""
        return IdReading(self._ids, rows, truncate, must_be_framed=must_be_framed)

    # What readings are made of.

    def encode_clips(self, clipped: Sequence[tuple[str, ...]], *, keep_end: bool) -> list[list[int] | None]:
        """Ids without special tokens of each whole text (a tuple of one) or pair of clips; None where two disagree."""
        flat = list(chain.from_iterable(clipped))
        rows = chain.from_iterable(self.encode_bare(piece) for piece in pieces(flat, len))
        found: list[list[int] | None] = []
        for texts in clipped:
            row = next(rows)
            agree = len(texts) == 1 or self._agree(row, next(rows), keep_end=keep_end)
            found.append(row if agree else None)
        return found

    def close(self, index: int, row: list[int], truncate: Truncate) -> Ids:
        """The ids that are kept of a text, with its special tokens.

        Raises:
            ContextLengthExceeded, InvalidValue, InvalidTokenId: naming the input by its `index`.
        """
        if truncate == "error" and len(row) > self.room:
            raise self._ids.too_long(index, len(row) + len(self.rules.prefix) + len(self.rules.suffix))
        limits = self.rules
        if len(row) > self.room:
            row = row[-self.room :] if truncate == "start" else row[: self.room]
        ids = np.array([*limits.prefix, *row, *limits.suffix], np.int64)
        if not len(ids):
            self._ids.check_not_empty(index, ids)
        if limits.has_foreign_ids:
            self._ids.check(index, ids)
        return ids

    def count_prompt(self, prompt: str, truncate: Truncate) -> int:
        """Tokens of the prompt alone, as sentence-transformers counts them: cut like a text, and a last special token
        is not its own."""
        if not self.rules.counts_prompt:
            return 0
        lenient = Tokenizer(self._backend, structs.replace(self.rules, takes_empty=True, has_foreign_ids=False))
        encoded = lenient.encode([prompt], PromptTemplate(), "end" if truncate == "error" else truncate)
        return len(encoded.ids[0]) - min(len(self.rules.suffix), 1)

    def unclear(self, index: int, num_chars: int, *, keep_end: bool) -> InvalidValue:
        """The refusal of a text so long and so even that a part of it does not show what is kept."""
        return InvalidValue(
            f"input[{index}] has {num_chars} characters, and its {'last' if keep_end else 'first'} {self.max_chars} do "
            f"not show which {self.max_tokens} tokens to keep, because they hold no words or few tokens: shorten it",
            param="input",
        )

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without special tokens, all in one call.

        Raises:
            InvalidValue: a text that is none.
        """
        try:
            return [row.ids for row in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except UnicodeEncodeError as error:
            raise InvalidValue(
                "input holds a lone surrogate, which is no text in any encoding", param="input"
            ) from error
        # The tokenizers library raises bare exceptions, and PyO3's PanicException is not even one of those.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InvalidValue(
                f"the model's tokenizer cannot read this input ({type(error).__name__}); leave out what is no text",
                param="input",
            ) from error

    def _agree(self, first: list[int], second: list[int], *, keep_end: bool) -> bool:
        """Whether two clips of a text show it to be too long, and give the same tokens to keep."""
        room = self.room
        if min(len(first), len(second)) < room + self.rules.margin_tokens:
            return False
        return first[-room:] == second[-room:] if keep_end else first[:room] == second[:room]


class TextReading:
    """The texts of one request on their way to ids: equal ones are tokenised once, long ones in part.

    Its steps may run on any thread and beside each other: each writes the rows of its own inputs.

    Attributes:
        num_chars: of all texts, each in its frame: what is to be read at the most.
        rows: the kept ids of each input, special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], frame: PromptTemplate, truncate: Truncate) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._frame = frame
        self._frame_chars = frame.num_chars
        self._truncate = truncate
        self._keep_end = truncate == "start"
        self._is_long = [False] * len(texts)
        self._prompt_tokens = 0
        self._num_whole_chars = min(2 * tokenizer.first_cap, PIECE_CHARS)
        self.num_chars = self._frame_chars * len(texts) + sum(map(len, texts))
        self.rows: list[Ids] = [NO_IDS] * len(texts)

    def begin(self) -> list[Step]:
        """The first step: which texts are equal, and in which pieces they are read."""
        self._count_prompt()
        return self._steps(range(len(self._texts)), self._tokenizer.first_cap)

    def now(self) -> TokenizedRequest:
        """All steps and their result, for a request that need not wait for turns."""
        if self.num_chars > self._num_whole_chars:
            run_steps(self.begin)
            return self.result()
        self._count_prompt()
        tokenizer, truncate, room = self._tokenizer, self._truncate, self._tokenizer.room
        texts = [self._frame.apply(text) for text in self._texts] if self._frame_chars else self._texts
        rows = tokenizer.encode_bare(texts)
        self.rows = [tokenizer.close(index, row, truncate) for index, row in enumerate(rows)]
        return self._answer(tuple([index for index, row in enumerate(rows) if len(row) > room]))

    def result(self) -> TokenizedRequest:
        """All ids, when all steps have run.

        Raises:
            InvalidValue: a prompt that pooling leaves out is all that is left of a text.
        """
        return self._answer(tuple(index for index, is_long in enumerate(self._is_long) if is_long))

    def _steps(self, indexes: Sequence[int], cap: int) -> list[Step]:
        """One step for each piece of these texts, of which up to `2 × cap` characters are looked at."""
        equal: dict[str, list[int]] = {}
        for index in indexes:
            text = self._texts[index]
            is_short = self._frame_chars + len(text) <= 2 * cap
            equal.setdefault(text if is_short else self._side(text, 2 * cap + 1), []).append(index)
        groups = list(equal.values())
        return [partial(self._read, piece, cap) for piece in pieces(groups, partial(self._cost, cap=cap))]

    def _cost(self, group: Sequence[int], cap: int) -> int:
        num_chars = self._frame_chars + len(self._texts[group[0]])
        return num_chars if num_chars <= 2 * cap else 3 * cap

    def _side(self, text: str, size: int) -> str:
        return self._frame.tail(text, size) if self._keep_end else self._frame.head(text, size)

    def _read(self, groups: Sequence[Sequence[int]], cap: int) -> list[Step]:
        """Tokenise one text of each group for all of it; steps with longer clips for those that these do not settle."""
        clipped: list[tuple[Sequence[int], tuple[str, ...]]] = []
        unsettled: list[Sequence[int]] = []
        for group in groups:
            side = self._side(self._texts[group[0]], 2 * cap + 1)
            parts = (side,) if len(side) <= 2 * cap else clips(side, cap, keep_end=self._keep_end)
            if parts is None:
                unsettled.append(group)
            else:
                clipped.append((group, parts))
        rows = self._tokenizer.encode_clips([parts for _, parts in clipped], keep_end=self._keep_end)
        for (group, _), row in zip(clipped, rows, strict=True):
            if row is None:
                unsettled.append(group)
            else:
                self._settle(group, row)
        return [step for group in unsettled for step in self._look_further(group, cap)]

    def _settle(self, group: Sequence[int], row: list[int]) -> None:
        ids = self._tokenizer.close(group[0], row, self._truncate)
        is_long = len(row) > self._tokenizer.room
        for index in group:
            self.rows[index], self._is_long[index] = ids, is_long

    def _look_further(self, group: Sequence[int], cap: int) -> list[Step]:
        longer = next_cap(cap, self._tokenizer.max_chars)
        if longer is None:
            num_chars = self._frame_chars + len(self._texts[group[0]])
            raise self._tokenizer.unclear(group[0], num_chars, keep_end=self._keep_end)
        return self._steps(group, longer)

    def _answer(self, long: tuple[int, ...]) -> TokenizedRequest:
        if self._prompt_tokens:
            self._refuse_prompts_alone()
        return TokenizedRequest(tuple(self.rows), long, self._prompt_tokens)

    def _count_prompt(self) -> None:
        if self._frame.before:
            self._prompt_tokens = self._tokenizer.count_prompt(self._frame.before, self._truncate)

    def _refuse_prompts_alone(self) -> None:
        for index, ids in enumerate(self.rows):
            if len(ids) <= self._prompt_tokens:
                raise InvalidValue(
                    f"input[{index}] has {len(ids)} tokens, and the first {self._prompt_tokens} are its prompt, which "
                    "this model leaves out of the vector: nothing is left; shorten the prompt",
                    param="input",
                )
