"""Edits `KEYS_FILE` in place: entries are added and removed as lines of text, so comments and order are kept.

Every change is parsed before it is written: if it does not hold exactly the expected keys, it is not made.
"""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from engines.storage import write_atomically
from router.auth.key_file import KeysError, parse_keys
from router.auth.keys import Key
from router.config.yaml_document import read_text
from router.config.yaml_editing import EditError, last_line, locked


def entry_text(key: Key) -> str:
    """Format a key as an entry of the file; defaults are omitted."""
    lines = [
        f"- id: {_quoted(key.id)}",
        f'  sha256: "{key.digest.hex()}"',
        f"  scopes: [{', '.join(sorted(key.scopes, reverse=True))}]",
        f"  models: [{', '.join(map(json.dumps, key.models))}]",
    ]
    limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
    lines += [f"  {name}: {getattr(key, name)}" for name in limits if getattr(key, name) is not None]
    if key.keep_alive is not None:
        lines.append(f"  keep_alive: {str(key.keep_alive).lower()}")
    return "\n".join(lines) + "\n"


def _quoted(key_id: str) -> str:
    """Quote an id that YAML would not read as text, such as `123`, `1.5` and `no`."""
    return key_id if isinstance(yaml.safe_load(key_id), str) else json.dumps(key_id)


def with_key(text: str, key: Key) -> str:
    """Return the text with an entry appended.

    Raises:
        KeysError: the text has mistakes.
        EditError: a key has this id already, or the list is written in a form that cannot be extended.
    """
    keys = parse_keys(text)
    if any(known.id == key.id for known in keys):
        raise EditError(f"a key named {key.id} exists already: choose another name, or revoke that key first")
    node = yaml.compose(text, yaml.SafeLoader)
    indent = 0
    if isinstance(node, yaml.SequenceNode) and not node.value:  # `[]`
        text = text[: node.start_mark.index] + text[node.end_mark.index :]
    elif isinstance(node, yaml.SequenceNode):
        indent = node.start_mark.column
    head = text if not text or text.endswith("\n") else text + "\n"
    added = "".join(" " * indent + line for line in entry_text(key).splitlines(keepends=True))
    return _verified(head + added, (*keys, key))


def without_key(text: str, key_id: str) -> str:
    """Return the text without the entry of that id. Comments are kept, except those on the lines of the entry.

    Raises:
        KeysError: the text has mistakes.
        EditError: there is no such key, or its entry shares a line with another.
    """
    keys = parse_keys(text)
    index = next((index for index, key in enumerate(keys) if key.id == key_id), None)
    if index is None:
        raise EditError(f"no key named {key_id}; known keys: {', '.join(key.id for key in keys) or 'none'}")
    node = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(node, yaml.SequenceNode)  # parse_keys accepted it as a list
    lines = text.splitlines(keepends=True)
    first, last = node.value[index].start_mark.line, last_line(node.value[index])
    while first > 0 and not lines[first].lstrip().startswith("-"):
        first -= 1
    return _verified("".join(lines[:first] + lines[last + 1 :]), keys[:index] + keys[index + 1 :])


def _verified(text: str, wanted: tuple[Key, ...]) -> str:
    try:
        found = parse_keys(text)
    except KeysError:
        found = None
    if found != wanted:
        raise EditError("the entries of the file are not on lines of their own: edit the file by hand")
    return text


def edit_file(path: Path, change: Callable[[str], str], *, may_make: bool) -> None:
    """Replace the file's text by `change` of it; `may_make`: treat a missing file as empty.

    Raises:
        ValueError: the file cannot be read.
        KeysError, EditError: raised by `change`.
        OSError: the file cannot be written.
    """
    with locked(path):
        is_new = may_make and not path.exists()
        text = "" if is_new else read_text(path, "create it with `embedyard keys create`")
        write_atomically(path, change(text).encode(), is_private=True)
