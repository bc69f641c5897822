"""Checks the style of the code: lengths of modules and functions, class names, and words."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for package in ("engines", "router") for path in (ROOT / package).rglob("*.py"))
OLD_WORDS = (
    "Bequeath", "Birth", "Breaks", "Company", "Door", "Ears", "Edge", "Errand", "Farewell", "Glances", "Hangups",
    "Kept", "Lane", "Ledger", "Meters", "Notebook", "Outlook", "Pulse", "Scout", "Seat", "Spelt", "Tally",
    "Visit", "Yard",
)  # fmt: skip
"""Names of the first version that are no terms of the field; `ServerState` and others replaced them."""

TWICE = {
    "DeviceMemory", "Slot", "Usage",  # schemas of the HTTP contract, whose names are public; engines have such records
}  # fmt: skip
"""Class names that exist twice; no other name may."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_has_at_most_60_lines(path: Path) -> None:
    long = [f.name for f in functions(path) if (f.end_lineno or f.lineno) - f.lineno + 1 > 60]

    assert long == []


def identifiers(path: Path) -> Iterator[str]:
    """Yield every name that the code of a module defines or uses; words in strings and comments are none."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "name", "attr", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("package", ["engines", "router", "tests", "benchmarks"])
def test_the_words_of_the_first_build_are_gone(package: str) -> None:
    old = re.compile(rf"(?<![A-Z])({'|'.join(OLD_WORDS)})(?![a-z])")
    found = {
        f"{path}: {name}" for path in (ROOT / package).rglob("*.py") for name in identifiers(path) if old.search(name)
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
        for package in ("benchmarks", "engines", "router")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for module in imported(node)
        if module.partition(".")[0] == "tests"
    ]

    assert found == []


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
