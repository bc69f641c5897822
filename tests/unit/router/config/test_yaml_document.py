"""Tests hostile YAML: each case is reported as one sentence with a line, in every kind of file."""

from collections.abc import Callable

import pytest

from router.auth.key_file import parse_keys
from router.config.yaml_document import FileError, read_document
from router.registry.registry import parse_registry

NINE = ", ".join(["*{}"] * 9)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{NINE.format(*[before] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
"""Thirty lines that expand to 9¹¹ values."""
REPEATED = "- &m {a: 1, b: 2}\n" + "- *m\n" * 1000
ODD = {
    "aliases of aliases": (LAUGHS, "repeat more than 100000 values"),
    "brackets": ("[" * 3000, "nested more than 32 deep"),
    "brackets that close": ("[" * 3000 + "]" * 3000, "nested more than 32 deep"),
    "mappings": ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 32 deep"),
    "indents": ("\n".join(" " * depth + "a:" for depth in range(600)), "nested more than 32 deep"),
    "dashes": ("- " * 3000 + "a", "nested more than 32 deep"),
    "keys that are lists": ("? " * 3000 + "a", "nested more than 32 deep"),
    "a number of sixties": ("version: 1" + ":59" * 3000, "cannot be read"),
    "hexadecimal digits": ("version: 0x" + "f" * 5000, "cannot be read"),
    "digits": ("version: " + "9" * 5000, "cannot be read"),
    "half of a surrogate pair": ('version: "\\ud800"', "cannot be read"),
}


@pytest.mark.parametrize("parse", [parse_registry, parse_keys])
@pytest.mark.parametrize("case", ODD)
def test_odd_yaml_is_a_mistake_with_a_line(parse: Callable[[str], object], case: str) -> None:
    text, part = ODD[case]

    with pytest.raises(FileError) as caught:
        parse(text)
    (mistake, *_) = [mistake for mistake in map(str, caught.value.mistakes) if part in mistake]
    assert mistake.startswith("line ")
    assert len(mistake) < 200


def test_what_an_alias_repeats_is_read_as_it_was_written() -> None:
    document = read_document(REPEATED)

    assert document.value == [{"a": 1, "b": 2}] * 1001
    assert document.mistakes == ()


def test_what_is_deep_and_no_deeper_is_read() -> None:
    assert read_document("[" * 31 + "1" + "]" * 31).mistakes == ()
