"""The spaces of fake engines' vectors, as real ones are named: from ingredients, of which only the weights differ."""

from engines.errors import SpaceMismatch
from engines.space import Ingredients, VectorForm, space_of
from engines.spec import ModelSpec
from engines.types import fingerprint


def fake_ingredients(spec: ModelSpec) -> Ingredients:
    """Returns what decides a fake's vectors: its id stands for its weights."""
    numeric = "exact" if spec.dtype == "auto" else spec.dtype
    return Ingredients({"weights": fingerprint([spec.model_id])[:32], "modules": "Transformer", "numeric": numeric})


def fake_space(spec: ModelSpec, *, width: int, native_width: int, before: str = "", output: str = "dense") -> str:
    """Names the space of a fake's vectors; they have length one."""
    form = VectorForm(width=width, native_width=native_width, before=before, output=output)
    return space_of(fake_ingredients(spec), form)


def check_expected(expected: str | None, found: str) -> str:
    """Returns the space that was found.

    Raises:
        SpaceMismatch: another one is expected.
    """
    if expected not in (None, found):
        raise SpaceMismatch(f"expect_space is {expected}, but this request gives {found}: weights differ")
    return found
