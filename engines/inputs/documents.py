"""Tokenises documents that are embedded piece by piece, each in the context of the whole (late chunking).

A document is tokenised once, as one text. Its tokens are then shared out to the pieces, and laid out in windows that
the model can read. How both are done is documented in docs/api.md, "Late chunking"; the pieces' own share of the
special tokens is that of the method's authors (`_extend_special_tokens` of github.com/jina-ai/late-chunking).
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.errors import ContextLengthExceeded, InvalidValue
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import TYPE_SHIFT, IdChecks, Ids, Step, TokenizedRequest, run_steps
from engines.inputs.tokenizer import Tokenizer
from engines.spec import Truncate

MAX_DOCUMENT_CHARS = 2**18
"""Characters of one document, prompt included: tokenising that many takes 0.3 s, in one step."""

MARK_SHIFT = TYPE_SHIFT
"""A window's ids carry a mark in the bits from here on: the number of the piece, from 1, whose vector the token is part
of, or 0. What decides the vectors is then one number a token, for duplicates, cached rows and batches alike."""


class DocumentWindow(NamedTuple):
    """A run of whole pieces, `first` to `end`, of which it gives the vectors of `first_given` to `end_given`."""

    first: int
    end: int
    first_given: int
    end_given: int


def plan_windows(counts: Sequence[int], capacity: int) -> list[DocumentWindow]:
    """Lays pieces of so many tokens out in windows of at most `capacity` tokens; no piece has more.

    Each window begins with the pieces in front of the first one that has not fitted yet, as far as these have at most
    half of `capacity` tokens, and goes on for as long as whole pieces fit. A piece's vector comes from the window in
    which the smaller of its two contexts, the tokens before and behind it, is largest: the first such window. A side on
    which the document ends is not small.
    """
    starts = [0, *accumulate(counts)]
    spans: list[tuple[int, int]] = []
    first = end = 0
    while end < len(counts):
        if spans:
            first = _first_of_next(starts, end, capacity)
        while end < len(counts) and starts[end + 1] - starts[first] <= capacity:
            end += 1
        spans.append((first, end))
    givers = [-1] * len(counts)
    best = [-1.0] * len(counts)
    for number, (first, end) in enumerate(spans):
        for piece in range(first, end):
            before = starts[piece] - starts[first] if first else float("inf")
            behind = starts[end] - starts[piece + 1] if end < len(counts) else float("inf")
            if min(before, behind) > best[piece]:
                givers[piece], best[piece] = number, min(before, behind)
    given = [[piece for piece, giver in enumerate(givers) if giver == number] for number in range(len(spans))]
    return [DocumentWindow(*span, own[0], own[-1] + 1) for span, own in zip(spans, given, strict=True) if own]


def _first_of_next(starts: Sequence[int], new: int, capacity: int) -> int:
    """Returns the first piece of the window that is made for the piece `new`."""
    room = min(capacity // 2, capacity - (starts[new + 1] - starts[new]))
    first = new
    while starts[new] - starts[first - 1] <= room:
        first -= 1
    return first


class PieceRequest(TokenizedRequest, frozen=True):
    """The windows of a request's documents. `truncated` are indexes of pieces.

    `piece_tokens`: of each piece, its own tokens; the first that a window gives also has those of the window that no
    piece is given, so that their sum is what the model reads.
    """

    piece_tokens: tuple[int, ...] = ()

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The number of tokens that are read for each piece."""
        return self.piece_tokens


class _Read(NamedTuple):
    windows: list[Ids]
    piece_tokens: list[int]
    truncated: list[int]


class DocumentReading:
    """Tokenises the documents of one request.

    Args:
        tokenizer: the model's.
        pieces: of all documents, one document after the other.
        counts: how many pieces each document has.
        template: put around each document.
        truncate: what becomes of a piece that is longer than a window.

    Attributes:
        num_chars: characters of all documents with their prompts.
        rows: the pieces.

    Raises:
        InvalidValue: a document is too long.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: Sequence[str],
        counts: Sequence[int],
        template: PromptTemplate,
        truncate: Truncate,
    ) -> None:
        self._tokenizer = tokenizer
        self.rows = pieces
        self._starts = [0, *accumulate(counts)]
        self._template = template
        self._truncate = truncate
        self._documents: list[_Read] = [_Read([], [], [])] * len(counts)
        self._prompt_tokens = 0
        self.num_chars = template.num_chars * len(counts) + sum(map(len, pieces))
        for number in range(len(counts)):
            self._check_size(number)

    def plan_steps(self) -> list[Step]:
        """Returns one step for each document; is itself the first step."""
        self._prompt_tokens = self._tokenizer.count_prompt(self._template.before, self._truncate)
        return [partial(self._read_one, number) for number in range(len(self._documents))]

    def run_all(self) -> PieceRequest:
        """Runs all steps and returns the result."""
        run_steps(self.plan_steps)
        return self.result()

    def result(self) -> PieceRequest:
        """Returns all windows; call it when all steps have run."""
        read = self._documents
        return PieceRequest(
            ids=tuple(chain.from_iterable(each.windows for each in read)),
            truncated=tuple(chain.from_iterable(each.truncated for each in read)),
            piece_tokens=tuple(chain.from_iterable(each.piece_tokens for each in read)),
        )

    def _check_size(self, number: int) -> None:
        first, end = self._starts[number], self._starts[number + 1]
        num_chars = self._template.num_chars + sum(map(len, self.rows[first:end]))
        if num_chars > MAX_DOCUMENT_CHARS:
            raise InvalidValue(
                f"the document of input[{first}] to input[{end - 1}] has {num_chars} characters, and one that is "
                f"embedded as a whole may have {MAX_DOCUMENT_CHARS}: send it as several documents",
                param="input",
            )

    def _read_one(self, number: int) -> list[Step]:
        first, end = self._starts[number], self._starts[number + 1]
        pieces, limits = self.rows[first:end], self._tokenizer.limits
        ids, owners = self._owned_tokens(pieces)
        before, behind = ids[owners < 0], ids[owners == len(pieces)]
        capacity = limits.max_text_tokens - len(before) - len(behind)
        if capacity < 1:
            raise InvalidValue(
                f"the prompt has {len(before) + len(behind)} tokens, and this model reads {limits.max_text_tokens}: "
                "shorten it",
                param="input",
            )
        tokens = [ids[owners == piece] for piece in range(len(pieces))]
        truncated = self._cut(tokens, capacity, first)
        head = np.concatenate([np.array(limits.prefix, np.int64), before])
        tail = np.concatenate([behind, np.array(limits.suffix, np.int64)])
        plan = plan_windows([len(each) for each in tokens], capacity)
        windows = [self._lay_out(tokens, window, head, tail) for window in plan]
        counts = list(chain.from_iterable(map(_piece_tokens, windows)))
        self._documents[number] = _Read(windows, counts, truncated)
        return []

    def _owned_tokens(self, pieces: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Returns the ids of a document, without special tokens, and the piece that each belongs to: the one that its
        last character is in. Those of the prompt are -1 and, behind the document, the number of pieces."""
        text = self._template.apply("".join(pieces))
        encoding = self._encode(text)
        ids = np.array(encoding.ids, np.int64)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        bounds = np.cumsum([len(self._template.before), *map(len, pieces)])
        last = np.maximum.accumulate(np.maximum(places[:, 1] - 1, places[:, 0]))
        return ids, np.searchsorted(bounds, last, side="right") - 1

    def _encode(self, text: str) -> Any:
        backend: Any = self._tokenizer.backend  # the library's, which gives places besides ids
        try:
            return backend.encode(text, add_special_tokens=False)
        except BaseException:
            self._tokenizer.encode_bare([text])  # raises our errors, where the library cannot encode the text
            raise

    def _cut(self, tokens: list[Ids], capacity: int, first: int) -> list[int]:
        """Cuts pieces that have more tokens than a window; returns their indexes in the request.

        Raises:
            ContextLengthExceeded: a piece would be cut, and must not be.
            InvalidValue: a piece has no token of its own.
        """
        truncated = []
        for piece, own in enumerate(tokens):
            if not len(own):
                raise InvalidValue(
                    f"input[{first + piece}] has no token of its own in the document: leave it out, or join it with "
                    "the next one",
                    param="input",
                )
            if len(own) > capacity:
                if self._truncate == "error":
                    raise ContextLengthExceeded(
                        f"input[{first + piece}] has {len(own)} tokens, and one piece may have {capacity} of this "
                        f'model\'s {self._tokenizer.max_tokens}: split it, or send "truncate": "end"',
                        param="input",
                    )
                tokens[piece] = own[-capacity:] if self._truncate == "start" else own[:capacity]
                truncated.append(first + piece)
        limits = self._tokenizer.limits
        if limits.has_foreign_ids:
            checks = IdChecks(
                limits.prefix, limits.suffix, limits.max_tokens, limits.vocab_size, takes_empty=limits.takes_empty
            )
            for piece, own in enumerate(tokens):
                checks.check(first + piece, own)
        return truncated

    def _lay_out(self, tokens: Sequence[Ids], window: DocumentWindow, head: Ids, tail: Ids) -> Ids:
        """Returns the ids of a window with their marks.

        Tokens around the document are part of its first and its last piece, as they are of a text that is one piece;
        those around other windows, and a prompt that pooling leaves out, are part of none.
        """
        parts = [head, *tokens[window.first : window.end], tail]
        marks = [0, *range(window.first + 1, window.end + 1), 0]
        given = range(window.first_given + 1, window.end_given + 1)
        marks = [mark - window.first_given if mark in given else 0 for mark in marks]
        marks[0] = 1 if window.first == 0 == window.first_given else 0
        marks[-1] = len(given) if window.end == len(tokens) == window.end_given else 0
        row = np.repeat(np.array(marks, np.int64), [len(part) for part in parts])
        if window.first == 0:
            row[: self._prompt_tokens] = 0
            if marks[0] and not (row == 1).any():
                raise InvalidValue(
                    "the first piece of a document has no token beside the prompt, which pooling leaves out",
                    param="input",
                )
        return np.asarray(np.concatenate(parts) | (row << MARK_SHIFT), np.int64)


def _piece_tokens(window: Ids) -> list[int]:
    counts = np.bincount(window >> MARK_SHIFT)
    return [int(counts[0] + counts[1]), *map(int, counts[2:])]
