"""The house stays readable: modules that fit in a sitting, functions that fit in the eye."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for room in ("engines", "router") for path in (ROOT / room).rglob("*.py"))
OLD_WORDS = (
    "Bequeath", "Birth", "Breaks", "Company", "Door", "Ears", "Edge", "Errand", "Farewell", "Glances", "Hangups",
    "Kept", "Lane", "Ledger", "Meters", "Notebook", "Outlook", "Pulse", "Scout", "Seat", "Spelt", "Tally",
    "Visit", "Yard",
)  # fmt: skip
"""Names of the first build that are no terms of the field; `ServerState`, `DeviceScheduler` and others replace them."""

TWICE = {
    "DeviceMemory", "Slot", "Usage",  # schemas of the HTTP contract, whose names are public; engines have such records


}  # fmt: skip
"""Class names that stand for two things today; no further one may."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_fits_in_the_eye(path: Path) -> None:
    long = [f.name for f in functions(path) if (f.end_lineno or f.lineno) - f.lineno + 1 > 60]

    assert long == []


def identifiers(path: Path) -> Iterator[str]:
    """Yield every name that the code of a module defines or uses; words in strings and comments are none."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "name", "attr", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("room", ["engines", "router", "tests", "benchmarks"])
def test_the_words_of_the_first_build_are_gone(room: str) -> None:
    old = re.compile(rf"(?<![A-Z])({'|'.join(OLD_WORDS)})(?![a-z])")
    found = {
        f"{path}: {name}" for path in (ROOT / room).rglob("*.py") for name in identifiers(path) if old.search(name)
    }

    assert found == set()


def test_a_public_class_name_exists_once() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))

    assert {name: files for name, files in places.items() if len(files) > 1 and name not in TWICE} == {}


def test_benchmarks_and_the_product_import_no_tests() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for room in ("benchmarks", "engines", "router")
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for module in imported(node)
        if module.partition(".")[0] == "tests"
    ]

    assert found == []


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
