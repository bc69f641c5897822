"""Explains what is wrong with a request body: names the field, what it may hold, and how it is spelt."""

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct, structs

from engines.errors import DimensionsNotSupported, InvalidRequest, InvalidTokenId, InvalidValue
from router.api.value_words import describe_mismatch
from router.schemas.inference import MAX_WIDTH

_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")
_BAD_WORD = re.compile(r"Invalid enum value '(?P<word>.*)'", re.DOTALL)
_BEYOND_64_BITS = re.compile(r"Expected `int` [<>]= -?9223372036854775\d+|Integer value out of range", re.ASCII)
_TOO_WIDE = re.compile(rf"Expected `int` <= {MAX_WIDTH}|Integer value out of range")
_FAULTY_BYTE = re.compile(r"\(byte (?P<at>\d+)\)")
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_NEAR_BYTES = 16
"""Most bytes between a lone surrogate and the byte at which msgspec reports the error."""
_ID_FIELDS = ("input", "inputs")
"""Fields that may hold token ids."""
_MAX_WORD_CHARS = 50
_NAME = re.compile(rb'"([A-Za-z_]\w{0,39})"[ \t\r\n]*:', re.ASCII)
"""The name of a field. Inside a text its quotes would be escaped."""
_NAMES_WITHIN = 2**12
"""Names are searched in so many bytes at the start of a body, and as many at its end; bodies have up to 64 MB."""
_SYNONYMS = frozenset(
    {"input", "inputs", "text", "texts", "prompt", "content", "data", "documents", "queries", "query", "sentences"}
)
"""What servers call the texts of a request."""
_ALIKE = 0.7
"""How much of a misspelt name must be right (`difflib` ratio)."""


def explain_invalid_value(error: msgspec.ValidationError, place: str, wanted: Any, body: bytes) -> InvalidRequest:
    """Parse msgspec's message, such as "Expected `int`, got `str` - at `$.dimensions`", into an error with `param`.

    The message may quote what the client sent, at any length, so it is searched from its end.

    Args:
        error: msgspec's.
        place: path in the body of what was decoded.
        wanted: the Struct of the body; None if `place` says where the error is.
        body: the whole body if `wanted` is given.
    """
    what, _, path = str(error).rpartition(" - at `$")
    what, path = (what, path.removesuffix("`")) if what else (path, "")
    if missing := _MISSING.match(what):
        path = f"{path}.{missing['field']}"
    where = (place + path).removeprefix(".")
    param = re.split(r"[.\[]", where, maxsplit=1)[0] or None
    if missing:
        return InvalidValue(f"{where} is required{_hint(where, wanted, body)}", param=param)
    if bad := _BAD_WORD.match(what):
        return InvalidValue(f"{where} is {bad['word'][:_MAX_WORD_CHARS]!r}: use {_allowed(wanted, param)}", param=param)
    if param in _ID_FIELDS and _BEYOND_64_BITS.match(what):
        return InvalidTokenId(f"{where} is not a token id: it has more than 64 bits", param=param)
    refusal = DimensionsNotSupported if "dimension" in (param or "") and _TOO_WIDE.match(what) else InvalidValue
    annotation = _annotation(wanted, where)
    return refusal(describe_mismatch(what, where or "body", annotation), param=param)


def explain_invalid_json(error: msgspec.DecodeError, content: Any) -> str:
    """Return msgspec's message, or a clearer one for a lone surrogate."""
    fault = _FAULTY_BYTE.search(str(error))
    at = int(fault["at"]) if fault else len(content)
    if _LONE_SURROGATE.search(content[max(0, at - _NEAR_BYTES) : at + _NEAR_BYTES]):
        return (
            "Invalid JSON: the body contains a lone surrogate (\\ud800 to \\udfff): send both halves of the pair, or "
            "\\ufffd instead"
        )
    return f"Invalid JSON: {error}"


def _hint(field: str, wanted: Any, body: bytes) -> str:
    """Return the field's name beside what the body calls it, if it seems to have it under another name."""
    if wanted is None or field not in wanted.__struct_encode_fields__:
        return ""
    given = misspelt(field, body, known=wanted.__struct_encode_fields__)
    return f", and {given} is no field of this route: did you mean `{field}`?" if given else ""


def misspelt(field: str, body: bytes, known: Collection[str]) -> str:
    """Return a name in the body that may be meant for `field` and is not in `known`; empty if there is none."""
    ends = (body[:_NAMES_WITHIN], body[_NAMES_WITHIN:][-_NAMES_WITHIN:])
    names = dict.fromkeys(name.decode() for end in ends for name in _NAME.findall(end))
    unknown = [name for name in names if name not in known]
    alike = get_close_matches(field, unknown, n=1, cutoff=_ALIKE)
    if not alike and field in _SYNONYMS:
        alike = [name for name in unknown if name in _SYNONYMS][:1]
    return alike[0] if alike else ""


def _annotation(wanted: Any, field: str | None) -> Any:
    """Return the type of a field of the body; None where it is not known."""
    kinds = [each for each in (wanted, *get_args(wanted)) if isinstance(each, type) and issubclass(each, Struct)]
    return next((each.type for kind in kinds for each in structs.fields(kind) if each.encode_name == field), None)


def _allowed(wanted: Any, field: str | None) -> str:
    words = list(dict.fromkeys(_words(_annotation(wanted, field))))
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:]))) or "another value"


def _words(annotation: Any) -> Iterator[str]:
    """Yield the words that an annotation admits, at any depth: `list[Literal["a", "b"]] | None` admits a and b."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif isinstance(annotation, type) and issubclass(annotation, Struct):
        for each in structs.fields(annotation):
            yield from _words(each.type)
    else:
        for part in get_args(annotation):
            yield from _words(part)
