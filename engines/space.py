"""Names the space that a vector lies in: a fingerprint over all that decides the vector. Pure.

Vectors may be compared where their fingerprints are equal. Equal does not mean bit by bit: devices, batches and forward
paths differ within the tolerance of the self-check, and have the same fingerprint.

A fingerprint is `s1-PPPPPPPPPPPP-HHHHHHHHHHHHHHHH`. `s1` is the version of this scheme. H are 64 bits of the sha256
over everything. P are three times 16 bits: of the weights, of the rest of the model, and of what the request adds. They
say without any memory which of the three differs; that two are equal is said by H.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct, structs

from engines.spec import Matryoshka, Output, Side

VERSION = "s1"
"""Changes with the meaning of an ingredient, or with what is hashed: all fingerprints change with it."""

MAX_SPACE_CHARS = 64
"""Most characters of a fingerprint that a client may send; ours have 32."""

WEIGHTS = "weights"
MODULES = "modules"
TRUNCATION_SIDE = "truncation_side"
NUMERIC = "numeric"
"""Names of ingredients that are read again, not only compared."""

NUMERIC_CLASSES: Mapping[str, str] = {"float32": "exact", "int8": "int8-4"}
"""Classes of arithmetic by dtype: the vectors of each class agree within its tolerance on every device. Dtypes that are
not listed are a class of their own: theirs differ from float32's beyond any tolerance. int8's ends with the version of
its rounding (`FORM_VERSIONS` in `engines/precision.py`): vectors of two versions have cosines of 0.997 to 0.999, as
far from each other as from float32. Those of two ways to compute bfloat16 have 0.9999 and more, and are one class."""

SIDES: tuple[Side, ...] = ("query", "document")
"""Texts are on one of two sides of a search; sparse outputs and vectors of tokens of each have spaces of their own."""

_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "multi_vector")
"""The order in which outputs are named that one request asks for together."""

MAX_LISTED_PROMPTS = 32
MAX_LISTED_WIDTHS = 16
"""Bounds of `list_spaces`."""

_PATTERN = re.compile(rf"{VERSION}-([0-9a-f]{{4}})([0-9a-f]{{4}})([0-9a-f]{{4}})-[0-9a-f]{{16}}")
_SHOWN = 12
"""Characters of a digest in messages."""


class Ingredients(Struct, frozen=True):
    """What a model's files and its registry entry decide of its vectors.

    `values`: by name, a digest in hex or a short value. Names that begin with a kind of output and a colon
    (`sparse:weights`) concern that kind only.
    """

    values: dict[str, str]


class VectorForm(Struct, frozen=True, kw_only=True):
    """What a request adds to the ingredients of its model.

    Args:
        width: components of the vector.
        native_width: of the model's own vectors; not an ingredient, but a vector that is not cut needs no layer norm.
        before, behind: the prompt around the text.
        is_normalized: whether vectors are brought to length one.
        has_layer_norm: whether a layer norm precedes the cut to a smaller width.
        cut: the end at which long texts are cut, where the request names one.
        max_tokens: tokens that are read of a text, where the request asks for fewer than the model reads.
        output: the kind of output; vectors of different kinds are never comparable. Several are joined by `+`, and what
            else tells them apart follows behind a space.
    """

    width: int
    native_width: int
    before: str = ""
    behind: str = ""
    is_normalized: bool = True
    has_layer_norm: bool = False
    cut: Literal["start", "end"] | None = None
    max_tokens: int | None = None
    output: str = "dense"


class Difference(NamedTuple):
    """An ingredient that differs: its value in each of the two; None where one has no such ingredient."""

    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.before)} then, {_shown(self.after)} now"


class SpaceParts(NamedTuple):
    """The parts of a fingerprint that can be compared with those of another one."""

    weights: str
    model: str
    request: str


def with_numeric(ingredients: Ingredients, dtype: str) -> Ingredients:
    """Returns the ingredients with the class of arithmetic of weights in `dtype`."""
    return Ingredients({**ingredients.values, NUMERIC: NUMERIC_CLASSES.get(dtype, dtype)})


def settled(ingredients: Ingredients, form: VectorForm) -> VectorForm:
    """Returns the form without distinctions that change no vector of this model.

    A model that ends with a Normalize module gives vectors of length one anyway; a layer norm comes before a cut only;
    and naming the end at which the model cuts anyway is no difference.
    """
    is_whole = form.width == form.native_width
    ends_normalized = is_whole and ingredients.values.get(MODULES, "").endswith("Normalize")
    return structs.replace(
        form,
        is_normalized=form.is_normalized or ends_normalized,
        has_layer_norm=form.has_layer_norm and not is_whole,
        cut=None if form.cut == ingredients.values.get(TRUNCATION_SIDE) else form.cut,
    )


def space_of(ingredients: Ingredients, form: VectorForm) -> str:
    """Returns the fingerprint of the space of vectors of this form."""
    form = settled(ingredients, form)
    kinds = form.output.partition(" ")[0].split("+")
    weights: dict[str, str] = {}
    model: dict[str, str] = {}
    for name, value in ingredients.values.items():
        kind, colon, _ = name.partition(":")
        if not colon or kind in kinds:
            (weights if WEIGHTS in name else model)[name] = value
    request = [
        form.output, form.width, form.before, form.behind, form.is_normalized, form.has_layer_norm, form.cut,
        form.max_tokens,
    ]  # fmt: skip
    whole = _digest([VERSION, weights, model, request])
    return f"{VERSION}-{''.join(_digest(part)[:4] for part in (weights, model, request))}-{whole[:16]}"


def parts_of(space: str) -> SpaceParts | None:
    """Returns the parts of a fingerprint; None if it is not one of this version."""
    found = _PATTERN.fullmatch(space)
    return SpaceParts(*found.groups()) if found else None


def differences(before: Ingredients, after: Ingredients) -> tuple[Difference, ...]:
    """Returns the ingredients that differ, by name."""
    names = sorted({*before.values, *after.values})
    pairs = (Difference(name, before.values.get(name), after.values.get(name)) for name in names)
    return tuple(pair for pair in pairs if pair.before != pair.after)


class Listed(Struct, frozen=True, kw_only=True):
    """What `list_spaces` and `list_output_spaces` need of a model, beside its ingredients.

    Args:
        width: of its dense vectors; 0 without them.
        outputs: what it gives.
        vector_width: of its vectors of tokens; 0 without them.
        token_pooling: how it merges vectors of tokens, by the side of a search (`ModelInfo.token_pooling`).
    """

    width: int
    prompts: Mapping[str, str]
    matryoshka: Matryoshka
    is_normalized: bool = True
    outputs: tuple[Output, ...] = ("dense",)
    vector_width: int = 0
    token_pooling: Mapping[Side, str] = {}


def output_name(kinds: Sequence[str], side: Side, merged: str = "") -> str:
    """Returns `VectorForm.output` of one or more kinds of output that one request asks for together.

    Args:
        side: of the texts; it is no part of the name of dense vectors alone.
        merged: how their vectors of tokens are merged, in words; empty where they are not.
    """
    name = "+".join(kinds)
    of_side = "" if name == "dense" else f" of a {side}"
    return name + of_side + (f", merged by {merged}" if merged else "")


def list_spaces(ingredients: Ingredients, listed: Listed) -> dict[str, dict[str, str]]:
    """Returns the fingerprint of each prompt and each width, by the prompt's name and the width in digits.

    The empty name stands for texts without a prompt. Widths are the model's own and those that it states; of a model
    that allows a range, the ends of it. At most `MAX_LISTED_PROMPTS` prompts and `MAX_LISTED_WIDTHS` widths.
    """
    rows = _list_spaces(
        _known(ingredients),
        _listed_prompts(listed),
        widths_of(listed),
        listed.width,
        listed.is_normalized,
        listed.matryoshka.layer_norm,
    )
    return {name: dict(row) for name, row in rows}


def list_output_spaces(ingredients: Ingredients, listed: Listed) -> dict[str, dict[str, dict[str, str]]]:
    """Returns the fingerprints of all outputs but dense vectors alone: by output, by the prompt's name, and by side.

    Outputs that one request asks for together have one space, and stand joined by `+`: `dense+sparse`. Dense vectors
    among them have the model's own width; prompts are as in `list_spaces`. The request names the side (`input_type`).
    """
    outputs = [output for output in _OUTPUTS if output in listed.outputs]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for kinds in _together(outputs):
        width = listed.width if "dense" in kinds else listed.vector_width if "multi_vector" in kinds else 0
        merges = listed.token_pooling if "multi_vector" in kinds else {}
        names = tuple(output_name(kinds, side, merges.get(side, "")) for side in SIDES)
        is_normalized = listed.is_normalized or "dense" not in kinds
        rows = _list_output(_known(ingredients), _listed_prompts(listed), names, (width, listed.width), is_normalized)
        found["+".join(kinds)] = {prompt: dict(zip(SIDES, row, strict=True)) for prompt, row in rows}
    return found


def _together(outputs: Sequence[Output]) -> Iterable[tuple[Output, ...]]:
    """Yields the outputs that a request may ask for, each alone before any together; not dense vectors alone."""
    found = (kinds for number in range(1, len(outputs) + 1) for kinds in combinations(outputs, number))
    return (kinds for kinds in found if kinds != ("dense",))


def _known(ingredients: Ingredients) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(ingredients.values.items()))


def _listed_prompts(listed: Listed) -> tuple[tuple[str, str], ...]:
    return tuple([("", ""), *sorted(listed.prompts.items())][: MAX_LISTED_PROMPTS + 1])


def widths_of(listed: Listed) -> tuple[int, ...]:
    """Returns the widths that `list_spaces` lists, the model's own first."""
    stated = {*listed.matryoshka.widths, *filter(None, (listed.matryoshka.minimum,))}
    smaller = sorted((width for width in stated if width < listed.width), reverse=True)
    return (listed.width, *smaller)[:MAX_LISTED_WIDTHS]


@lru_cache(maxsize=256)
def _list_spaces(  # the key of a cache: plain values only
    known: tuple[tuple[str, str], ...],
    prompts: tuple[tuple[str, str], ...],
    widths: tuple[int, ...],
    native_width: int,
    is_normalized: bool,  # as above
    has_layer_norm: bool,  # as above
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    ingredients = Ingredients(dict(known))

    def space(text: str, width: int) -> str:
        form = VectorForm(
            width=width, native_width=native_width, before=text, is_normalized=is_normalized,
            has_layer_norm=has_layer_norm,
        )  # fmt: skip
        return space_of(ingredients, form)

    return tuple((name, tuple((str(width), space(text, width)) for width in widths)) for name, text in prompts)


@lru_cache(maxsize=1024)  # a model has up to six: with 256, 90 models computed all again in each listing (35 ms)
def _list_output(
    known: tuple[tuple[str, str], ...],
    prompts: tuple[tuple[str, str], ...],
    names: tuple[str, ...],
    widths: tuple[int, int],  # of the output, and of dense vectors
    is_normalized: bool,  # as above
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    ingredients = Ingredients(dict(known))
    width, native_width = widths
    form = VectorForm(width=width, native_width=native_width, is_normalized=is_normalized)

    def space(text: str, name: str) -> str:
        return space_of(ingredients, structs.replace(form, before=text, output=name))

    return tuple((prompt, tuple(space(text, name) for name in names)) for prompt, text in prompts)


def _digest(content: object) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 2 * _SHOWN else f"{value[:_SHOWN]}…"
