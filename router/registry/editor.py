"""Adds entries to `registry.yaml` as lines of text, so that comments and order are kept.

Every change is parsed before it is written: if the file would not hold exactly the old models and the new one, it is
not made.
"""

from pathlib import Path

import yaml
from msgspec import structs

from engines.storage import write_atomically
from router.config.yaml_document import read_text
from router.config.yaml_editing import EditError, last_line, locked
from router.registry.new_entry import NewEntry, entry_lines
from router.registry.registry import Registry, parse_registry

_INDENT = 2


def with_entry(text: str, entry: NewEntry) -> str:
    """Return the text of a registry with an entry behind its last model.

    Raises:
        RegistryError: the text, or the entry, has mistakes.
        EditError: a model has this name already, or the list is written in a form that cannot be extended.
    """
    before = parse_registry(text)
    check_is_new(before, entry)
    node = _models_node(text)
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    if node.value and not node.flow_style:
        row, indent = _row_behind(node, lines), node.start_mark.column
        gap = ["\n"] if _is_spaced(node, lines) else []
    elif not node.value:
        row, indent, gap = node.end_mark.line + 1, _INDENT, []
        start, end = node.start_mark, node.end_mark
        lines[start.line] = lines[start.line][: start.column].rstrip() + lines[start.line][end.column :]
    else:
        raise EditError("the models stand in one line: write one entry a line (- name: …), or add it by hand")
    added = [f"{' ' * indent}{line}\n" for line in entry_lines(entry)]
    return _verified("".join([*lines[:row], *gap, *added, *lines[row:]]), before, entry)


def check_is_new(registry: Registry, entry: NewEntry) -> None:
    """Raise EditError when a model has this name, or one of these aliases, or comes from this source."""
    for name in (entry.name, *entry.aliases):
        owner = name if name in registry.models else registry.aliases.get(name)
        if owner is not None:
            known = f"{name!r} is in the registry already" + (f", as an alias of {owner!r}" if owner != name else "")
            remedy = "choose another with --name" if name == entry.name else f"use it as {owner!r}"
            raise EditError(f"{known}: {remedy}")
    sources, revision = (entry.source, entry.adapter), entry.adapter_revision if entry.adapter else entry.revision
    twin = next((spec.model_id for spec in registry.models.values() if (spec.source, spec.adapter) == sources), None)
    if twin is not None and not revision:
        raise EditError(f"{entry.adapter or entry.source} is in the registry already, as {twin!r}")


def _models_node(text: str) -> yaml.SequenceNode:
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # parse_registry accepted it
    node = next(value for key, value in root.value if key.value == "models")
    if not isinstance(node, yaml.SequenceNode) or (not node.value and node.start_mark.line != node.end_mark.line):
        raise EditError("the list of models is empty, over several lines: write models: [], or add the entry by hand")
    return node


def _row_behind(node: yaml.SequenceNode, lines: list[str]) -> int:
    """Return the index of the line behind the last entry and the comments that are indented as its keys."""
    row = last_line(node.value[-1]) + 1
    while row < len(lines) and _is_comment_of_entry(lines[row], node.start_mark.column):
        row += 1
    return row


def _is_comment_of_entry(line: str, indent: int) -> bool:
    stripped = line.lstrip(" ")
    return stripped.startswith("#") and len(line) - len(stripped) > indent


def _is_spaced(node: yaml.SequenceNode, lines: list[str]) -> bool:
    """Whether blank lines separate the entries, as far as there are several."""
    firsts = [item.start_mark.line for item in node.value[1:]]
    return not firsts or any(not lines[row - 1].strip() for row in firsts)


def _verified(text: str, before: Registry, entry: NewEntry) -> str:
    after = parse_registry(text)
    new = after.models.get(entry.name)
    sources = (entry.source, entry.adapter)
    is_right = new is not None and (new.source, new.adapter) == sources and dict(new.prompts) == entry.prompts
    others = {model_id: spec for model_id, spec in after.models.items() if model_id != entry.name}
    aliases = {alias: target for alias, target in after.aliases.items() if target != entry.name}
    if not is_right or structs.replace(after, models=others, aliases=aliases) != before:
        raise EditError("the entries of the file are not on lines of their own: add the entry by hand")
    return text


def add_entry(path: Path, entry: NewEntry) -> None:
    """Add an entry to a registry file.

    Raises:
        RegistryError, EditError: as for `with_entry`.
        ValueError: the file cannot be read.
        OSError: the file cannot be written.
    """
    with locked(path):
        text = read_text(path, "create it with `embedyard init`")
        write_atomically(path, with_entry(text, entry).encode(), is_private=True)


def create_file(path: Path, text: str) -> None:
    """Write a registry to a new file.

    Raises:
        RegistryError: the text has mistakes.
        EditError: the file exists.
        OSError: the file cannot be written.
    """
    parse_registry(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if path.exists():
            raise EditError(f"{path} exists already: edit it, or pass another file")
        write_atomically(path, text.encode())
