"""Edits YAML files as text, so that comments and order are kept: for the key file and the registry."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml


class EditError(Exception):
    """The change cannot be made; the file is unchanged."""


def last_line(node: yaml.Node) -> int:
    """Return the line of the node's last value; the end mark of a block is after the comments that follow it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return max(last_line(value) for _, value in node.value)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return max(map(last_line, node.value))
    end = node.end_mark
    return end.line if end.column else end.line - 1


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file's folder, so that processes edit one at a time. Does nothing on systems without flock."""
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
