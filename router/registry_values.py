"""The forms of single values in `registry.yaml`. A leaf: every reader raises `ValueError` saying what is allowed."""

import re

MAX_NAME_CHARS = 200
NAME_PATTERN = r"^[^\s/]+(/[^\s/]+)*$"
SOURCE_ALLOWED = (
    "a hub id such as BAAI/bge-m3, a local folder (starting with /, ./, ../ or ~) or package:NAME/SUB/FOLDER"
)
_NAME_ALLOWED = f"a name without spaces, of at most {MAX_NAME_CHARS} characters; slashes only between other characters"
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?", re.ASCII)
_PACKAGE = re.compile(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/[^/\s]+)*", re.ASCII)
_LOCAL = re.compile(r"(/|\./|\.\./|~).*|\.|\.\.")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def is_commit(revision: object) -> bool:
    """Whether a revision is a full commit: 40 hexadecimal digits."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def is_hub_id(source: object) -> bool:
    """Whether a source names a repository of the hub."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None


def name(value: object) -> str:
    """A model's name or alias. It travels in URLs, so it has no empty parts, no `.` and no `..` between slashes."""
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(_NAME_ALLOWED)
    if len(value) > MAX_NAME_CHARS or {".", ".."} & set(value.split("/")):
        raise ValueError(_NAME_ALLOWED)
    return value


def source(value: object) -> str:
    """Where a model's files are, as `ModelSpec.source` defines it."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(SOURCE_ALLOWED)
    if value.startswith("package:"):
        if not _PACKAGE.fullmatch(value) or ".." in value.split("/"):
            raise ValueError("package:NAME/SUB/FOLDER, the folder inside an installed Python package")
    elif not (_LOCAL.fullmatch(value) or is_hub_id(value)):
        raise ValueError(SOURCE_ALLOWED)
    return value


def revision(value: object) -> str:
    """A branch, a tag or a commit. YAML reads a bare `1234567` as a number."""
    if not isinstance(value, str) or not re.fullmatch(r"\S+", value):
        raise ValueError("a branch, a tag or a commit; put it in quotes if it looks like a number")
    return value


def prompt_name(value: object) -> str:
    """What a request may send as `input_type`."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("a name such as query or document")
    return value


def prompt(value: object) -> str:
    r"""A text to put in front. A backslash followed by an n is a line break that lost its double quotes."""
    if not isinstance(value, str):
        raise ValueError("text in double quotes")
    if r"\n" in value:
        raise ValueError(r'a line break where it has the two characters \n: put the text in "double quotes"')
    return value


def template(value: object) -> str:
    """An instruct model's query template.

    `{text}` stands exactly once, for the input; `{task}` at least once, for the request's `instruction`, which would
    otherwise be lost in silence. Another word in braces is a misspelling; all other braces are plain characters.
    """
    text = prompt(value)
    found = _PLACEHOLDER.findall(text)
    unknown = sorted(set(found) - {"task", "text"})
    if unknown:
        raise ValueError(f"{{task}} and {{text}} as its only placeholders, not {{{unknown[0]}}}")
    if found.count("text") != 1 or "task" not in found:
        raise ValueError('{text} exactly once and {task} at least once, as in "Instruct: {task}\\nQuery:{text}"')
    return text
