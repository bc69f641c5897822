"""Tests the words for values of a wrong type or beyond a bound, with msgspec's own messages."""

from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

from router.api.value_words import describe_mismatch

Width = Annotated[int, Meta(ge=1, le=9)]


@pytest.mark.parametrize(
    ("annotation", "value", "sentence"),
    [
        (Width | None, "7", "it is a string, but must be an integer of 1 or more"),
        (Width | None, 1.5, "it is a decimal number, but must be an integer of 1 or more"),
        (Width | None, 0, "it must be an integer of 1 or more"),
        (Width | None, 10, "it must be an integer of at most 9"),
        (float | int | None, [], "it is a list, but must be a number"),
        (bool, None, "it is null, but must be true or false"),
        (str | list[Width], {}, "it is an object, but must be a string or a list"),
        (dict[str, int], "a", "it is a string, but must be an object"),
        (Annotated[str, Meta(max_length=2)], "abc", "it must have at most 2 characters"),
        (Annotated[list[int], Meta(min_length=1)], [], "it must have at least 1 item"),
        (Annotated[float, Meta(gt=0)], 0.0, "it must be a number above 0.0"),
        (Annotated[str, Meta(pattern="^a")], "b", "it: Expected `str` matching regex '^a'"),
    ],
)
def test_a_wrong_value_is_described(annotation: Any, value: object, sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(msgspec.json.encode(value), type=annotation)

    assert describe_mismatch(str(caught.value), "it", annotation) == sentence
