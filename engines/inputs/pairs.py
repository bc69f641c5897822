"""Converts pairs and single texts to the ids that a model scores, exactly as the model's own tokenizer pairs them.

A query that several documents share is tokenised once. Both texts are tokenised bare, by the bounded steps of
`TextReading`, and put between the special tokens of a frame; the result holds token types in its upper bits
(`engines.inputs.token_ids.TYPE_SHIFT`). `engines/loading/pairs.py` checks at load that ids, types and truncation are
the tokenizer's own.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from engines.errors import ContextLengthExceeded, InvalidRequest, InvalidValue
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import NO_IDS, TYPE_SHIFT, Ids, Step, TokenizedRequest, pieces, run_steps, typed
from engines.inputs.tokenizer import TextReading, Tokenizer
from engines.spec import Truncate


class PairFrame(Struct, frozen=True, kw_only=True):
    """The ids around and between the two texts of a pair, types included; a single text has no middle."""

    prefix: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    query_type: int = 0
    text_type: int = 0

    @property
    def has_types(self) -> bool:
        """Whether any token has another type than the first."""
        fixed = (*self.prefix, *self.middle, *self.suffix)
        return bool(self.query_type or self.text_type or any(token >> TYPE_SHIFT for token in fixed))

    @property
    def num_tokens(self) -> int:
        """The tokens that the frame adds to the texts."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)


class Wording(Struct, frozen=True, kw_only=True):
    """The texts that a model's template puts around a query and before a document; all empty without a template.

    Args:
        query: around the query, the default instruction included.
        instructed: what stands before and behind an instruction in front of the query; None if there is no place for
            one.
        text: before the document.
        kept_ids: the ids that begin every document, which a cut at the start leaves.
        cuts_text_only: whether truncation leaves the query whole. Else the longer of both is cut first.
    """

    query: PromptTemplate = PromptTemplate()
    instructed: tuple[str, str] | None = None
    text: str = ""
    kept_ids: tuple[int, ...] = ()
    cuts_text_only: bool = False


class Cut(NamedTuple):
    """How too long inputs are cut.

    Args:
        side: the end that is cut, or `error`.
        only_text: whether queries are left whole.
        max_text_tokens: of a document, whatever else fits.
    """

    side: Truncate
    only_text: bool
    max_text_tokens: int | None = None


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Returns how many tokens of two texts are kept of `room`, as the strategy of that name in `tokenizers` does.

    The longer text is cut to the rest; where the shorter exceeds half of the room, both are cut to a half, and the
    longer keeps the odd token (the second, where both have the same length).
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = room - shorter
    return (longer, shorter) if first > second else (shorter, longer)


_EXACT_CHARS = 1 << 16
"""Up to so many characters, texts are tokenised again in whole to find out which of two is longer."""


class PairTokenizer:
    """A model's tokenizer for pairs and single texts.

    Args:
        tokenizer: of single texts.
        bare: of texts without special tokens, for at least one token more than a pair has room for.
        pair: the frame of pairs.
        wording: of pairs.
        takes_single: whether single texts are scored too.
        dropped_id: a token that is dropped at the end of an input, as the head of the model skips it; None for none.
    """

    def __init__(  # what a model's files say of pairs; one function builds it
        self,
        tokenizer: Tokenizer,
        bare: Tokenizer,
        pair: PairFrame,
        wording: Wording,
        *,
        takes_single: bool = True,
        dropped_id: int | None = None,
    ) -> None:
        self.tokenizer, self.bare = tokenizer, bare
        self.pair, self.wording = pair, wording
        self.single = (
            PairFrame(prefix=tokenizer.limits.prefix, suffix=tokenizer.limits.suffix) if takes_single else None
        )
        self.dropped_id = dropped_id

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens, special tokens included."""
        return self.tokenizer.max_tokens

    def read(
        self, queries: Sequence[str], texts: Sequence[str], cut: Cut, *, instruction: str | None = None
    ) -> "PairReading":
        """Returns the work of tokenising pairs, in steps.

        Args:
            queries: one for all texts, one for each, or none.

        Raises:
            InvalidValue: the model scores pairs only, or takes no instruction.
        """
        if instruction is not None and self.wording.instructed is None:
            raise InvalidValue("this model does not support instruction: leave it out", param="instruction")
        if not queries and self.single is None:
            raise InvalidValue("this model scores a text for a query: send a query too", param="query")
        return PairReading(self, queries, texts, cut, instruction)

    def encode(self, queries: Sequence[str], texts: Sequence[str], cut: Cut | None = None) -> TokenizedRequest:
        """Encodes pairs at once, as the model's own files cut them.

        Raises:
            InvalidRequest: they cannot be read.
        """
        return self.read(queries, texts, cut or self.own_cut(None)).run_all()

    def own_cut(self, side: Truncate | None) -> Cut:
        """Returns how the model's own files cut, on another side where one is given."""
        return Cut(side or self.tokenizer.limits.truncate, self.wording.cuts_text_only)

    def query_template(self, instruction: str | None) -> PromptTemplate:
        """Returns what is put around a query."""
        if instruction is None or self.wording.instructed is None:
            return self.wording.query
        before, behind = self.wording.instructed
        return PromptTemplate(f"{before}{instruction}{behind}", self.wording.query.behind)

    def is_longer(self, first: str, second: str) -> bool:
        """Whether the first of two long texts has more tokens; by characters where both are too long to be counted."""
        if len(first) + len(second) > _EXACT_CHARS:
            return len(first) > len(second)
        one, other = self.bare.encode_bare([first, second])
        return len(one) > len(other)


class PairReading:
    """Tokenises the pairs, or single texts, of one request (`engines.inputs.tokenizer_threads.Reading`).

    Its steps may run on any thread and in parallel. Those of the texts come first; the last of them is followed by
    those that put the pairs together.

    Attributes:
        num_chars: characters of all texts, an upper bound of what is tokenised.
        rows: the ids of each input.
    """

    def __init__(
        self, pairs: PairTokenizer, queries: Sequence[str], texts: Sequence[str], cut: Cut, instruction: str | None
    ) -> None:
        self._pairs, self._cut = pairs, cut
        frame = pairs.pair if queries else pairs.single
        assert frame is not None, "`PairTokenizer.read` has checked it"
        self._frame = frame
        self._room = pairs.max_tokens - frame.num_tokens
        self._parts = tuple(np.array(part, np.int64) for part in (frame.prefix, frame.middle, frame.suffix))
        around = pairs.query_template(instruction)
        side: Truncate = "start" if cut.side == "start" else "end"
        before = pairs.wording.text if queries else around.before
        self._queries = TextReading(pairs.bare, queries, around, side)
        self._texts = TextReading(pairs.bare, texts, PromptTemplate(before), side)
        self._given = queries, texts
        self._kept = np.array(pairs.wording.kept_ids if queries else (), np.int64)
        self._field = "documents" if queries else "input"
        self._typed: list[Ids] = []
        self._steps_left = 0
        self._lock = threading.Lock()
        self._is_cut = [False] * len(texts)
        self.num_chars = self._queries.num_chars + self._texts.num_chars
        self.rows: list[Ids] = [NO_IDS] * len(texts)

    def plan_steps(self) -> list[Step]:
        """Returns the steps; is itself the first step."""
        steps = [
            (name, step)
            for name, reading in (("query", self._queries), (self._field, self._texts))
            for step in reading.plan_steps()
        ]
        self._steps_left = len(steps)
        return [partial(self._tokenize, name, step) for name, step in steps]

    def run_all(self) -> TokenizedRequest:
        """Runs all steps and returns the result."""
        run_steps(self.plan_steps)
        return self.result()

    def result(self) -> TokenizedRequest:
        """Returns all ids; call it when all steps have run."""
        return TokenizedRequest(tuple(self.rows), tuple(i for i, is_cut in enumerate(self._is_cut) if is_cut))

    def _tokenize(self, name: str, step: Step) -> list[Step]:
        """Runs a step of the texts; after the last of them, returns the steps that put the pairs together."""
        try:
            following = step()
        except InvalidRequest as error:
            raise renamed(error, name) from error
        with self._lock:
            self._steps_left += len(following) - 1
            is_last = not self._steps_left
        if not is_last:
            return [partial(self._tokenize, name, more) for more in following]
        self._typed = [typed(row, self._frame.query_type) for row in self._queries.rows] or [NO_IDS]
        indexes = range(len(self.rows))
        return [partial(self._put_together, piece) for piece in pieces(indexes, self._num_tokens)]

    def _num_tokens(self, index: int) -> int:
        return min(len(self._texts.rows[index]) + len(self._query_row(index)), self._room) + self._frame.num_tokens

    def _query_row(self, index: int) -> Ids:
        return self._typed[index if len(self._typed) > 1 else 0]

    def _put_together(self, indexes: Sequence[int]) -> list[Step]:
        prefix, middle, suffix = self._parts
        dropped = self._pairs.dropped_id
        for index in indexes:
            query, text = self._fitted(index)
            ids = np.concatenate([prefix, query, middle, typed(text, self._frame.text_type), suffix])
            if not len(ids):
                raise InvalidValue(f"{self._field}[{index}] has no tokens: leave it out", param=self._field)
            self.rows[index] = ids if dropped is None else _without_end(ids, dropped)
        return []

    def _fitted(self, index: int) -> tuple[Ids, Ids]:
        """Returns the ids of a query and of its text, cut to what a pair has room for.

        Raises:
            ContextLengthExceeded: they are too long and must not be cut, or the query leaves no room.
        """
        query, whole = self._query_row(index), self._texts.rows[index]
        side, only_text, most = self._cut
        text = whole if most is None else self._cut_text(whole, most + len(self._kept))
        if len(query) + len(text) > self._room:
            if side == "error":
                raise self._too_long_error(index, len(query) + len(text))
            if only_text or not len(query):
                text = self._cut_text(text, self._room_beside(query, index))
            else:
                query, text = self._cut_both(query, text, index)
        self._is_cut[index] = len(text) < len(whole) or len(query) < len(self._query_row(index))
        return query, text

    def _cut_text(self, text: Ids, size: int) -> Ids:
        if len(text) <= size:
            return text
        if self._cut.side != "start":
            return text[:size]
        return np.concatenate([self._kept, text[len(text) - (size - len(self._kept)) :]])

    def _room_beside(self, query: Ids, index: int) -> int:
        """Returns the tokens that a query leaves to its text, at least one of the text itself."""
        room = self._room - len(query)
        if room <= len(self._kept):
            raise ContextLengthExceeded(
                f"the query of {self._field}[{index}] has at least {len(query)} tokens, which leaves none of this "
                f"model's {self._pairs.max_tokens} for the document: shorten the query",
                param="query",
            )
        return room

    def _cut_both(self, query: Ids, text: Ids, index: int) -> tuple[Ids, Ids]:
        first, second = len(query), len(text)
        if first > self._room < second and self._room % 2:  # both are counted up to here only
            queries, texts = self._given
            first = second + self._pairs.is_longer(queries[index if len(queries) > 1 else 0], texts[index])
        kept = longest_first(first, second, self._room)
        at_end = self._cut.side == "start"
        query, text = (
            ids[max(0, len(ids) - size) :] if at_end else ids[:size]
            for ids, size in zip((query, text), kept, strict=True)
        )
        return query, text

    def _too_long_error(self, index: int, num_tokens: int) -> ContextLengthExceeded:
        what = f"{self._field}[{index}] and its query have" if self._given[0] else f"{self._field}[{index}] has"
        return ContextLengthExceeded(
            f"{what} at least {num_tokens + self._frame.num_tokens} tokens, but this model's limit is "
            f'{self._pairs.max_tokens}: shorten it, or send "truncate": "end"',
            param=self._field,
        )


def _without_end(ids: Ids, dropped: int) -> Ids:
    """Returns ids without the run of one token at their end; the first token stays."""
    end = len(ids)
    while end > 1 and ids[end - 1] == dropped:
        end -= 1
    return ids[:end]


def renamed(error: InvalidRequest, field: str) -> InvalidRequest:
    """Returns an error of a text as one of a field of the request."""
    message = str(error)
    if field == "query":
        message = message.replace("input[0]", "query", 1).replace("input[", "query[", 1)
    return type(error)(message.replace("input[", f"{field}[", 1), param=field)
