"""Checks rules between the keys of `registry.yaml`: duplicate names, and keys that require or exclude each other.

The document may still hold invalid values, because all mistakes are reported at once: rules skip values of wrong types.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import gt
from typing import Any

from router.config.yaml_document import Document, KeyPath
from router.config.yaml_schema import nearest
from router.registry.file import is_commit, is_hub_id

_LARGEST = 1e30
"""Larger than any component of a vector, and near the maximum of float32."""

Rule = Callable[[Document, Mapping[str, Any], KeyPath], None]


def check_rules(document: Document) -> None:
    """Add a mistake for every broken rule."""
    _check_unique_names(document)
    _check_default_model(document)
    for index, entry in _entries(document):
        for rule in _ENTRY_RULES:
            rule(document, entry, ("models", index))


def _entries(document: Document) -> Iterator[tuple[int, Mapping[str, Any]]]:
    root = document.value
    models = root.get("models") if isinstance(root, dict) else None
    for index, entry in enumerate(models if isinstance(models, list) else []):
        if isinstance(entry, dict):
            yield index, entry


def _names(document: Document) -> Iterator[tuple[str, KeyPath]]:
    """Yield all names and aliases with their paths; names first, so that a duplicate is reported at the alias."""
    for index, entry in _entries(document):
        if isinstance(entry.get("name"), str):
            yield entry["name"], ("models", index, "name")
    for index, entry in _entries(document):
        aliases = entry.get("aliases")
        for number, alias in enumerate(aliases if isinstance(aliases, list) else []):
            if isinstance(alias, str):
                yield alias, ("models", index, "aliases", number)


def _check_unique_names(document: Document) -> None:
    seen: dict[str, KeyPath] = {}
    for name, path in _names(document):
        first = seen.setdefault(name, path)
        if first is path:
            continue
        what = "the name" if first[-1] == "name" else "an alias"
        whose = "this model" if first[1] == path[1] else f"models[{first[1]}], line {document.line(first)}"
        document.add(path, f"{name!r} is already {what} of {whose}: names and aliases must be unique")


def _check_default_model(document: Document) -> None:
    default = document.value.get("default_model") if isinstance(document.value, dict) else None
    known = dict(_names(document))
    if isinstance(default, str) and default not in known:
        hint = nearest(default, known) or "; use one of the models below"
        document.add(("default_model",), f"no model named {default!r}{hint}")


def _check_remote_code_revision(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    if entry.get("trust_remote_code") is not True or is_commit(entry.get("revision")):
        return
    if is_hub_id(entry.get("source")):
        key = "revision" if "revision" in entry else "trust_remote_code"
        document.add(
            (*path, key),
            "trust_remote_code runs code of the repository, so revision must be a full commit of 40 hexadecimal digits "
            "that you have reviewed: a branch or a tag can change",
        )


def _check_revision_has_hub_source(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    for key, place in (("revision", "source"), ("adapter_revision", "adapter")):
        source = entry.get(place)
        if key in entry and isinstance(source, str) and not is_hub_id(source):
            document.add((*path, key), f"only hub repositories have revisions: remove it, or use a hub id as {place}")
    if "adapter_revision" in entry and "adapter" not in entry:
        document.add((*path, "adapter_revision"), "there is no adapter that it could be the revision of: remove it")


def _check_default_prompt(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    prompts, default = entry.get("prompts"), entry.get("default_prompt")
    if isinstance(prompts, dict) and isinstance(default, str) and default not in prompts:
        hint = nearest(default, prompts) or f"; prompts are {', '.join(prompts) or 'none'}"
        document.add((*path, "default_prompt"), f"no prompt named {default!r}{hint}")


def _check_matryoshka(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    rule = entry.get("matryoshka")
    if not isinstance(rule, dict) or rule.keys() - {
        "min",
        "widths",
        "layer_norm",
    }:  # an unknown key is reported instead
        return
    if ("min" in rule) == ("widths" in rule):
        document.add((*path, "matryoshka"), "needs either min (all widths from there) or widths (a list)")


def _check_calibration(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    rule = entry.get("calibration")
    lowest, highest = (_bounds(rule.get(key)) if isinstance(rule, dict) else None for key in ("lowest", "highest"))
    if lowest is None or highest is None:
        return
    path, width = (*path, "calibration"), max(len(lowest), len(highest))
    if not all(abs(number) < _LARGEST for number in (*lowest, *highest)):
        document.add(path, f"needs finite numbers below {_LARGEST:g}")
    elif not {len(lowest), len(highest)} <= {1, width}:
        document.add(path, f"lowest has {len(lowest)} numbers and highest {len(highest)}: both need one per component")
    elif any(map(gt, lowest * (width // len(lowest)), highest * (width // len(highest)))):
        document.add(path, "lowest must not be above highest in any component")


def _check_token_id_keys(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    if entry.get("unframed_token_ids") is True and "token_encoding" in entry:
        document.add(
            (*path, "unframed_token_ids"),
            "cannot be combined with token_encoding, which decodes token ids to texts: remove one of them",
        )


def _bounds(value: object) -> list[Any] | None:
    """Return the numbers of one bound; None if its type is wrong, which the schema check reports."""
    values: list[Any] = value if isinstance(value, list) else [value]
    return values if values and all(type(number) in (int, float) for number in values) else None


_SIZES = {"auto": 32, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
"""Bits of a weight; `auto` counts as what it is on a CPU."""


def _check_dtypes(document: Document, entry: Mapping[str, Any], path: KeyPath) -> None:
    given = entry.get("dtype")
    sizes = [_SIZES.get(str(dtype), 0) for dtype in given] if isinstance(given, list) else []
    if all(sizes) and sizes != sorted(set(sizes), reverse=True):
        document.add((*path, "dtype"), "each dtype must be smaller than the one before it, as in [float32, int8]")


_ENTRY_RULES: tuple[Rule, ...] = (
    _check_dtypes,
    _check_remote_code_revision,
    _check_revision_has_hub_source,
    _check_default_prompt,
    _check_matryoshka,
    _check_calibration,
    _check_token_id_keys,
)
