"""Compares the spaces of two registries or servers: which indexes stay valid, and which must be built anew. Pure."""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from engines.space import Ingredients, differences, parts_of

Verdict = Literal["same", "changed", "only in A", "only in B", "unknown"]

_PARTS = ("weights", "tokenizer or modules", "prompt, width or normalization")
_SAME_AS = "named {} in B"


class ModelSide(Struct, frozen=True, kw_only=True):
    """The spaces of one model on one side.

    `spaces`: by the name of the prompt (empty: none) and the width. `ingredients`: None where they are not told.
    `why_unknown`: why `spaces` is empty.
    """

    spaces: Mapping[str, Mapping[str, str]] = {}
    ingredients: Ingredients | None = None
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
        other = next((other for other, found in b.items() if side.spaces and _is_same(side, found)), None)
        if other is not None:
            return Compared(model=name, verdict="same", why=(_SAME_AS.format(other),))
        return Compared(model=name, verdict="only in A")
    found = b[name]
    unknown = [f"{label}: {each.why_unknown}" for label, each in (("A", side), ("B", found)) if not each.spaces]
    if unknown:
        return Compared(model=name, verdict="unknown", why=tuple(unknown))
    if _is_same(side, found):
        return Compared(model=name, verdict="same")
    return Compared(model=name, verdict="changed", why=tuple(_reasons(side, found)))


def _is_same(a: ModelSide, b: ModelSide) -> bool:
    """Whether B gives all spaces of A; it may give more."""
    return bool(b.spaces) and all(
        b.spaces.get(prompt, {}).get(width) == space for prompt, row in a.spaces.items() for width, space in row.items()
    )


def _reasons(a: ModelSide, b: ModelSide) -> Iterator[str]:
    """Yield what differs: ingredients of all vectors, else the prompts and widths whose vectors differ."""
    changed = (
        [str(each) for each in differences(a.ingredients, b.ingredients)] if a.ingredients and b.ingredients else []
    )
    if changed:
        yield from changed
        return
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
