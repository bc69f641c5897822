"""Token ids: the steps in which a request becomes ids, and ids that a client sends itself, which are taken verbatim."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import ContextLengthExceeded, InvalidTokenId, InvalidValue
from engines.spec import Truncate

Ids = NDArray[np.int64]

NO_IDS: Ids = np.empty(0, np.int64)

PIECE_CHARS = 1 << 16
"""The most characters, or ids of a client, of one step, unless a single text has more: 10 to 60 ms, and 3 ms."""

Item = TypeVar("Item")

Step = Callable[[], Sequence["Step"]]
"""A bounded part of a request's reading, and what it leaves to be done."""


def run_steps(first: Step) -> None:
    """Run a step and all that follow, in order."""
    waiting = deque([first])
    while waiting:
        waiting.extend(waiting.popleft()())


def pieces(items: Sequence[Item], cost: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
    """Cut a list where a piece costs `PIECE_CHARS`; an item is never cut."""
    start, chars = 0, 0
    for index, item in enumerate(items):
        more = cost(item)
        if chars and chars + more > PIECE_CHARS:
            yield items[start:index]
            start, chars = index, 0
        chars += more
    if start < len(items):
        yield items[start:]


class TokenizedRequest(Struct, frozen=True):
    """One request's texts as ids, in input order. `prompt_tokens` is what pooling may leave out of every text."""

    ids: tuple[Ids, ...]
    truncated: tuple[int, ...] = ()
    prompt_tokens: int = 0

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each text, special tokens included."""
        return tuple(len(ids) for ids in self.ids)


class IdChecks:
    """What a model asks of rows of ids: see `engines.inputs.tokenizer.TokenizerLimits`."""

    def __init__(
        self, prefix: Sequence[int], suffix: Sequence[int], max_tokens: int, vocab_size: int, *, takes_empty: bool
    ) -> None:
        self._prefix = np.asarray(prefix, dtype=np.int64)
        self._suffix = np.asarray(suffix, dtype=np.int64)
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size
        self._takes_empty = takes_empty

    def take(self, index: int, row: Sequence[int], truncate: Truncate, *, must_be_framed: bool) -> tuple[Ids, bool]:
        """The ids that are kept of a client's row, and whether it was cut.

        Raises:
            InvalidTokenId, ContextLengthExceeded, InvalidValue: naming the input by its `index`.
        """
        taken = self._as_ids(index, row)
        self.check_not_empty(index, taken)
        if must_be_framed and not (self._has_prefix(taken) and self._has_suffix(taken)):
            raise self._not_framed(index)
        is_long = len(taken) > self._max_tokens
        if is_long and truncate == "error":
            raise self.too_long(index, len(taken))
        return (self._cut(taken, truncate) if is_long else taken), is_long

    def check(self, index: int, row: Ids) -> None:
        """Every id is an embedding of the model.

        Raises:
            InvalidTokenId: naming the first that is not.
        """
        bad = row[(row < 0) | (row >= self._vocab_size)]
        if len(bad):
            raise self._not_an_id(index, int(bad[0]))

    def check_not_empty(self, index: int, row: Ids) -> None:
        """There are ids, unless the model has a vector for a text without any.

        Raises:
            InvalidValue: naming the input.
        """
        if not len(row) and not self._takes_empty:
            raise InvalidValue(f"input[{index}] has no token; leave it out", param="input")

    def too_long(self, index: int, num_tokens: int) -> ContextLengthExceeded:
        """The refusal of a row that may not be cut."""
        return ContextLengthExceeded(
            f"input[{index}] has at least {num_tokens} tokens, but this model reads {self._max_tokens}; shorten it, or "
            'let it be cut with "truncate": "end"',
            param="input",
        )

    def _as_ids(self, index: int, row: Sequence[int]) -> Ids:
        """In parts, between which other threads get their turn: ten million numbers take half a second."""
        parts = []
        for start in range(0, len(row), PIECE_CHARS):
            part = row[start : start + PIECE_CHARS]
            try:
                parts.append(np.asarray(part, dtype=np.int64))
            except OverflowError:
                bad = next(number for number in part if not 0 <= number < self._vocab_size)
                raise self._not_an_id(index, bad) from None
            self.check(index, parts[-1])
        return np.concatenate(parts) if parts else NO_IDS

    def _cut(self, row: Ids, truncate: Truncate) -> Ids:
        head = self._prefix if self._has_prefix(row) else NO_IDS
        tail = self._suffix if self._has_suffix(row) else NO_IDS
        body = row[len(head) : len(row) - len(tail)]
        room = self._max_tokens - len(head) - len(tail)
        return np.concatenate([head, body[-room:] if truncate == "start" else body[:room], tail])

    def _has_prefix(self, row: Ids) -> bool:
        return np.array_equal(row[: len(self._prefix)], self._prefix)

    def _has_suffix(self, row: Ids) -> bool:
        """Behind the prefix: a row of one id is not both."""
        behind = row[len(self._prefix) :] if self._has_prefix(row) else row
        return np.array_equal(behind[max(len(behind) - len(self._suffix), 0) :], self._suffix)

    def _not_an_id(self, index: int, bad: int) -> InvalidTokenId:
        return InvalidTokenId(
            f"input[{index}] holds token id {bad}, but this model's ids are 0 to {self._vocab_size - 1}; "
            "they must come from its own tokenizer. LangChain sends OpenAI's ids unless it is made with "
            "check_embedding_ctx_length=False",
            param="input",
        )

    def _not_framed(self, index: int) -> InvalidTokenId:
        ends = (("begin", self._prefix), ("end", self._suffix))
        frame = " and ".join(f"{verb} with {special.tolist()}" for verb, special in ends if len(special))
        return InvalidTokenId(
            f"input[{index}] is a row of token ids that does not {frame}, the special tokens that this model's own "
            "tokenizer puts around a text; ids of another tokenizer would give a wrong vector. LangChain sends "
            "OpenAI's ids unless it is made with check_embedding_ctx_length=False. Send texts, or let the registry say "
            "`unframed_token_ids: true` for this model",
            param="input",
        )


class IdReading:
    """The token ids of one request on their way to rows: checked and cut.

    Attributes:
        num_chars: how many ids there are, which cost no more than as many characters.
    """

    def __init__(
        self, checks: IdChecks, rows: Sequence[Sequence[int]], truncate: Truncate, *, must_be_framed: bool
    ) -> None:
        self._checks = checks
        self._given = rows
        self._truncate = truncate
        self._must_be_framed = must_be_framed
        self._rows: list[tuple[Ids, bool]] = [(NO_IDS, False)] * len(rows)
        self.num_chars = sum(map(len, rows))

    def begin(self) -> list[Step]:
        """The first step: in which pieces the rows are read."""
        indexes = range(len(self._given))
        return [partial(self._read, piece) for piece in pieces(indexes, lambda index: len(self._given[index]))]

    def now(self) -> TokenizedRequest:
        """All steps and their result."""
        run_steps(self.begin)
        return self.result()

    def result(self) -> TokenizedRequest:
        """All ids, when all steps have run."""
        long = tuple(index for index, (_, is_long) in enumerate(self._rows) if is_long)
        return TokenizedRequest(tuple(ids for ids, _ in self._rows), long)

    def _read(self, indexes: Sequence[int]) -> list[Step]:
        for index in indexes:
            self._rows[index] = self._checks.take(
                index, self._given[index], self._truncate, must_be_framed=self._must_be_framed
            )
        return []
