"""Tests the tokenizer: truncation on both sides, ids used verbatim, and huge texts that cost little."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lib import vocabularies
from benchmarks.lib.workloads import SENTENCES, text
from engines.errors import ContextLengthExceeded, InvalidTokenId, InvalidValue, UnsupportedModel
from engines.inputs import token_ids
from engines.inputs import tokenizer as clipping
from engines.inputs import tokenizer as tokenize
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import TokenizedRequest, Tokenizer, TokenizerBackend, TokenizerLimits, clips
from engines.spec import Truncate
from tests.testkit.counted_tokenizer import CountedTokenizer

BARE = PromptTemplate()


class Encoding:
    """A backend's result for one text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


class Letters:
    """A backend with an id for each letter; counts the characters that it encodes."""

    def __init__(self) -> None:
        self.handed: list[int] = []

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding:
        return self.encode_batch_fast([sequence], add_special_tokens=add_special_tokens)[0]

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> list[Encoding]:
        assert not add_special_tokens
        self.handed += [len(text) for text in input]
        return [Encoding([ord(letter) for letter in text]) for text in input]


class Calls(Letters):
    """Records the characters of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> list[Encoding]:
        self.calls.append(sum(map(len, input)))
        return super().encode_batch_fast(input, add_special_tokens=add_special_tokens)


def tokenizer(backend: TokenizerBackend | None = None, **rules: Any) -> Tokenizer:
    wanted = {"prefix": (1,), "suffix": (2,), "max_tokens": 8, "vocab_size": 200, **rules}
    return Tokenizer(backend or Letters(), TokenizerLimits(**wanted))


def letters(encoded: TokenizedRequest) -> list[str]:
    """Renders ids as text, special ones as `<` and `>`."""
    return ["".join({1: "<", 2: ">"}.get(id, chr(id)) for id in row.tolist()) for row in encoded.ids]


@pytest.mark.parametrize(
    ("truncate", "wanted"), [("end", ["<abc>", "<abcdef>", "<>"]), ("start", ["<abc>", "<efghij>", "<>"])]
)
def test_a_long_text_is_cut_between_its_special_tokens(truncate: Truncate, wanted: list[str]) -> None:
    encoded = tokenizer().encode(["abc", "abcdefghij", ""], BARE, truncate)

    assert letters(encoded) == wanted
    assert encoded.truncated == (1,)
    assert encoded.token_counts == (5, 8, 2)


def test_a_text_that_just_fits_is_not_cut() -> None:
    encoded = tokenizer().encode(["abcdef"], BARE, "error")

    assert (letters(encoded), encoded.truncated) == (["<abcdef>"], ())


def test_a_long_text_may_be_an_error_instead() -> None:
    with pytest.raises(
        ContextLengthExceeded, match=r"input\[1\] has at least 9 tokens, but this model's limit is 8"
    ) as caught:
        tokenizer().encode(["abc", "abcdefg"], BARE, "error")
    assert caught.value.param == "input"


def test_a_prompt_counts_as_text_and_can_be_cut_away() -> None:
    template = PromptTemplate("q: ", "!")

    assert letters(tokenizer().encode(["ab"], template, "end")) == ["<q: ab!>"]
    assert letters(tokenizer().encode(["abcdef"], template, "end")) == ["<q: abc>"]
    assert letters(tokenizer().encode(["abcdef"], template, "start")) == ["<bcdef!>"]


@pytest.mark.parametrize(
    ("suffix", "counts", "tokens"), [((2,), True, 4), ((), True, 4), ((2, 2), True, 5), ((2,), False, 0)]
)
def test_a_prompts_tokens_are_counted_where_pooling_asks(suffix: tuple[int, ...], counts: bool, tokens: int) -> None:
    template = PromptTemplate("q: ")
    asked = tokenizer(suffix=suffix, counts_prompt=counts)

    assert asked.encode(["ab"], template, "end").prompt_tokens == tokens
    assert asked.encode(["ab"], BARE, "end").prompt_tokens == 0


def test_nothing_is_stripped() -> None:
    assert letters(tokenizer().encode([" a\n"], PromptTemplate(" "), "end")) == ["<  a\n>"]


# Ids from the client.


def test_ids_are_taken_as_they_are() -> None:
    encoded = tokenizer().take_ids([[65, 66], [1, 65, 2], [199]], "end")

    assert [row.tolist() for row in encoded.ids] == [[65, 66], [1, 65, 2], [199]]
    assert encoded.truncated == ()


@pytest.mark.parametrize(
    ("row", "truncate", "wanted"),
    [
        ("<abcdefgh>", "end", "<abcdef>"),
        ("<abcdefgh>", "start", "<cdefgh>"),
        ("<abcdefgh", "end", "<abcdefg"),
        ("abcdefgh>", "end", "abcdefg>"),
        ("abcdefghij", "end", "abcdefgh"),
        ("abcdefghij", "start", "cdefghij"),
    ],
)
def test_too_many_ids_are_cut_and_keep_the_special_ones_that_they_have(
    row: str, truncate: Truncate, wanted: str
) -> None:
    ids = [{"<": 1, ">": 2}.get(letter, ord(letter)) for letter in row]
    encoded = tokenizer().take_ids([ids, [65]], truncate)

    assert letters(encoded)[0] == wanted
    assert encoded.truncated == (0,)


@given(lengths=st.lists(st.integers(0, 30), max_size=40))
def test_a_huge_request_is_handed_over_in_pieces_and_nothing_is_lost(lengths: list[int]) -> None:
    backend = Calls()
    texts = ["abcdefghij"[index % 10] * length for index, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "PIECE_CHARS", 40)
        patch.setattr(token_ids, "PIECE_CHARS", 40)
        encoded = tokenizer(backend, max_tokens=100).encode(texts, BARE, "end")

    assert letters(encoded) == [f"<{text}>" for text in texts]
    assert max(backend.calls, default=0) <= 40
    assert all(one + next_one > 40 for one, next_one in pairwise(backend.calls)), "no piece is smaller than need be"


def test_a_usual_request_is_one_call() -> None:
    backend = Calls()
    tokenizer(backend, max_tokens=600).encode(["a" * (500 - index) for index in range(100)], BARE, "end")

    assert len(backend.calls) == 1


def test_equal_texts_are_tokenised_once() -> None:
    backend = Calls()
    encoded = tokenizer(backend, max_tokens=600).encode(["a" * 500, "b" * 500] * 500, BARE, "end")

    assert sum(backend.calls) == 1000
    assert letters(encoded) == [f"<{'a' * 500}>", f"<{'b' * 500}>"] * 500


def test_too_many_ids_may_be_an_error() -> None:
    with pytest.raises(ContextLengthExceeded, match="at least 9 tokens"):
        tokenizer().take_ids([[65] * 9], "error")


@pytest.mark.parametrize("bad", [-1, 200, 100_257, 2**63, -(2**70)])
def test_ids_of_another_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(InvalidTokenId, match=rf"input\[1\] holds token id {bad}, but this model's ids are 0 to 199"):
        tokenizer().take_ids([[65], [65, bad]], "end")


def test_a_text_may_have_ids_that_only_the_tokenizer_has() -> None:
    with pytest.raises(InvalidTokenId, match=r"input\[0\] holds token id 228"):
        tokenizer(has_foreign_ids=True).encode(["ä"], BARE, "end")


@pytest.mark.parametrize("takes_empty", [True, False])
def test_a_text_without_any_token_is_refused_unless_the_model_has_a_vector_for_it(takes_empty: bool) -> None:
    bare = tokenizer(prefix=(), suffix=(), takes_empty=takes_empty)
    if takes_empty:
        assert bare.encode([""], BARE, "end").token_counts == (0,)
        assert bare.take_ids([[]], "end").token_counts == (0,)
        return

    with pytest.raises(InvalidValue, match=r"input\[1\] has no tokens"):
        bare.encode(["a", ""], BARE, "end")
    with pytest.raises(InvalidValue, match=r"input\[0\] has no tokens"):
        bare.take_ids([[]], "end")


def test_a_limit_must_leave_room() -> None:
    with pytest.raises(UnsupportedModel, match="max_tokens is 2, but 2 of these are special tokens: raise"):
        tokenizer(max_tokens=2)
    assert tokenizer().limited_to(3).max_tokens == 3


# Huge texts.

FAMILIES: list[Callable[[], Any]] = [
    vocabularies.bert, vocabularies.roberta, vocabularies.xlm_roberta, vocabularies.qwen, vocabularies.llama,
    vocabularies.gemma,
]  # fmt: skip

_ODDITIES = (
    "word ", "a", "ab", "   ", "\n", "\n\n", "，我们", "1234567", "。", " ", "<s>", "[SEP]", "ﬁ", "é", "\u200d",
    "don't ",
    "x" * 130, "_", "-", "!?", "你好", "🚀", "\t", "thethe ", "'s", "00",
)  # fmt: skip
_runs = st.tuples(st.sampled_from([*SENTENCES, *_ODDITIES]), st.integers(1, 60))
_long = st.lists(_runs, min_size=1, max_size=12).map(lambda runs: "".join(piece * times for piece, times in runs))


def _families(name: Callable[[], Any]) -> str:
    return name.__name__


@pytest.mark.parametrize("family", FAMILIES, ids=_families)
@pytest.mark.parametrize("truncate", ["end", "start"])
@settings(max_examples=20, deadline=None)
@given(text=_long)
def test_a_cap_on_characters_never_shows(family: Callable[[], Any], truncate: Truncate, text: str) -> None:
    """With a limit of four tokens of two characters each, a text of a thousand characters counts as huge."""
    owner = family()
    bare = owner.backend_tokenizer.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "_CHARS_PER_TOKEN", 2)
        capped = Tokenizer(owner.backend_tokenizer, TokenizerLimits(max_tokens=4, vocab_size=10**6, takes_empty=True))
        ids = capped.encode([text], BARE, truncate).ids[0].tolist()

    assert ids == (bare[-4:] if truncate == "start" else bare[:4])


@pytest.mark.parametrize("family", FAMILIES, ids=_families)
@pytest.mark.parametrize("truncate", ["end", "start", "error"])
@pytest.mark.parametrize("kind", ["words", "chinese"])
def test_ten_megabytes_cost_what_is_kept_of_them(family: Callable[[], Any], truncate: Truncate, kind: str) -> None:
    once = text(2000, 5) + " " if kind == "words" else "".join(SENTENCES[14:16])
    huge = once * (10_000_000 // len(once))
    backend = CountedTokenizer(family().backend_tokenizer)
    capped = Tokenizer(backend, TokenizerLimits(max_tokens=512, vocab_size=10**6))
    if truncate == "error":
        with pytest.raises(ContextLengthExceeded):
            capped.encode([huge], BARE, truncate)
    else:
        assert capped.encode([huge], BARE, truncate).token_counts == (512,)

    assert backend.characters < 30_000


@pytest.mark.parametrize("letter", ["a", "ab", "0123456789"])
def test_ten_megabytes_without_a_word_are_cut_at_the_end_and_refused_at_the_start(letter: str) -> None:
    huge = letter * (10_000_000 // len(letter))
    backend = CountedTokenizer(vocabularies.qwen().backend_tokenizer)
    capped = Tokenizer(backend, TokenizerLimits(max_tokens=512, vocab_size=10**6))
    shorter = vocabularies.qwen().backend_tokenizer.encode(huge[:20_000], add_special_tokens=False).ids

    assert capped.encode([huge], BARE, "end").ids[0].tolist() == shorter[:512]
    assert backend.characters < 30_000
    with pytest.raises(InvalidValue, match=r"input\[0\] has 10000000 characters, and its last 262144 do not determine"):
        capped.encode([huge], BARE, "start")


def test_a_long_text_of_few_tokens_is_read_to_its_end() -> None:
    """A text of one unknown word of 100,000 letters, which is one token, and further words."""
    owner = vocabularies.bert()
    whole = "x" * 100_000 + " " + " ".join(SENTENCES[:3])
    capped = Tokenizer(owner.backend_tokenizer, TokenizerLimits(max_tokens=20, vocab_size=10**6))

    assert (
        capped.encode([whole], BARE, "end").ids[0].tolist()
        == owner.backend_tokenizer.encode(whole, add_special_tokens=False).ids[:20]
    )


def test_short_texts_are_handed_over_once_and_together() -> None:
    backend = Letters()
    tokenizer(backend, max_tokens=64).encode(["abc", "de", "f" * 400], BARE, "end")

    assert backend.handed == [3, 2, 400]


def test_long_texts_keep_their_places_among_short_ones() -> None:
    huge = " ".join(["word"] * 5000)
    encoded = tokenizer(max_tokens=8).encode(["a", huge, "b", huge[5:] + "!", "c"], BARE, "start")

    assert letters(encoded) == ["<a>", "<d word>", "<b>", "< word!>", "<c>"]
    assert encoded.truncated == (1, 3)


# Clip positions.


@given(words=st.lists(st.text("ab", min_size=1, max_size=9), min_size=60, max_size=200), cap=st.integers(20, 50))
def test_clips_end_between_two_words(words: list[str], cap: int) -> None:
    text = " ".join(words)
    pair = clips(text, cap, keep_end=False)
    if len(text) <= 2 * cap:
        assert pair is None
    elif pair is not None:
        assert all(text.startswith(clip) for clip in pair)
        assert all(cap <= len(clip) <= 2 * cap for clip in pair)
        assert len(pair[1]) > len(pair[0])


@given(words=st.lists(st.text("ab", min_size=1, max_size=9), min_size=60, max_size=200), cap=st.integers(20, 50))
def test_clips_of_the_end_begin_between_two_words(words: list[str], cap: int) -> None:
    text = " ".join(words)
    pair = clips(text, cap, keep_end=True)
    if pair is not None:
        assert all(text.endswith(clip) and clip[0] == " " for clip in pair)
        assert all(cap <= len(clip) <= 2 * cap for clip in pair)


def test_text_without_words_is_clipped_anywhere_on_the_right_and_nowhere_on_the_left() -> None:
    assert clips("a" * 1000, 100, keep_end=False) == ("a" * 100, "a" * 101)
    assert clips("a" * 1000, 100, keep_end=True) is None


def test_chinese_is_clipped_in_front_of_a_mark() -> None:
    pair = clips("今天天气很好，我们出去。" * 40, 100, keep_end=False)

    assert pair is not None
    assert all(clip.endswith(("好", "去")) for clip in pair)
    assert np.all(np.diff([len(clip) for clip in pair]) > 0)


# Ids of another tokenizer.


def _ids(row: str) -> list[int]:
    return [{"<": 1, ">": 2}.get(letter, ord(letter)) for letter in row]


@pytest.mark.parametrize(
    ("prefix", "suffix", "row"),
    [
        ((1,), (2,), "<ab>"),
        ((1,), (2,), "<>"),
        ((), (2,), "ab>"),
        ((1,), (), "<ab"),
        ((), (), "ab"),
        ((1, 1), (2,), "<<>"),
    ],
)
def test_a_row_with_the_models_special_tokens_is_taken(
    prefix: tuple[int, ...], suffix: tuple[int, ...], row: str
) -> None:
    encoded = tokenizer(prefix=prefix, suffix=suffix).take_ids([_ids(row)], "end", must_be_framed=True)

    assert encoded.ids[0].tolist() == _ids(row)


@pytest.mark.parametrize(
    ("prefix", "suffix", "row", "frame"),
    [
        ((1,), (2,), "ab", r"begin with \[1\] and end with \[2\]"),
        ((1,), (2,), "<ab", r"begin with \[1\] and end with \[2\]"),
        ((1,), (1,), "<", r"begin with \[1\] and end with \[1\]"),
        ((), (2,), "ab", r"end with \[2\]"),
        ((1,), (), "ab>", r"begin with \[1\]"),
    ],
)
def test_a_row_without_them_is_refused_with_the_cure(
    prefix: tuple[int, ...], suffix: tuple[int, ...], row: str, frame: str
) -> None:
    good = [*prefix, 65, *suffix]
    with pytest.raises(InvalidTokenId, match=rf"input\[1\] .* do not {frame}, .*check_embedding_ctx_length=False"):
        tokenizer(prefix=prefix, suffix=suffix).take_ids([good, _ids(row)], "end", must_be_framed=True)


def test_a_row_of_many_ids_is_checked_to_its_end() -> None:
    row = [65] * 200_000
    assert tokenizer().take_ids([row], "end").truncated == (0,)
    with pytest.raises(InvalidTokenId, match="token id 200,"):
        tokenizer().take_ids([[*row, 200]], "end")
