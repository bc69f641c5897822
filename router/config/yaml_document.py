"""Reads YAML into plain values and keeps the line of each.

PyYAML alone drops line numbers, and silently keeps the last of duplicate keys.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml
from msgspec import Struct

_QUOTED = re.compile(r"'[^']*'")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_HARMLESS_CHARS = 24
_MAX_SHOWN_CHARS = 60
_MAX_DEPTH = 32
"""Most nested mappings and lists; a registry has five. PyYAML recurses, and fails at 500."""
_MAX_REPEATED = 100_000
"""Most values that aliases may repeat: nine lists of nine aliases each would be a billion."""
_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

KeyPath = tuple[str | int, ...]
"""The path of a value: `("models", 2, "pooling")`."""


class Mistake(Struct, frozen=True):
    """One mistake in a file: its path and line, the name of its entry if known, and the remedy."""

    path: KeyPath
    message: str
    line: int | None = None
    entry: str | None = None

    def __str__(self) -> str:
        place = show_path(self.path) + (f" ({self.entry})" if self.entry else "")
        where = ", ".join(part for part in (f"line {self.line}" if self.line else "", place) if part)
        return f"{where}: {self.message}" if where else self.message


def show_path(path: KeyPath) -> str:
    """Format a path: `models[2].prompts.query`."""
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shown.removeprefix(".")


class FileError(Exception):
    """A file is invalid. `mistakes`: all of them, in the order of the file."""

    file: ClassVar[str] = "the file"

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        self.mistakes = mistakes
        noun = "mistake" if len(mistakes) == 1 else "mistakes"
        super().__init__("\n".join([f"{len(mistakes)} {noun} in {self.file}:", *(f"  {m}" for m in mistakes)]))


class Document:
    """The value of a file, the lines of its keys, and the mistakes found so far.

    It holds one mistake per path, the first one found.

    Args:
        entries: the path of the list whose items have names.
        label: the key that holds the name of an item.
        is_secret: never quote the file in mistakes, because it may hold a secret in the wrong place.
    """

    def __init__(self, *, entries: KeyPath = ("models",), label: str = "name", is_secret: bool = False) -> None:
        self.value: Any = None
        self.is_secret = is_secret
        self._entries = entries
        self._label = label
        self._lines: dict[KeyPath, int] = {}
        self._mistakes: dict[KeyPath, tuple[str, int | None]] = {}

    def add(self, path: KeyPath, message: str, *, line: int | None = None) -> None:
        """Add a mistake. The default line is that of the key, or of its nearest parent."""
        line = line or self.line(path)
        if self.is_secret:
            path = tuple("…" if isinstance(part, str) and len(part) > _MAX_HARMLESS_CHARS else part for part in path)
        self._mistakes.setdefault(path, (message, line))

    def quote(self, text: str) -> str:
        """Return a text of the file as messages may quote it."""
        return "…" if self.is_secret else text

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        """All mistakes, in the order of the file."""
        found = (Mistake(path, text, line, self._name(path)) for path, (text, line) in self._mistakes.items())
        return tuple(sorted(found, key=lambda mistake: mistake.line or 0))

    def line(self, path: KeyPath) -> int | None:
        """Return the line of the path, or of its nearest parent."""
        while path not in self._lines and path:
            path = path[:-1]
        return self._lines.get(path)

    def set_line(self, path: KeyPath, line: int) -> None:
        """Store the line of a key or list item; the first one is kept."""
        self._lines.setdefault(path, line)

    def _name(self, path: KeyPath) -> str | None:
        depth = len(self._entries)
        if len(path) <= depth or path[:depth] != self._entries:
            return None
        try:
            found = self.value
            for part in path[: depth + 1]:
                found = found[part]
            name = found[self._label]
        except (LookupError, TypeError):
            return None
        return name if isinstance(name, str) and not (self.is_secret and len(name) > _MAX_HARMLESS_CHARS) else None


def read_text(path: Path, remedy: str) -> str:
    """Read the text of a file.

    Args:
        path: of the file.
        remedy: what to do if the file does not exist.

    Raises:
        ValueError: why it cannot be read, with the file's name but not its path.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path.name}: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path.name} cannot be read: {reason}") from None


def read_document(text: str, document: Document | None = None) -> Document:
    """Read a YAML text into a document; syntax errors and duplicate keys become mistakes of the document."""
    document = document or Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.value = _Reader(loader, document).read(node, ())
    except yaml.YAMLError as error:
        _add_syntax_error(document, error)
    return document


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit of `_MAX_DEPTH` nested collections."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            problem = f"lists and mappings are nested more than {_MAX_DEPTH} deep"
            event = self.peek_event()  # type: ignore[no-untyped-call]  # the parser's methods have no types
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _add_syntax_error(document: Document, error: yaml.YAMLError) -> None:
    mark = error.problem_mark or error.context_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if isinstance(error, yaml.MarkedYAMLError) and mark:
        problem = str(error.problem or error.context)
        if document.is_secret:
            problem = _QUOTED.sub("…", problem)
        document.add((), f"not valid YAML at column {mark.column + 1}: {problem}", line=mark.line + 1)
    else:  # a character that YAML forbids: PyYAML knows its position, not its line
        document.add((), f"not valid YAML: {str(error).splitlines()[0]}")


class _Reader:
    """Converts YAML nodes to values, with one method per kind of node."""

    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self._loader = loader
        self._document = document
        self._open: list[yaml.Node] = []
        self._seen: set[yaml.Node] = set()
        self._num_repeated = 0

    def read(self, node: yaml.Node | None, path: KeyPath) -> Any:
        if node is None:
            return None
        if node in self._open:
            self._document.add(path, "an anchor cannot contain itself", line=node.start_mark.line + 1)
            return None
        self._count(node)
        self._document.set_line(path, node.start_mark.line + 1)
        self._open.append(node)
        try:
            if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTION_TAGS:
                self._document.add(path, f"the tag {self._document.quote(node.tag)} is unknown: remove it")
            if isinstance(node, yaml.MappingNode):
                return dict(self._pairs(node, path))
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _count(self, node: yaml.Node) -> None:
        self._num_repeated += node in self._seen
        self._seen.add(node)
        if self._num_repeated > _MAX_REPEATED:
            problem = f"aliases (*name) repeat more than {_MAX_REPEATED} values; write them out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def _pairs(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._document.add(
                    (*path, "<<"), "merge keys (<<) are not supported: write the keys out, or use defaults", line=line
                )
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._document.add((*path, str(shown)), "a key must be text: put it in quotes", line=line)
                continue
            key = key_node.value
            if key in seen:
                self._document.add((*path, key), f"duplicate key, first on line {seen[key]}: remove one", line=line)
                continue
            seen[key] = line
            self._document.set_line((*path, key), line)
            yield key, self.read(value_node, (*path, key))

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        with suppress(yaml.YAMLError, ValueError):
            value = self._loader.construct_object(node)
            if _is_supported(value):
                return value
        shown = repr(node.value if len(node.value) <= _MAX_SHOWN_CHARS else f"{node.value[:_MAX_SHOWN_CHARS]}...")
        self._document.add(
            path, f"{self._document.quote(shown)} cannot be read: put it in quotes if it is meant as text"
        )
        return None


def _is_supported(value: object) -> bool:
    """Whether a value can be used and printed: no integer of more than 64 bits, no lone surrogate."""
    if isinstance(value, int):
        return value.bit_length() <= 64
    return not (isinstance(value, str) and _SURROGATE.search(value))
