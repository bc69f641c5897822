"""Documents in pieces: which tokens belong to a piece, and the windows that the model reads."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from engines.errors import ContextLengthExceeded, InvalidValue
from engines.inputs.documents import (
    MARK_SHIFT,
    MAX_DOCUMENT_CHARS,
    DocumentReading,
    DocumentWindow,
    PieceRequest,
    plan_windows,
)
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import ID_MASK
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.spec import Truncate

WORDS = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "ab", "."]
CLS, SEP = 1, 2


def _read(
    pieces: Sequence[str],
    counts: Sequence[int] = (),
    *,
    max_tokens: int = 12,
    prompt: str = "",
    truncate: Truncate = "end",
    counts_prompt: bool = False,
) -> PieceRequest:
    backend = FastTokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = Whitespace()
    limits = TokenizerLimits(
        prefix=(CLS,), suffix=(SEP,), max_tokens=max_tokens, vocab_size=len(WORDS), counts_prompt=counts_prompt
    )
    template = PromptTemplate(prompt)
    reading = DocumentReading(Tokenizer(backend, limits), pieces, counts or [len(pieces)], template, truncate)
    return reading.run_all()


def _shown(request: PieceRequest) -> list[list[str]]:
    """Show each window as the words of `[no piece, piece 1, piece 2, ...]`."""
    shown = []
    for window in request.ids:
        marks, ids = window >> MARK_SHIFT, window & ID_MASK
        shown.append([" ".join(WORDS[token] for token in ids[marks == mark]) for mark in range(marks.max() + 1)])
    return shown


def test_the_tokens_around_a_document_belong_to_its_first_and_last_piece() -> None:
    request = _read(["a b ", "c ", "d"])

    assert _shown(request) == [["", "[CLS] a b", "c", "d [SEP]"]]
    assert request.token_counts == (3, 1, 2)


def test_a_document_of_one_piece_is_read_as_a_text() -> None:
    assert _shown(_read(["a b"])) == [["", "[CLS] a b [SEP]"]]


def test_a_prompt_belongs_to_the_first_piece_unless_pooling_leaves_it_out() -> None:
    assert _shown(_read(["a ", "b"], prompt="x y ")) == [["", "[CLS] x y a", "b [SEP]"]]
    assert _shown(_read(["a ", "b"], prompt="x y ", counts_prompt=True)) == [["[CLS] x y", "a", "b [SEP]"]]


def test_a_token_belongs_to_the_piece_of_its_last_character() -> None:
    assert _shown(_read(["c a", "b d"])) == [["", "[CLS] c", "ab d [SEP]"]]


def test_documents_have_windows_of_their_own() -> None:
    request = _read(["a ", "b", "c"], [2, 1])

    assert _shown(request) == [["", "[CLS] a", "b [SEP]"], ["", "[CLS] c [SEP]"]]
    assert request.token_counts == (2, 2, 3)


def test_a_long_document_is_read_in_windows_that_overlap() -> None:
    pieces = [f"{letter} " for letter in "abcdefghij"]
    request = _read(pieces, max_tokens=8)

    assert _shown(request) == [
        ["f [SEP]", "[CLS] a", "b", "c", "d", "e"],
        ["[CLS] d e i [SEP]", "f", "g", "h"],
        ["[CLS] g h", "i", "j [SEP]"],
    ]
    assert sum(request.token_counts) == sum(map(len, request.ids))


def test_every_window_has_the_prompt_in_front() -> None:
    request = _read([f"{letter} " for letter in "abcde"], max_tokens=6, prompt="x ")

    assert [WORDS[window[1] & ID_MASK] for window in request.ids] == ["x"] * len(request.ids)
    assert all(len(window) <= 6 for window in request.ids)


@pytest.mark.parametrize(("side", "kept"), [("end", "[CLS] a b c"), ("start", "[CLS] c d e")])
def test_a_piece_longer_than_a_window_is_cut_and_reported(side: Truncate, kept: str) -> None:
    request = _read(["a b c d e ", "f"], max_tokens=5, truncate=side)

    assert _shown(request)[0][1] == kept
    assert request.truncated == (0,)


def test_a_piece_longer_than_a_window_is_refused_where_nothing_may_be_cut() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 5 tokens, and one piece may have 3 "):
        _read(["f ", "a b c d e"], max_tokens=5, truncate="error")


def test_a_piece_without_a_token_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"input\[1\] has no token of its own"):
        _read(["a", "  ", "b"])


def test_a_first_piece_that_only_repeats_the_prompt_is_refused() -> None:
    with pytest.raises(InvalidValue, match="beside the prompt"):
        _read(["b ", "c"], prompt="a", counts_prompt=True)


def test_a_document_that_is_too_long_is_refused_before_it_is_tokenised() -> None:
    with pytest.raises(InvalidValue, match=rf"has {MAX_DOCUMENT_CHARS + 1} characters"):
        _read(["a" * MAX_DOCUMENT_CHARS, "b"])


def test_a_prompt_that_fills_the_model_is_refused() -> None:
    with pytest.raises(InvalidValue, match="the prompt has 3 tokens"):
        _read(["a"], max_tokens=5, prompt="x y z ")


def _slow_plan(counts: Sequence[int], capacity: int) -> list[DocumentWindow]:
    """The definition of docs/api.md, without any shortcut."""
    spans: list[tuple[int, int]] = []
    end = 0
    while end < len(counts):
        firsts = [
            first
            for first in range(end + 1)
            if (spans or first == 0)
            and sum(counts[first:end]) <= (capacity // 2 if spans else 0)
            and sum(counts[first : end + 1]) <= capacity
        ]
        first = min(firsts)
        end = max(last for last in range(end + 1, len(counts) + 1) if sum(counts[first:last]) <= capacity)
        spans.append((first, end))
    given: dict[int, list[int]] = {}
    for piece in range(len(counts)):
        contexts = {}
        for number, (first, end) in enumerate(spans):
            if first <= piece < end:
                before = sum(counts[first:piece]) if first else float("inf")
                behind = sum(counts[piece + 1 : end]) if end < len(counts) else float("inf")
                contexts[number] = min(before, behind)
        given.setdefault(max(contexts, key=lambda number: (contexts[number], -number)), []).append(piece)
    return [DocumentWindow(*spans[number], own[0], own[-1] + 1) for number, own in sorted(given.items())]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 30))
def test_windows_are_as_defined_and_give_each_piece_once_in_order(counts: list[int], capacity: int) -> None:
    plan = plan_windows(counts, capacity)

    assert plan == _slow_plan(counts, capacity)
    assert [piece for window in plan for piece in range(window.first_given, window.end_given)] == [*range(len(counts))]
    for window in plan:
        assert sum(counts[window.first : window.end]) <= capacity
        assert window.first <= window.first_given < window.end_given <= window.end


def test_two_thousand_pieces_are_planned_at_once() -> None:
    counts = np.random.default_rng(0).integers(1, 400, 2048).tolist()

    plan = plan_windows(counts, 510)

    assert sum(sum(counts[window.first : window.end]) for window in plan) < 2.5 * sum(counts)
