"""Tests that the benchmarks' engine worker runs on trees of both layouts."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.lib.worker import PEER_SCRIPTS
from benchmarks.peers import layouts

SHOW = "import layouts; print(layouts.embed_call().__module__)"


def embed_call_of(tree: Path) -> subprocess.CompletedProcess[str]:
    """Ask for the class `EmbedCall` of a tree, in a process of its own, as the worker does."""
    path = os.pathsep.join([str(tree), str(PEER_SCRIPTS)])
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", SHOW], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["types", "records"])
def test_the_call_is_found_in_either_layout(tmp_path: Path, module: str) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").touch()
    (tmp_path / "engines" / f"{module}.py").write_text("class EmbedCall: ...")

    assert embed_call_of(tmp_path).stdout == f"engines.{module}\n"


def test_a_tree_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").touch()

    assert "no EmbedCall in engines.types or engines.records" in embed_call_of(tmp_path).stderr


@pytest.mark.parametrize("methods", [{"run": "new"}, {"embed": "old"}, {"run": "new", "embed": "old"}])
def test_a_host_is_called_by_the_newest_method_that_it_has(methods: dict[str, str]) -> None:
    host = SimpleNamespace(**{name: str(value).upper for name, value in methods.items()})

    assert layouts.run_of(host)() == next(iter(methods.values())).upper()  # type: ignore[comparison-overlap,call-arg]  # strings stand for methods


def test_a_host_with_neither_method_is_refused() -> None:
    with pytest.raises(AttributeError, match="neither run nor embed"):
        layouts.run_of(object())
