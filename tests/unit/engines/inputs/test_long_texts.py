"""Tests long and odd texts: tokens kept from a part equal those kept from the whole, at a bounded cost."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as FastTokenizer

from benchmarks.lib import vocabularies
from engines.errors import ContextLengthExceeded, InvalidValue
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.spec import Truncate
from tests.testkit.counted_tokenizer import CountedTokenizer

BARE = PromptTemplate()
FAMILIES: list[Callable[[], Any]] = [
    vocabularies.bert, vocabularies.roberta, vocabularies.xlm_roberta, vocabularies.qwen, vocabularies.llama,
    vocabularies.gemma,
]  # fmt: skip
ODDITIES = (
    "x", "ab", "0123456789", "🚀", "👩\u200d👩\u200d👧\u200d👦", "e\u0301", "\u0301", "\u0323", "\x00", "\x07",
    "\u200b", "\u200d", "我们", "。", "한", "\u1112\u1161\u11ab", " ", "\n", "\t", "\u3000", "\xa0",
    "word ", "don't ", "[SEP]", "<s>", "ﬁ", "İ", "ß", "ก็ ", "अनुच्छेद ", "العربية ",
    "\ufeff", "\U0001f1e9\U0001f1ea", "_", "-", "1 ", "a.b.", "The quick brown fox ", "\ufdfa", "\u2028",
)  # fmt: skip


def counted(family: Callable[[], Any], max_tokens: int = 512) -> tuple[CountedTokenizer, Tokenizer]:
    backend = CountedTokenizer(family().backend_tokenizer)
    return backend, Tokenizer(backend, TokenizerLimits(max_tokens=max_tokens, vocab_size=10**6))


def odd_text(chance: random.Random) -> str:
    """Generates up to 30,000 characters: runs of one oddity, mixtures, and arbitrary characters."""
    parts = []
    for _ in range(chance.randint(1, 6)):
        kind = chance.random()
        if kind < 0.55:
            parts.append(chance.choice(ODDITIES) * chance.choice([1, 3, 30, 300, 1200, 2500]))
        elif kind < 0.8:
            parts.append("".join(chance.choice(ODDITIES) for _ in range(chance.randint(1, 400))))
        else:
            ranges = [(1, 0x2FF), (0x300, 0x36F), (0x400, 0x2FFF), (0x4E00, 0x9FFF), (0x10000, 0x1FFFF)]
            parts.append("".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.randint(1, 300))))
    return "".join(parts)[:30_000]


def kept(whole: list[int], num: int, truncate: Truncate) -> list[int]:
    return whole[-num:] if truncate == "start" else whole[:num]


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_odd_texts_keep_the_tokens_of_the_whole_text_prompt_and_all(
    family: Callable[[], Any], truncate: Truncate
) -> None:
    chance = random.Random(f"{family.__name__} {truncate}")
    backend = family().backend_tokenizer
    for _ in range(60):
        text, num = odd_text(chance), chance.choice([1, 4, 30])
        template = PromptTemplate(
            odd_text(chance)[: chance.choice([0, 5, 3000])], odd_text(chance)[: chance.choice([0, 5, 3000])]
        )
        whole = backend.encode(template.apply(text), add_special_tokens=False).ids
        rules = TokenizerLimits(max_tokens=num, vocab_size=10**6, takes_empty=True)

        encoded = Tokenizer(backend, rules).encode([text, text], template, truncate)

        assert [ids.tolist() for ids in encoded.ids] == [kept(whole, num, truncate)] * 2
        assert encoded.truncated == ((0, 1) if len(whole) > num else ())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_text_alone_has_the_tokens_that_it_has_in_a_batch(family: Callable[[], Any]) -> None:
    chance = random.Random(family.__name__)
    _, tokenizer = counted(family)
    for _ in range(100):
        text = odd_text(chance)[: chance.choice([1, 40, 1000, 1100])]

        assert tokenizer.encode_bare([text]) == tokenizer.encode_bare([text, "another"])[:1]


def test_a_mark_that_unicode_sorts_to_the_front_of_a_long_run_is_seen() -> None:
    """NFC sorts the marks on a letter by their class: the last of 20,000 comes first."""
    backend = vocabularies.qwen().backend_tokenizer
    text = "a" + "\u0301" * 20_000 + "\u0323"
    whole = backend.encode(text, add_special_tokens=False).ids

    assert (
        Tokenizer(backend, TokenizerLimits(max_tokens=4, vocab_size=10**6)).encode([text], BARE, "end").ids[0].tolist()
        == (whole[:4])
    )


def test_white_space_that_a_special_token_swallows_is_not_kept() -> None:
    """RoBERTa's `<mask>` absorbs the white space before it."""
    backend = FastTokenizer.from_str(vocabularies.roberta().backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<swallows>", lstrip=True, special=True)])
    text = "word" + " " * 20_000 + "<swallows> and words"
    whole = backend.encode(text, add_special_tokens=False).ids

    assert (
        Tokenizer(backend, TokenizerLimits(max_tokens=4, vocab_size=10**6)).encode([text], BARE, "end").ids[0].tolist()
        == (whole[:4])
    )


def test_a_word_is_seen_to_its_end_where_the_tokenizer_gives_up_on_long_ones_late() -> None:
    backend = FastTokenizer.from_str(vocabularies.bert().backend_tokenizer.to_str())
    assert isinstance(backend.model, models.WordPiece)
    backend.model.max_input_chars_per_word = 10_000
    text = "x" * 30_000 + " and words"
    rules = TokenizerLimits(max_tokens=4, vocab_size=10**6, max_word_chars=backend.model.max_input_chars_per_word)

    assert (
        Tokenizer(backend, rules).encode([text], BARE, "end").ids[0].tolist()
        == backend.encode(text, add_special_tokens=False).ids[:4]
    )


@pytest.mark.parametrize("truncate", ["end", "start", "error"])
@pytest.mark.parametrize("letter", ["x", " ", "\x00"])
def test_eight_megabytes_that_are_one_token_or_none_are_refused_and_not_read(letter: str, truncate: Truncate) -> None:
    backend, capped = counted(vocabularies.bert)
    with pytest.raises(
        InvalidValue, match=r"input\[1\] has 8000000 characters, and its (first|last) 262144 do not determine"
    ):
        capped.encode(["a text", letter * 8_000_000], BARE, truncate)

    assert backend.characters < 600_000


def test_a_long_word_of_less_than_the_limit_is_still_read() -> None:
    backend = vocabularies.bert().backend_tokenizer
    text = "x" * 200_000 + " and words"
    encoded = Tokenizer(backend, TokenizerLimits(max_tokens=512, vocab_size=10**6)).encode([text], BARE, "end")

    assert encoded.ids[0].tolist() == backend.encode(text, add_special_tokens=False).ids
    assert encoded.truncated == ()


def test_a_prompt_longer_than_the_model_reads_is_tokenised_once_for_all_inputs() -> None:
    backend, capped = counted(vocabularies.bert)
    prompt = "a prompt of words " * 10_000
    encoded = capped.encode([f"text {number}" for number in range(90)], PromptTemplate(prompt), "end")

    assert len(encoded.truncated) == 90
    assert len({ids.tobytes() for ids in encoded.ids}) == 1
    assert backend.characters < 60_000


def test_of_a_long_prompt_only_what_is_near_the_text_is_read_where_the_start_is_cut() -> None:
    backend, capped = counted(vocabularies.bert)
    prompt, texts = "a prompt of words " * 10_000, [f"the text {number}" for number in range(20)]
    encoded = capped.encode(texts, PromptTemplate(prompt), "start")
    whole = vocabularies.bert().backend_tokenizer.encode(prompt + texts[7], add_special_tokens=False).ids

    assert encoded.ids[7].tolist() == whole[-512:]
    assert backend.characters < 20 * 20_000


def test_a_refusal_of_a_long_text_tells_at_least_how_many_tokens_it_has() -> None:
    _, capped = counted(vocabularies.bert)
    with pytest.raises(
        ContextLengthExceeded, match=r"input\[0\] has at least \d{4} tokens, but this model's limit is 512"
    ):
        capped.encode(["a few words " * 100_000], BARE, "error")


def test_a_text_that_the_tokenizer_cannot_read_is_the_callers_fault() -> None:
    """A unigram model without an unknown token raises a bare exception."""
    backend = FastTokenizer(models.Unigram([("a", -1.0)], None, False))
    with pytest.raises(InvalidValue, match="tokenizer cannot encode this input"):
        Tokenizer(backend, TokenizerLimits(max_tokens=4, vocab_size=9)).encode(["b"], BARE, "end")
