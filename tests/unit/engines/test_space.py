"""Fingerprints of spaces: what changes them, what does not, and how two sets of ingredients differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engines.precision import FORM_VERSIONS
from engines.space import (
    MAX_LISTED_PROMPTS,
    MAX_LISTED_WIDTHS,
    MAX_SPACE_CHARS,
    Difference,
    Ingredients,
    Listed,
    VectorForm,
    differences,
    list_spaces,
    parts_of,
    settled,
    space_of,
    with_numeric,
)
from engines.spec import Matryoshka

MODEL = Ingredients({"weights": "ab" * 16, "config": "cd" * 16, "modules": "Transformer > Pooling", "numeric": "exact"})
UNIT = Ingredients({**MODEL.values, "modules": "Transformer > Pooling > Normalize", "truncation_side": "end"})
FORM = VectorForm(width=8, native_width=8)
INGREDIENTS = st.dictionaries(st.sampled_from("abcdefgh"), st.text(max_size=3)).map(Ingredients)


def test_a_fingerprint_is_the_same_in_every_process_and_release() -> None:
    """It is kept beside indexes: whoever changes what is hashed must change `VERSION` too."""
    assert space_of(MODEL, FORM) == "s1-8dc5ee6a1b1f-a4099a5dfbc70d56"


@pytest.mark.parametrize(
    "change",
    [
        {"width": 4},
        {"before": "query: "},
        {"behind": "</s>"},
        {"is_normalized": False},
        {"has_layer_norm": True, "width": 4},
        {"cut": "start"},
        {"max_tokens": 7},
        {"output": "sparse"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_request_adds_changes_the_fingerprint_and_only_the_last_part(change: dict[str, object]) -> None:
    plain = structs.replace(FORM, width=int(str(change.get("width", 8))))
    if set(change) == {"width"}:
        plain = FORM

    before = space_of(MODEL, plain)
    after = space_of(MODEL, structs.replace(plain, **change))

    assert before != after
    one, two = parts_of(before), parts_of(after)
    assert one is not None
    assert two is not None
    assert one[:2] == two[:2]
    assert one.request != two.request


def test_text_before_and_behind_are_told_apart() -> None:
    before = structs.replace(FORM, before="a", behind="b")

    assert space_of(MODEL, before) != space_of(MODEL, structs.replace(FORM, before="ab"))


@pytest.mark.parametrize("name", sorted(MODEL.values))
def test_each_ingredient_changes_the_fingerprint(name: str) -> None:
    other = Ingredients({**MODEL.values, name: "another"})

    assert space_of(other, FORM) != space_of(MODEL, FORM)
    one, two = parts_of(space_of(other, FORM)), parts_of(space_of(MODEL, FORM))
    assert one is not None
    assert two is not None
    assert (one.weights != two.weights, one.model != two.model) == (name == "weights", name != "weights")


def test_the_order_of_ingredients_does_not_matter() -> None:
    assert space_of(Ingredients(dict(reversed(MODEL.values.items()))), FORM) == space_of(MODEL, FORM)


def test_ingredients_of_one_kind_of_output_leave_the_others_alone() -> None:
    both = Ingredients({**MODEL.values, "sparse:weights": "x"})
    sparse = structs.replace(FORM, output="sparse")

    assert space_of(both, FORM) == space_of(MODEL, FORM)
    assert space_of(both, sparse) != space_of(MODEL, sparse)
    mixed = structs.replace(FORM, output="dense+sparse of a query")
    assert space_of(both, mixed) != space_of(MODEL, mixed)


def test_distinctions_that_change_no_vector_are_none() -> None:
    layer_norm = structs.replace(FORM, has_layer_norm=True)
    raw, cut = structs.replace(FORM, is_normalized=False), structs.replace(FORM, cut="end")

    assert settled(MODEL, layer_norm) == FORM, "the vector is not cut"
    assert space_of(UNIT, raw) == space_of(UNIT, FORM), "the last module normalizes"
    assert space_of(MODEL, raw) != space_of(MODEL, FORM)
    assert space_of(UNIT, structs.replace(raw, width=4)) != space_of(UNIT, structs.replace(FORM, width=4))
    assert space_of(UNIT, cut) == space_of(UNIT, FORM), "the model cuts there anyway"


@pytest.mark.parametrize(("dtype", "name"), [("float32", "exact"), ("bfloat16", "bfloat16"), ("int8", "int8-4")])
def test_each_reduced_dtype_is_a_class_of_its_own(dtype: str, name: str) -> None:
    assert with_numeric(MODEL, dtype).values["numeric"] == name


def test_the_version_of_the_rounding_to_int8_is_part_of_its_spaces() -> None:
    assert with_numeric(MODEL, "int8").values["numeric"] == f"int8-{FORM_VERSIONS['int8']}"


def test_other_texts_are_no_fingerprints() -> None:
    space = space_of(MODEL, FORM)

    assert len(space) <= MAX_SPACE_CHARS
    assert [parts_of(text) for text in ("", "s0" + space[2:], space + "0", space.upper(), space[:-1])] == [None] * 5


@given(INGREDIENTS, INGREDIENTS)
def test_differences_are_exactly_what_turns_one_into_the_other(a: Ingredients, b: Ingredients) -> None:
    found = differences(a, b)
    turned = dict(a.values)
    for name, before, after in found:
        assert turned.get(name) == before
        turned.pop(name, None)
        if after is not None:
            turned[name] = after

    assert turned == b.values
    assert all(before != after for _, before, after in found)
    assert differences(b, a) == tuple(Difference(name, after, before) for name, before, after in found)
    assert (space_of(a, FORM) == space_of(b, FORM)) == (not found)


def test_a_difference_reads_as_a_sentence_and_is_short() -> None:
    assert str(Difference("weights", "3f2a" * 16, None)) == "weights 3f2a3f2a3f2a… then, none now"
    assert str(Difference("pooling", "mean", "cls")) == "pooling mean then, cls now"


def test_every_prompt_and_stated_width_is_listed() -> None:
    listed = Listed(width=8, prompts={"query": "q: ", "empty": ""}, matryoshka=Matryoshka(widths=(4, 8, 2)))
    found = list_spaces(MODEL, listed)

    assert {name: list(row) for name, row in found.items()} == {key: ["8", "4", "2"] for key in ["", "empty", "query"]}
    assert found["query"]["4"] == space_of(MODEL, structs.replace(FORM, width=4, before="q: "))
    assert found["empty"] == found[""]
    assert len({space for row in found.values() for space in row.values()}) == 6


def test_a_list_is_bounded() -> None:
    prompts = {f"p{index}": f"{index}: " for index in range(1000)}
    listed = Listed(width=4096, prompts=prompts, matryoshka=Matryoshka(widths=tuple(range(1, 4096))))
    found = list_spaces(MODEL, listed)

    assert len(found) == MAX_LISTED_PROMPTS + 1
    assert {len(row) for row in found.values()} == {MAX_LISTED_WIDTHS}
    assert "" in found
    assert "4096" in found[""]
