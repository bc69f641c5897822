"""Splits the reading of a request into bounded steps, and checks and truncates token ids sent by clients."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import ContextLengthExceeded, InvalidTokenId, InvalidValue
from engines.spec import Truncate

Ids = NDArray[np.int64]

NO_IDS: Ids = np.empty(0, np.int64)

TYPE_SHIFT = 32
"""Pairs hold a token's type (its segment) in the bits of its id from here on. What decides an output is then one number
a token: duplicates, cached rows and batches tell two pairs apart that differ in types only. Clients cannot send such an
id, because no vocabulary reaches here; `engines/models/transformer.py` parts the two again."""

ID_MASK = (1 << TYPE_SHIFT) - 1

UNSEEN = 1 << (TYPE_SHIFT + 8)
"""The bit of a token to which no other attends: it fills a query up (`engines/layers/hidden_keys.py`). Such tokens
stand at the end of a text. Clients cannot send this bit either."""


def num_seen(ids: Ids) -> int:
    """Returns the number of tokens of a text that attention reads."""
    return int(np.count_nonzero(ids < UNSEEN))


def typed(ids: Sequence[int] | Ids, token_type: int) -> Ids:
    """Returns ids that carry a token type."""
    return np.asarray(ids, np.int64) | (token_type << TYPE_SHIFT)


class TokenizerBackend(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Any:
        """Encodes one text, to the same ids as `encode_batch_fast`."""

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[Any]:
        """Encodes many texts in one call that releases the GIL."""


PIECE_CHARS = 1 << 16
"""The most characters, or client token ids, per step unless a single text has more: 10 to 60 ms, or 3 ms for ids."""

Item = TypeVar("Item")

Step = Callable[[], Sequence["Step"]]
"""Does a bounded part of the reading of a request; returns the steps that remain."""


def run_steps(first: Step) -> None:
    """Runs a step and all steps that follow, in order."""
    waiting = deque([first])
    while waiting:
        waiting.extend(waiting.popleft()())


def pieces(items: Sequence[Item], cost: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
    """Splits a list into pieces that cost up to `PIECE_CHARS`; never splits an item."""
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
    """The token ids of a request's texts, in input order.

    `truncated`: indexes of truncated inputs. `prompt_tokens`: leading tokens of each text that pooling may exclude.
    """

    ids: tuple[Ids, ...]
    truncated: tuple[int, ...] = ()
    prompt_tokens: int = 0

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The number of tokens of each text, special tokens included."""
        return tuple(map(len, self.ids))


class IdChecks:
    """Checks rows of token ids against a model's limits (`engines.inputs.tokenizer.TokenizerLimits`)."""

    def __init__(
        self, prefix: Sequence[int], suffix: Sequence[int], max_tokens: int, vocab_size: int, *, takes_empty: bool
    ) -> None:
        self._prefix = np.asarray(prefix, dtype=np.int64)
        self._suffix = np.asarray(suffix, dtype=np.int64)
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size
        self._takes_empty = takes_empty

    def check_and_truncate(
        self, index: int, row: Sequence[int], truncate: Truncate, *, must_be_framed: bool
    ) -> tuple[Ids, bool]:
        """Returns the ids to keep of a client's row, and whether the row was truncated.

        Raises:
            InvalidTokenId, ContextLengthExceeded, InvalidValue: naming the input by its `index`.
        """
        taken = self._as_ids(index, row)
        self.check_not_empty(index, taken)
        if must_be_framed and not (self._has_prefix(taken) and self._has_suffix(taken)):
            raise self._unframed_error(index)
        is_long = len(taken) > self._max_tokens
        if is_long and truncate == "error":
            raise self.too_long_error(index, len(taken))
        return (self._truncate(taken, truncate) if is_long else taken), is_long

    def check(self, index: int, row: Ids) -> None:
        """Checks that every id has an embedding in the model.

        Raises:
            InvalidTokenId: naming the first id without one.
        """
        bad = row[(row < 0) | (row >= self._vocab_size)]
        if len(bad):
            raise self._invalid_id_error(index, int(bad[0]))

    def check_not_empty(self, index: int, row: Ids) -> None:
        """Checks that a row has ids, unless the model has a vector for an empty row.

        Raises:
            InvalidValue: naming the input.
        """
        if not len(row) and not self._takes_empty:
            raise InvalidValue(f"input[{index}] has no tokens: leave it out", param="input")

    def too_long_error(self, index: int, num_tokens: int) -> ContextLengthExceeded:
        """Returns the error for a row that is too long and must not be truncated."""
        return ContextLengthExceeded(
            f"input[{index}] has at least {num_tokens} tokens, but this model's limit is {self._max_tokens}: shorten "
            'it, or send "truncate": "end"',
            param="input",
        )

    def _as_ids(self, index: int, row: Sequence[int]) -> Ids:
        """Converts a row in parts, so that other threads can run in between: ten million numbers take half a second."""
        parts = []
        for start in range(0, len(row), PIECE_CHARS):
            part = row[start : start + PIECE_CHARS]
            try:
                parts.append(np.asarray(part, dtype=np.int64))
            except OverflowError:
                bad = next(number for number in part if not 0 <= number < self._vocab_size)
                raise self._invalid_id_error(index, bad) from None
            self.check(index, parts[-1])
        return np.concatenate(parts) if parts else NO_IDS

    def _truncate(self, row: Ids, truncate: Truncate) -> Ids:
        head = self._prefix if self._has_prefix(row) else NO_IDS
        tail = self._suffix if self._has_suffix(row) else NO_IDS
        body = row[len(head) : len(row) - len(tail)]
        max_body_tokens = self._max_tokens - len(head) - len(tail)
        return np.concatenate([head, body[-max_body_tokens:] if truncate == "start" else body[:max_body_tokens], tail])

    def _has_prefix(self, row: Ids) -> bool:
        return np.array_equal(row[: len(self._prefix)], self._prefix)

    def _has_suffix(self, row: Ids) -> bool:
        """Returns whether the suffix ends the row after its prefix: a row of one id is not both."""
        behind = row[len(self._prefix) :] if self._has_prefix(row) else row
        return np.array_equal(behind[max(len(behind) - len(self._suffix), 0) :], self._suffix)

    def _invalid_id_error(self, index: int, bad: int) -> InvalidTokenId:
        return InvalidTokenId(
            f"input[{index}] holds token id {bad}, but this model's ids are 0 to {self._vocab_size - 1}: "
            "use the model's own tokenizer or send texts. LangChain sends OpenAI's ids unless it is created with "
            "check_embedding_ctx_length=False",
            param="input",
        )

    def _unframed_error(self, index: int) -> InvalidTokenId:
        ends = (("begin", self._prefix), ("end", self._suffix))
        missing = " and ".join(f"{verb} with {special.tolist()}" for verb, special in ends if len(special))
        return InvalidTokenId(
            f"input[{index}] holds token ids that do not {missing}, this model's special tokens, so they may come from "
            "another tokenizer: send texts, or set `unframed_token_ids: true` for this model in the registry. "
            "LangChain sends OpenAI's ids unless it is created with check_embedding_ctx_length=False",
            param="input",
        )


class IdReading:
    """Reads the token ids of one request: checks and truncates them.

    Attributes:
        num_chars: the number of ids, each of which costs at most as much as a character.
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

    def plan_steps(self) -> list[Step]:
        """Returns one step for each piece of the rows; is itself the first step."""
        indexes = range(len(self._given))
        return [partial(self._read, piece) for piece in pieces(indexes, lambda index: len(self._given[index]))]

    def run_all(self) -> TokenizedRequest:
        """Runs all steps and returns the result."""
        run_steps(self.plan_steps)
        return self.result()

    def result(self) -> TokenizedRequest:
        """Returns all ids; call it when all steps have run."""
        long = tuple(index for index, (_, is_long) in enumerate(self._rows) if is_long)
        return TokenizedRequest(tuple(ids for ids, _ in self._rows), long)

    def _read(self, indexes: Sequence[int]) -> list[Step]:
        for index in indexes:
            self._rows[index] = self._checks.check_and_truncate(
                index, self._given[index], self._truncate, must_be_framed=self._must_be_framed
            )
        return []
