"""Compares the spaces of two registries or servers: which indexes stay valid, and which must be built anew. Pure."""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct, structs

from engines.space import Ingredients, differences, parts_of

Verdict = Literal["same", "changed", "only in A", "only in B", "unknown"]

_PARTS = ("weights", "tokenizer or modules", "prompt, width or normalization")
_SAME_AS = "named {} in B"


class ModelSide(Struct, frozen=True, kw_only=True):
    """The spaces of one model on one side.

    `spaces`: of dense vectors, by the name of the prompt (empty: none) and the width. `output_spaces`: of others, by
    output, prompt and side; None of a server that does not list them. `ingredients`: None where they are not told.
    `prompts`: by name. `why_unknown`: why there are no spaces.
    """

    spaces: Mapping[str, Mapping[str, str]] = {}
    output_spaces: Mapping[str, Mapping[str, Mapping[str, str]]] | None = {}
    ingredients: Ingredients | None = None
    prompts: Mapping[str, str] = {}
    why_unknown: str = ""


class Compared(Struct, frozen=True, kw_only=True):
    """The verdict on one model, with the reasons in words."""

    model: str
    verdict: Verdict
    why: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether every index of A's model stays valid with B."""
        return self.verdict in ("same", "only in B")


Side = Mapping[str, ModelSide]
"""The models of one side by name."""

_Indexes = Mapping[tuple[str, str], str]
"""Spaces by the index that they are of, in words, and the side of a search that its texts are on, or empty."""


def compare(a: Side, b: Side) -> list[Compared]:
    """Compare the models of A with those of the same names in B; a model of another name with the same space counts."""
    found = [_compare(name, side, b) for name, side in a.items()]
    return [*found, *(Compared(model=name, verdict="only in B") for name in b if name not in a)]


def _compare(name: str, side: ModelSide, b: Side) -> Compared:
    if name not in b:
        same = (other for other, found in b.items() if _is_same(side, found) and not _changed_ingredients(side, found))
        other = next(same, None) if _indexes(side) else None
        if other is not None:
            return Compared(model=name, verdict="same", why=(_SAME_AS.format(other),))
        return Compared(model=name, verdict="only in A")
    found = b[name]
    changed = _changed_ingredients(side, found)
    if changed:  # also those that decide sparse outputs or vectors of tokens only
        return Compared(model=name, verdict="changed", why=tuple(changed))
    unknown = [f"{label}: {each.why_unknown}" for label, each in (("A", side), ("B", found)) if not _indexes(each)]
    if unknown:
        return Compared(model=name, verdict="unknown", why=tuple(unknown))
    if _is_same(side, found):
        return Compared(model=name, verdict="same")
    return Compared(model=name, verdict="changed", why=tuple(dict.fromkeys(_reasons(side, found))))


def _changed_ingredients(a: ModelSide, b: ModelSide) -> list[str]:
    if a.ingredients is None or b.ingredients is None:
        return []
    return [str(each) for each in differences(a.ingredients, b.ingredients)]


def _indexes(side: ModelSide) -> _Indexes:
    """Return the spaces of the indexes of one output each. Those of several together change with these."""
    found = {
        (f"{width} dimensions {_with_prompt(prompt)}", ""): space
        for prompt, row in side.spaces.items()
        for width, space in row.items()
    }
    for output, prompts in (side.output_spaces or {}).items():
        for prompt, row in prompts.items():
            if "+" not in output:
                found |= {(f"{output} {_with_prompt(prompt)}", of): space for of, space in row.items()}
    return found


def _with_prompt(name: str) -> str:
    return f"with the prompt {name!r}" if name else "without a prompt"


def _unlike(a: ModelSide, b: ModelSide) -> Iterator[tuple[str, str, str | None]]:
    """Yield the indexes of A whose spaces B does not have: in words, with A's space and B's; B may give more."""
    known = a if b.output_spaces is not None else structs.replace(a, output_spaces={})
    theirs = _indexes(b)
    for index, space in _indexes(known).items():
        if theirs.get(index) != space:
            yield index[0], space, theirs.get(index)


def _is_same(a: ModelSide, b: ModelSide) -> bool:
    return bool(_indexes(b)) and not any(_unlike(a, b))


def _reasons(a: ModelSide, b: ModelSide) -> Iterator[str]:
    """Yield the indexes whose vectors differ."""
    for words, space, other in _unlike(a, b):
        yield f"{words}: {'not in B' if other is None else _unlike_parts(space, other)}"


def _unlike_parts(a: str, b: str) -> str:
    before, after = parts_of(a), parts_of(b)
    if before is None or after is None:
        return "fingerprints of different versions"
    unlike = [name for name, one, two in zip(_PARTS, before, after, strict=True) if one != two]
    return f"another {' and another '.join(unlike)}" if unlike else "another fingerprint"
