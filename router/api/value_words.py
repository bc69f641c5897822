"""Words msgspec's validation messages as people say them: `Expected `int | null`, got `str`` names no field's bounds.

Messages without a form of their own here stay as msgspec words them.
"""

import re
from collections.abc import Iterator
from typing import Any, get_args

from msgspec import Meta

_MISMATCH = re.compile(r"Expected `(?P<wanted>[a-z| ]+)`, got `(?P<got>[a-z]+)`")
_LIMIT = re.compile(r"Expected `(?P<kind>int|float)` (?P<sign>[<>]=?) (?P<limit>[-\d.e+]+)")
_LENGTH = re.compile(r"Expected `(?P<kind>str|array|object)` of length (?P<sign>[<>]=?) (?P<limit>\d+)")

_KINDS = {
    "int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip
_GIVEN = _KINDS | {"float": "a decimal number", "bool": "a boolean"}
_UNITS = {"str": "characters", "array": "items", "object": "fields"}
_LENGTHS = {">=": "at least", "<=": "at most", ">": "more than", "<": "fewer than"}


def describe_mismatch(what: str, where: str, annotation: Any = None) -> str:
    """Return a sentence such as `dimensions is a string, but must be an integer of 1 or more`.

    Args:
        what: msgspec's message, without its path.
        where: path of the value.
        annotation: type of the value; None if not known, then a mismatch of types names no bounds.
    """
    if mismatch := _MISMATCH.fullmatch(what):
        given = _GIVEN.get(mismatch["got"], mismatch["got"])
        return f"{where} is {given}, but must be {_wanted(mismatch['wanted'].split(' | '))}{_bounds(annotation)}"
    if limit := _LIMIT.fullmatch(what):
        return f"{where} must be {_KINDS[limit['kind']]}{_bound(limit['sign'], limit['limit'])}"
    if length := _LENGTH.fullmatch(what):
        unit = _UNITS[length["kind"]]
        counted = unit.removesuffix("s") if length["limit"] == "1" else unit
        return f"{where} must have {_LENGTHS[length['sign']]} {length['limit']} {counted}"
    return f"{where}: {what}"


def _wanted(kinds: list[str]) -> str:
    """Join the kinds; null goes without saying, and an integer is a number."""
    shown = [kind for kind in kinds if kind != "null" and not (kind == "int" and "float" in kinds)]
    return " or ".join(_KINDS.get(kind, kind) for kind in shown or kinds)


def _bounds(annotation: Any) -> str:
    found = [
        bound for meta in _metas(annotation) for bound in ((">=", meta.ge), ("<=", meta.le)) if bound[1] is not None
    ]
    return "".join(_bound(sign, str(limit)) for sign, limit in found[:1])


def _bound(sign: str, limit: str) -> str:
    return {">=": f" of {limit} or more", "<=": f" of at most {limit}", ">": f" above {limit}", "<": f" below {limit}"}[
        sign
    ]


def _metas(annotation: Any) -> Iterator[Meta]:
    """Yield the constraints of an annotation and of its alternatives, but not of the items of a list."""
    yield from (each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, Meta))
    if getattr(annotation, "__origin__", None) not in (list, tuple, dict):
        for part in get_args(annotation):
            yield from _metas(part)
