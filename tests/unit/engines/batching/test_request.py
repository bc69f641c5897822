"""Tests that a call's own limit of tokens cuts inputs as the model's limit does."""

import pytest

from engines.batching.request import prepare_inputs
from engines.errors import ContextLengthExceeded, InvalidValue
from engines.inputs.tokenizer import Tokenizer
from engines.spec import ModelSpec
from engines.types import TextCall
from tests.unit.engines.inputs.test_tokenizer import letters
from tests.unit.engines.inputs.test_tokenizer import tokenizer as lettered

SPEC = ModelSpec(model_id="m", source="test")


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Reads 8 tokens, two of them special."""
    return lettered()


@pytest.mark.parametrize(
    ("max_tokens", "truncate", "kept", "cut"),
    [
        (5, None, ["<abc>", "<xy>"], (0,)),
        (5, "start", ["<efg>", "<xy>"], (0,)),
        (3, "end", ["<a>", "<x>"], (0, 1)),
        (8, None, ["<abcdef>", "<xy>"], (0,)),
        (9_999, None, ["<abcdef>", "<xy>"], (0,)),
        (None, None, ["<abcdef>", "<xy>"], (0,)),
    ],
)
def test_texts_are_cut_to_the_limit_of_the_call_but_never_beyond_the_models(
    tokenizer: Tokenizer, max_tokens: int | None, truncate: str | None, kept: list[str], cut: tuple[int, ...]
) -> None:
    call = TextCall(model_id="m", texts=("abcdefg", "xy"), max_tokens=max_tokens, truncate=truncate)  # type: ignore[arg-type]  # a word of the table
    encoded = prepare_inputs(call, tokenizer, SPEC, {}).run_all()

    assert (letters(encoded), encoded.truncated) == (kept, cut)


def test_token_ids_are_cut_to_the_limit_of_the_call(tokenizer: Tokenizer) -> None:
    call = TextCall(model_id="m", token_ids=((1, 97, 98, 99, 2),), max_tokens=4)
    encoded = prepare_inputs(call, tokenizer, SPEC, {}).run_all()

    assert (letters(encoded), encoded.truncated) == (["<ab>"], (0,))


def test_a_text_beyond_the_limit_of_the_call_may_be_an_error(tokenizer: Tokenizer) -> None:
    call = TextCall(model_id="m", texts=("abcd",), max_tokens=5, truncate="error")
    with pytest.raises(ContextLengthExceeded, match="this model's limit is 5"):
        prepare_inputs(call, tokenizer, SPEC, {}).run_all()


def test_a_limit_without_room_for_a_token_of_the_text_is_refused(tokenizer: Tokenizer) -> None:
    call = TextCall(model_id="m", texts=("a",), max_tokens=2)
    with pytest.raises(InvalidValue, match="2, and 2 of these are special tokens: send 3 or more") as caught:
        prepare_inputs(call, tokenizer, SPEC, {})
    assert caught.value.param == "truncate_prompt_tokens"
