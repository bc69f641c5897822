"""Tests pairs: cut as the tokenizers library cuts them, queries read once, huge texts, errors that name a field."""

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from engines.errors import ContextLengthExceeded, InvalidRequest, InvalidValue
from engines.inputs.pairs import Cut, PairFrame, PairTokenizer, Wording, longest_first
from engines.inputs.prompts import PromptTemplate
from engines.inputs.token_ids import ID_MASK, TYPE_SHIFT, Step
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits

MAX = 20
FRAME = PairFrame(prefix=(1,), middle=(2,), suffix=(3 | 1 << TYPE_SHIFT,), text_type=1)
REFERENCE = Cut("end", only_text=False)


class Letters:
    """A backend with an id for each letter; counts the characters that it encodes."""

    def __init__(self) -> None:
        self.num_chars = 0

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Any:
        return self.encode_batch_fast([sequence], add_special_tokens=add_special_tokens)[0]

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        self.num_chars += sum(map(len, input))
        return [SimpleNamespace(ids=[ord(letter) for letter in text.encode().decode()]) for text in input]


def pairs(backend: Any = None, wording: Wording | None = None, **options: Any) -> PairTokenizer:
    backend = backend or Letters()
    limits = TokenizerLimits(prefix=(1,), suffix=(3,), max_tokens=MAX, vocab_size=1 << 21)
    bare = TokenizerLimits(max_tokens=MAX + 1, vocab_size=1 << 21, takes_empty=True)
    return PairTokenizer(Tokenizer(backend, limits), Tokenizer(backend, bare), FRAME, wording or Wording(), **options)


def spelt(ids: Any) -> str:
    return "".join("^|$"[token - 1] if token < 4 else chr(token) for token in ids & ID_MASK)


def test_the_texts_stand_between_the_special_tokens_with_their_types() -> None:
    (ids,) = pairs().encode(["query"], ["text"]).ids

    assert spelt(ids) == "^query|text$"
    assert (ids >> TYPE_SHIFT).tolist() == [0] * 7 + [1] * 5


def test_one_query_stands_before_all_texts_and_is_read_once() -> None:
    backend = Letters()

    found = pairs(backend).encode(["q" * 9], [f"text {number}" for number in range(50)])

    assert [spelt(ids) for ids in found.ids[:2]] == ["^qqqqqqqqq|text 0$", "^qqqqqqqqq|text 1$"]
    assert backend.num_chars == 9 + sum(len(f"text {number}") for number in range(50))


def test_each_text_may_have_a_query_of_its_own() -> None:
    found = pairs().encode(["a", "b"], ["c", "d"])

    assert [spelt(ids) for ids in found.ids] == ["^a|c$", "^b|d$"]


def test_single_texts_have_no_middle() -> None:
    assert [spelt(ids) for ids in pairs().encode([], ["a", "bc"]).ids] == ["^a$", "^bc$"]


@given(first=st.integers(0, 40), second=st.integers(0, 40), room=st.integers(1, 40))
def test_longest_first_keeps_what_the_tokenizers_library_keeps(first: int, second: int, room: int) -> None:
    library = FastTokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.enable_truncation(room, strategy="longest_first")

    ids = library.encode("a " * first, "b " * second).ids

    assert longest_first(first, second, room) == (ids.count(0), ids.count(1))


@pytest.mark.parametrize("side", ["end", "start"])
@given(first=st.integers(0, 60), second=st.integers(0, 60))
def test_long_pairs_are_cut_like_those_of_the_library(side: Any, first: int, second: int) -> None:
    """Also where both are longer than a pair, of which no more is read than that."""
    room = MAX - FRAME.num_tokens
    query, text = "".join(chr(100 + at) for at in range(first)), "".join(chr(200 + at) for at in range(second))

    found = pairs().encode([query], [text], Cut(side, only_text=False))

    kept = longest_first(first, second, room)
    cut = [
        part[len(part) - size :] if side == "start" else part[:size]
        for part, size in zip((query, text), kept, strict=True)
    ]
    assert spelt(found.ids[0]) == f"^{cut[0]}|{cut[1]}$"
    assert found.truncated == ((0,) if first + second > room else ())


@pytest.mark.parametrize(("side", "kept"), [("end", "abcdefgh"), ("start", "stuvwxyz")])
def test_a_call_that_names_a_side_cuts_documents_only(side: Any, kept: str) -> None:
    found = pairs().encode(["q" * 9], ["abcdefghijklmnopqrstuvwxyz", "short"], Cut(side, only_text=True))

    assert [spelt(ids) for ids in found.ids] == [f"^qqqqqqqqq|{kept}$", "^qqqqqqqqq|short$"]
    assert found.truncated == (0,)


def test_a_document_has_as_many_tokens_as_the_call_allows() -> None:
    found = pairs().encode(["q"], ["abcdef", "ab"], Cut("end", only_text=False, max_text_tokens=3))

    assert [spelt(ids) for ids in found.ids] == ["^q|abc$", "^q|ab$"]
    assert found.truncated == (0,)


def test_a_template_keeps_its_own_tokens_at_either_side() -> None:
    wording = Wording(query=PromptTemplate("Q:", "\n"), text="D:", kept_ids=(ord("D"), ord(":")), cuts_text_only=True)
    template = pairs(wording=wording, takes_single=False)

    cuts = [Cut(side, only_text=True, max_text_tokens=most) for side in ("end", "start") for most in (None, 2)]
    found = [spelt(template.encode(["why"], ["abcdefghijklmnop"], cut).ids[0]) for cut in cuts]

    assert found == [f"^Q:why\n|D:{part}$" for part in ("abcdefghi", "ab", "hijklmnop", "op")]


def test_an_instruction_replaces_the_default_one() -> None:
    wording = Wording(query=PromptTemplate("I:default Q:", ""), instructed=("I:", " Q:"), cuts_text_only=True)
    template = pairs(wording=wording)

    read = template.read(["w"], ["t"], REFERENCE, instruction="x")

    assert spelt(read.run_all().ids[0]) == "^I:x Q:w|t$"
    assert spelt(template.encode(["w"], ["t"]).ids[0]) == "^I:default Q:w|t$"


def test_without_a_place_for_it_an_instruction_is_refused() -> None:
    with pytest.raises(InvalidValue, match="does not support instruction") as error:
        pairs().read(["q"], ["t"], REFERENCE, instruction="x")
    assert error.value.param == "instruction"


def test_a_model_of_pairs_refuses_a_text_without_a_query() -> None:
    with pytest.raises(InvalidValue, match="send a query") as error:
        pairs(takes_single=False).read([], ["t"], REFERENCE)
    assert error.value.param == "query"


@pytest.mark.parametrize(
    ("queries", "texts", "cut", "message", "param"),
    [
        (["q"], ["a", "b" * 30], Cut("error", only_text=False), r"documents\[1\] and its query have at", "documents"),
        ([], ["a", "b" * 30], Cut("error", only_text=False), r"input\[1\] has at least 23", "input"),
        (["q" * 30], ["a", "b"], Cut("end", only_text=True), r"the query of documents\[0\] has at least", "query"),
        (["\ud800"], ["a"], REFERENCE, "lone surrogate", "query"),
        (["q"], ["a", "\ud800"], REFERENCE, "lone surrogate", "documents"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_its_field(
    queries: list[str], texts: list[str], cut: Cut, message: str, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        pairs().encode(queries, texts, cut)
    assert error.value.param == param


def test_too_long_is_a_context_length_error_with_both_numbers() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"at least 24 tokens, but this model's limit is 20"):
        pairs().encode(["q" * 10], ["t" * 11], Cut("error", only_text=True))


@pytest.mark.parametrize("side", ["end", "start"])
def test_eight_megabytes_cost_what_is_kept_of_them(side: Any) -> None:
    backend = Letters()
    huge = "word " * 1_600_000

    found = pairs(backend).encode([huge], [huge, "x"], Cut(side, only_text=False))

    assert backend.num_chars < 100_000
    assert [len(ids) for ids in found.ids] == [MAX, MAX]


def test_the_dropped_token_is_left_out_at_the_end_only() -> None:
    found = pairs(dropped_id=ord("p")).tokenizer

    assert found.max_tokens == MAX
    frame = PairFrame(suffix=(ord("p"),))
    limits = TokenizerLimits(max_tokens=MAX, vocab_size=1 << 21, takes_empty=True)
    bare = Tokenizer(Letters(), limits)
    read = PairTokenizer(bare, bare, frame, Wording(), dropped_id=ord("p")).encode(["p"], ["app", "pp"])
    assert [spelt(ids) for ids in read.ids] == ["pa", "p"]


def test_steps_may_run_in_any_order() -> None:
    texts = [f"{number} " * 4 for number in range(5000)]
    reading = pairs().read(["query"], texts, REFERENCE)
    assert reading.num_chars > 65_536
    waiting: deque[Step] = deque(reading.plan_steps())
    assert len(waiting) > 2
    while waiting:
        waiting.extendleft(waiting.pop()())

    assert [ids.tolist() for ids in reading.result().ids] == [
        ids.tolist() for ids in pairs().encode(["query"], texts).ids
    ]
