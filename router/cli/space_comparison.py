"""Compares the spaces of two registries or servers: which indexes stay valid, and which must be built anew. Pure."""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from engines.space import NO_DENSE, Ingredients, differences, parts_of

Verdict = Literal["same", "changed", "only in A", "only in B", "unknown"]

_PARTS = ("weights", "tokenizer or modules", "prompt, width or normalization")
_SAME_AS = "named {} in B"


class ModelSide(Struct, frozen=True, kw_only=True):
    """The spaces of one model on one side.

    `spaces`: of dense vectors, by the name of the prompt (empty: none) and the width. `ingredients`: None where they
    are not told. `prompts`: by name. `why_unknown`: why `spaces` is empty.
    """

    spaces: Mapping[str, Mapping[str, str]] = {}
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


def compare(a: Side, b: Side) -> list[Compared]:
    """Compare the models of A with those of the same names in B; a model of another name with the same space counts."""
    found = [_compare(name, side, b) for name, side in a.items()]
    return [*found, *(Compared(model=name, verdict="only in B") for name in b if name not in a)]


def _compare(name: str, side: ModelSide, b: Side) -> Compared:
    if name not in b:
        same = (other for other, found in b.items() if _is_same(side, found) and not _changed_ingredients(side, found))
        other = next(same, None) if side.spaces else None
        if other is not None:
            return Compared(model=name, verdict="same", why=(_SAME_AS.format(other),))
        return Compared(model=name, verdict="only in A")
    found = b[name]
    changed = _changed_ingredients(side, found)
    if changed:  # also those that decide sparse outputs or vectors of tokens only
        return Compared(model=name, verdict="changed", why=tuple(changed))
    if _have_no_dense(side, found):
        unlike = [f"the prompt {each!r}" for each, text in side.prompts.items() if found.prompts.get(each) != text]
        return Compared(model=name, verdict="changed" if unlike else "same", why=tuple(unlike))
    unknown = [f"{label}: {each.why_unknown}" for label, each in (("A", side), ("B", found)) if not each.spaces]
    if unknown:
        return Compared(model=name, verdict="unknown", why=tuple(unknown))
    if _is_same(side, found):
        return Compared(model=name, verdict="same")
    return Compared(model=name, verdict="changed", why=tuple(_reasons(side, found)))


def _changed_ingredients(a: ModelSide, b: ModelSide) -> list[str]:
    if a.ingredients is None or b.ingredients is None:
        return []
    return [str(each) for each in differences(a.ingredients, b.ingredients)]


def _have_no_dense(a: ModelSide, b: ModelSide) -> bool:
    """Whether both are known not to give dense vectors: ingredients and prompts decide what they give."""
    return all(each.why_unknown == NO_DENSE and each.ingredients is not None for each in (a, b))


def _is_same(a: ModelSide, b: ModelSide) -> bool:
    """Whether B gives all spaces of A; it may give more."""
    return bool(b.spaces) and all(
        b.spaces.get(prompt, {}).get(width) == space for prompt, row in a.spaces.items() for width, space in row.items()
    )


def _reasons(a: ModelSide, b: ModelSide) -> Iterator[str]:
    """Yield the prompts and widths whose vectors differ."""
    for prompt, row in a.spaces.items():
        words = f"with the prompt {prompt!r}" if prompt else "without a prompt"
        for width, space in row.items():
            other = b.spaces.get(prompt, {}).get(width)
            if other is None:
                yield f"{width} dimensions {words}: not in B"
            elif other != space:
                yield f"{width} dimensions {words}: {_unlike_parts(space, other)}"


def _unlike_parts(a: str, b: str) -> str:
    before, after = parts_of(a), parts_of(b)
    if before is None or after is None:
        return "fingerprints of different versions"
    unlike = [name for name, one, two in zip(_PARTS, before, after, strict=True) if one != two]
    return f"another {' and another '.join(unlike)}" if unlike else "another fingerprint"
