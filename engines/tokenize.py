"""Text to token ids, as the model's own tokenizer means it. Runs off the event loop; keeps no state between calls.

Truncation is done here on ids, between the special tokens that the post-processor puts around a text, so that one
tokenizer object serves every kind of cut at once; `tokenizer_files.py` proves at load time that this is the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from engines.clipping import MAX_UNBROKEN_CHARS, clips
from engines.errors import ContextLengthExceeded, InvalidTokenId, InvalidValue, UnsupportedModel
from engines.prompts import Frame
from engines.spec import Truncate

Ids = NDArray[np.int64]

# Of a text longer than this for each token that is kept, only a part is tokenised at first.
_CHARS_PER_TOKEN = 8
_SPARE_TOKENS = 256

# The most that the backend is given at once.
_PIECE_CHARS = 1 << 19


class Backend(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[Any]:
        """Ids of many texts in one call that releases the GIL."""


class Rules(Struct, frozen=True, kw_only=True):
    """What a model asks of its ids.

    `prefix`, `suffix`: ids that the post-processor puts around a text. `max_tokens`: the longest input that the model
    reads, special tokens included. `vocab_size`: ids at and above are not embeddings of the model; the tokenizer may
    know such ids when `has_foreign_ids`. `truncate`: the end that the tokenizer's own files cut. `takes_empty`:
    whether a text may have no token at all. `counts_prompt`: whether pooling wants to know the prompt's tokens.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    max_tokens: int
    vocab_size: int
    has_foreign_ids: bool = False
    truncate: Truncate = "end"
    takes_empty: bool = False
    counts_prompt: bool = False

    @property
    def room(self) -> int:
        """Tokens of a text that fit between the special tokens."""
        return self.max_tokens - len(self.prefix) - len(self.suffix)


class Encoded(Struct, frozen=True):
    """One request's texts as ids, in input order. `prompt_tokens` is what pooling may leave out of every text."""

    ids: tuple[Ids, ...]
    truncated: tuple[int, ...] = ()
    prompt_tokens: int = 0

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each text, special tokens included."""
        return tuple(len(ids) for ids in self.ids)


class Tokenizer:
    """A model's tokenizer and its limits.

    Args:
        backend: the fast tokenizer, without truncation and padding.
        rules: what the model asks for.
    """

    def __init__(self, backend: Backend, rules: Rules) -> None:
        if rules.room < 1:
            special = len(rules.prefix) + len(rules.suffix)
            raise UnsupportedModel(f"max_tokens is {rules.max_tokens}, but {special} are special tokens; raise it")
        self.rules = rules
        self._backend = backend
        self._prefix = np.asarray(rules.prefix, dtype=np.int64)
        self._suffix = np.asarray(rules.suffix, dtype=np.int64)

    @property
    def max_tokens(self) -> int:
        """The longest input that the model reads, special tokens included."""
        return self.rules.max_tokens

    def limited_to(self, max_tokens: int) -> "Tokenizer":
        """The same tokenizer with another limit."""
        return Tokenizer(self._backend, structs.replace(self.rules, max_tokens=max_tokens))

    def encode(self, texts: Sequence[str], frame: Frame, truncate: Truncate) -> Encoded:
        """Ids of all texts in one call of the backend.

        Raises:
            ContextLengthExceeded: a text is longer than the model reads, and `truncate` is `error`.
            InvalidValue: a text has no token at all, or cannot be cut at its start.
        """
        bare = self._encode_capped([frame.around(text) for text in texts], keep_end=truncate == "start")
        long = tuple(index for index, ids in enumerate(bare) if len(ids) > self.rules.room)
        if long and truncate == "error":
            raise self._too_long(long[0], len(bare[long[0]]))
        ids = tuple(self._wrap(self._cut(row, truncate)) for row in bare)
        self._check(ids, is_verbatim=False)
        return Encoded(ids, long, self._count_prompt(frame))

    def take_ids(self, rows: Sequence[Sequence[int]], truncate: Truncate) -> Encoded:
        """Token ids from the client, verbatim; too long ones are cut and keep the special tokens that they end in.

        Raises:
            InvalidTokenId: an id is not of this model.
            ContextLengthExceeded, InvalidValue: as `encode`.
        """
        taken = [self._as_ids(index, row) for index, row in enumerate(rows)]
        self._check(taken, is_verbatim=True)
        long = tuple(index for index, row in enumerate(taken) if len(row) > self.max_tokens)
        if long and truncate == "error":
            raise self._too_long(long[0], len(taken[long[0]]) - len(self._prefix) - len(self._suffix))
        return Encoded(tuple(self._cut_verbatim(row, truncate) for row in taken), long)

    def _encode_capped(self, texts: Sequence[str], *, keep_end: bool) -> list[list[int]]:
        """Ids without special tokens; of a huge text only the part from which the kept tokens come."""
        cap = (self.rules.room + _SPARE_TOKENS) * _CHARS_PER_TOKEN
        rows: dict[int, list[int]] = {}
        pending = {i: pair for i, text in enumerate(texts) if (pair := clips(text, cap, keep_end=keep_end))}
        while pending:
            flat = self._encode_bare([clip for pair in pending.values() for clip in pair])
            opinions = zip(pending, flat[::2], flat[1::2], strict=True)
            rows |= {i: first for i, first, second in opinions if self._agree(first, second, keep_end=keep_end)}
            cap *= 8
            left = [i for i in pending if i not in rows]
            pending = {i: pair for i in left if (pair := clips(texts[i], cap, keep_end=keep_end))}
        whole = [i for i in range(len(texts)) if i not in rows]
        self._refuse_unbroken(texts, whole, keep_end=keep_end)
        rows |= zip(whole, self._encode_bare([texts[i] for i in whole]), strict=True)
        return [rows[i] for i in range(len(texts))]

    def _agree(self, first: list[int], second: list[int], *, keep_end: bool) -> bool:
        """Whether two clips of a text show it to be too long, and give the same tokens to keep."""
        room = self.rules.room
        if min(len(first), len(second)) < room + _SPARE_TOKENS // 2:
            return False
        return first[-room:] == second[-room:] if keep_end else first[:room] == second[:room]

    def _refuse_unbroken(self, texts: Sequence[str], whole: Iterable[int], *, keep_end: bool) -> None:
        for index in whole:
            if keep_end and len(texts[index]) > MAX_UNBROKEN_CHARS:
                raise InvalidValue(
                    f"input[{index}] has {len(texts[index])} characters and no words near its end, so its last "
                    f'{self.max_tokens} tokens cannot be told; cut it yourself, or use "truncate": "end"',
                    param="input",
                )

    def _encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """In one call for a usual request. A huge one goes in pieces: what the backend notes of a text is more than its
        ids, and is gone after each piece (2,048 texts of 500 words: 60 MB less at the peak, and no slower)."""
        rows: list[list[int]] = []
        for piece in _pieces(texts):
            rows += (row.ids for row in self._backend.encode_batch_fast(piece, add_special_tokens=False))
        return rows

    def _cut(self, row: list[int], truncate: Truncate) -> list[int]:
        return row[-self.rules.room :] if truncate == "start" else row[: self.rules.room]

    def _wrap(self, row: list[int]) -> Ids:
        return np.concatenate([self._prefix, np.asarray(row, dtype=np.int64), self._suffix])

    def _cut_verbatim(self, row: Ids, truncate: Truncate) -> Ids:
        if len(row) <= self.max_tokens:
            return row
        has_prefix = np.array_equal(row[: len(self._prefix)], self._prefix)
        has_suffix = len(self._suffix) > 0 and np.array_equal(row[-len(self._suffix) :], self._suffix)
        head = self._prefix if has_prefix else row[:0]
        tail = self._suffix if has_suffix else row[:0]
        body = row[len(head) : len(row) - len(tail)]
        room = self.max_tokens - len(head) - len(tail)
        return np.concatenate([head, body[-room:] if truncate == "start" else body[:room], tail])

    def _check(self, rows: Sequence[Ids], *, is_verbatim: bool) -> None:
        """Every row has tokens, and each is an embedding of the model."""
        for index, row in enumerate(rows):
            if not len(row) and not self.rules.takes_empty:
                raise InvalidValue(f"input[{index}] has no token; leave it out", param="input")
            if is_verbatim or self.rules.has_foreign_ids:
                self._check_ids(index, row)

    def _check_ids(self, index: int, row: Ids) -> None:
        bad = row[(row < 0) | (row >= self.rules.vocab_size)]
        if len(bad):
            raise self._not_an_id(index, int(bad[0]))

    def _as_ids(self, index: int, row: Sequence[int]) -> Ids:
        try:
            return np.asarray(row, dtype=np.int64)
        except OverflowError:
            bad = next(number for number in row if not 0 <= number < self.rules.vocab_size)
            raise self._not_an_id(index, bad) from None

    def _not_an_id(self, index: int, bad: int) -> InvalidTokenId:
        return InvalidTokenId(
            f"input[{index}] holds token id {bad}, but this model's ids are 0 to {self.rules.vocab_size - 1}; "
            "they must come from its own tokenizer. LangChain sends OpenAI's ids unless it is made with "
            "check_embedding_ctx_length=False",
            param="input",
        )

    def _count_prompt(self, frame: Frame) -> int:
        """Tokens of the prompt alone, as sentence-transformers counts them: a last special token is not its own."""
        if not frame.before or not self.rules.counts_prompt:
            return 0
        return len(self._prefix) + len(self._encode_bare([frame.before])[0]) + max(len(self._suffix) - 1, 0)

    def _too_long(self, index: int, tokens: int) -> ContextLengthExceeded:
        count = tokens + len(self._prefix) + len(self._suffix)
        return ContextLengthExceeded(
            f"input[{index}] has at least {count} tokens, but this model reads {self.max_tokens}; shorten it, or let "
            'it be cut with "truncate": "end"',
            param="input",
        )


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a list where a piece has `_PIECE_CHARS`; a text is never cut."""
    start, chars = 0, 0
    for index, text in enumerate(texts):
        if chars and chars + len(text) > _PIECE_CHARS:
            yield texts[start:index]
            start, chars = index, 0
        chars += len(text)
    if start < len(texts):
        yield texts[start:]
