"""`KEYS_FILE` changed in place: entries come and go as lines of text, so that comments and order stay as they are.

Every change is read back before it is kept: it has the keys that it should have, or it is not made.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from router.auth.key_file import KeysError, parse_keys
from router.auth.keys import Key
from router.config.yaml_document import read_text

_PRIVATE = 0o600


class EditError(Exception):
    """The change cannot be made; the file is as it was."""


def entry_text(key: Key) -> str:
    """A key as an entry of the file; what is left out is the default."""
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
    """`123`, `1.5` and `no` are not text in YAML."""
    return key_id if isinstance(yaml.safe_load(key_id), str) else json.dumps(key_id)


def with_key(text: str, key: Key) -> str:
    """The text with one more entry at its end.

    Raises:
        KeysError: the text has mistakes.
        EditError: there is a key of that id, or the list is written in a way that cannot be continued.
    """
    keys = parse_keys(text)
    if any(known.id == key.id for known in keys):
        raise EditError(f"there is a key called {key.id} already: choose another name, or revoke that one first")
    node = yaml.compose(text, yaml.SafeLoader)
    indent = 0
    if isinstance(node, yaml.SequenceNode) and not node.value:  # `[]`
        text = text[: node.start_mark.index] + text[node.end_mark.index :]
    elif isinstance(node, yaml.SequenceNode):
        indent = node.start_mark.column
    head = text if not text or text.endswith("\n") else text + "\n"
    added = "".join(" " * indent + line for line in entry_text(key).splitlines(keepends=True))
    return _checked(head + added, (*keys, key))


def without_key(text: str, key_id: str) -> str:
    """The text without the entry of that id. Comments stay, but for those on its own lines.

    Raises:
        KeysError: the text has mistakes.
        EditError: there is no such key, or its entry does not stand on lines of its own.
    """
    keys = parse_keys(text)
    index = next((index for index, key in enumerate(keys) if key.id == key_id), None)
    if index is None:
        raise EditError(f"there is no key called {key_id}; there are: {', '.join(key.id for key in keys) or 'none'}")
    node = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(node, yaml.SequenceNode)  # it was just read as a list
    lines = text.splitlines(keepends=True)
    first, last = node.value[index].start_mark.line, _last_line(node.value[index])
    while first > 0 and not lines[first].lstrip().startswith("-"):
        first -= 1
    return _checked("".join(lines[:first] + lines[last + 1 :]), keys[:index] + keys[index + 1 :])


def _last_line(node: yaml.Node) -> int:
    """Where its last word stands; the end of a block reaches over the comments below it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return max(_last_line(value) for _, value in node.value)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return max(map(_last_line, node.value))
    end = node.end_mark
    return end.line if end.column else end.line - 1


def _checked(text: str, wanted: tuple[Key, ...]) -> str:
    try:
        found = parse_keys(text)
    except KeysError:
        found = None
    if found != wanted:
        raise EditError("the file is not written as one entry a paragraph, so it must be changed by hand")
    return text


def edit_file(path: Path, change: Callable[[str], str], *, may_make: bool) -> None:
    """Put `change` of the file's text in its place; `may_make`: a file that is not there is an empty one.

    Raises:
        ValueError: the file cannot be read.
        KeysError, EditError: what `change` raises.
        OSError: it cannot be written.
    """
    with _locked(path):
        is_new = may_make and not path.exists()
        text = "" if is_new else read_text(path, "make it with `embedyard keys create`")
        write_atomically(path, change(text))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One change at a time, also of several processes. Where the system has no such locks, without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content as a whole, its rights and its owner kept; a new file is its owner's alone.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; the file is as it was.
    """
    target = path.resolve()  # a link stays a link
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _take_after(target, name)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _take_after(target: Path, name: str) -> None:
    try:
        old = target.stat()
    except FileNotFoundError:
        Path(name).chmod(_PRIVATE)
        return
    Path(name).chmod(old.st_mode & 0o777)
    with suppress(PermissionError):  # only root may give files away
        os.chown(name, old.st_uid, old.st_gid)
