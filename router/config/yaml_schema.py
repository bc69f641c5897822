"""Checks a YAML document against a type and reports all mistakes; msgspec itself stops at the first."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import msgspec.inspect as mi

from router.config.yaml_document import Document, KeyPath

_SCALARS: dict[type[mi.Type], type] = {mi.StrType: str, mi.BoolType: bool, mi.FloatType: float}


def check_shape(document: Document, shape: Any) -> None:
    """Add a mistake for everything in `document` that `shape`, a Struct or a list of them, does not allow."""
    _Checker(document).check(mi.type_info(shape), document.value, ())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean x?)` with the nearest known word, or an empty text."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def show(value: object) -> str:
    """Format a value for a message, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Checker:
    """Checks the values of a document against types recursively."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def check(self, kind: mi.Type, value: Any, path: KeyPath) -> None:
        match kind:
            case mi.Metadata(extra={"parse": parse}):
                self._check_parsed(parse, value, path)
            case mi.UnionType() if fitting := [member for member in kind.types if _fits(member, value)]:
                self.check(fitting[0], value, path)
            case mi.StructType() if isinstance(value, dict):
                self._check_struct(kind, value, path)
            case mi.DictType() if isinstance(value, dict):
                self._check_dict(kind, value, path)
            case mi.ListType() if isinstance(value, list) and len(value) >= (kind.min_length or 0):
                for index, item in enumerate(value):
                    self.check(kind.item_type, item, (*path, index))
            case _ if not _is_allowed(kind, value):
                hint = nearest(value, _literals(kind)) if isinstance(value, str) else ""
                self._document.add(path, f"needs {_describe_type(kind)}{self._describe_value(value)}{hint}")

    def _describe_value(self, value: object) -> str:
        return "" if self._document.is_secret else f"; got {show(value)}"

    def _check_parsed(self, parse: Callable[[object], object], value: object, path: KeyPath) -> None:
        try:
            parse(value)
        except ValueError as error:
            self._document.add(path, f"needs {error}{self._describe_value(value)}")

    def _check_struct(self, kind: mi.StructType, value: Mapping[str, Any], path: KeyPath) -> None:
        fields = {field.encode_name: field for field in kind.fields}
        for key in value.keys() - fields.keys():
            hint = nearest(key, fields.keys() - value.keys()) or f"; known keys: {', '.join(sorted(fields))}"
            self._document.add((*path, key), f"unknown key{hint}")
        for name, field in fields.items():
            if name in value:
                self.check(field.type, value[name], (*path, name))
            elif field.required:
                self._document.add((*path, name), "missing")

    def _check_dict(self, kind: mi.DictType, value: Mapping[str, Any], path: KeyPath) -> None:
        for key, item in value.items():
            self.check(kind.key_type, key, (*path, key))
            self.check(kind.value_type, item, (*path, key))


def _fits(kind: mi.Type, value: object) -> bool:
    """Whether a value belongs to this member of a union. Containers are matched by their kind, not their content."""
    if isinstance(value, list | dict):
        return isinstance(kind, mi.ListType) if isinstance(value, list) else isinstance(kind, mi.StructType)
    return _is_allowed(kind, value)


def _is_allowed(kind: mi.Type, value: object) -> bool:
    if isinstance(kind, mi.LiteralType):
        return any(value == allowed and type(value) is type(allowed) for allowed in kind.values)
    if isinstance(kind, mi.IntType):
        return type(value) is int and (kind.ge is None or value >= kind.ge)
    return type(value) is _SCALARS.get(type(kind))


def _literals(kind: mi.Type) -> list[str]:
    """Return the literal values of a type."""
    if isinstance(kind, mi.UnionType):
        return [word for member in kind.types for word in _literals(member)]
    return list(map(str, kind.values)) if isinstance(kind, mi.LiteralType) else []


def _describe_type(kind: mi.Type) -> str:
    match kind:
        case mi.LiteralType(values=(only,)):
            return str(only)
        case mi.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
        case mi.UnionType():
            return " or ".join(map(_describe_type, kind.types))
        case mi.IntType():
            return "a whole number" if kind.ge is None else f"a whole number, {kind.ge} or more"
        case mi.FloatType():
            return "a number"
        case mi.ListType():
            return "a list" if kind.min_length is None else f"a list of at least {kind.min_length}"
        case mi.StructType():
            keys = [field.encode_name for field in kind.fields if field.required] or [
                f.encode_name for f in kind.fields
            ]
            return f"a mapping with {', '.join(keys)}"
    return {mi.StrType: "text in quotes", mi.BoolType: "true or false"}.get(type(kind), "a mapping")
