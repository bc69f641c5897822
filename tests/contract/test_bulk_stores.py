"""Runs the examples of docs/bulk.md: what `embedyard embed` wrote goes into stores that run inside the test.

Each needs its store, here or in the environment of the vector stores (`make install-test`); without it, it is skipped.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engines.testing.engine import WIDTH
from router.bulk.sources import Columns
from tests.unit.router.bulk.kit import job_of, run

PAGE = Path(__file__).parents[2] / "docs" / "bulk.md"
STORES = Path(sys.prefix) / "clients" / "stores" / "bin" / "python"
EXAMPLES = re.findall(r"^```python\n(.*?)^```\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The outputs of one input."""
    rows = [json.dumps({"text": f"text {n}", "title": f"title {n}"}) + "\n" for n in range(1, 31)]
    (tmp_path / "in.jsonl").write_text("".join(rows))
    run(job_of(tmp_path / "in.jsonl", tmp_path / "docs.jsonl", columns=Columns(kept=("title",))))
    return tmp_path


def interpreter_with(modules: list[str]) -> str:
    """Return the Python that has these modules, or skip the test."""
    for python in (sys.executable, str(STORES)):
        check = [python, "-c", f"import {', '.join(modules)}"]
        if Path(python).exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip(f"{modules} are not installed: make install-test")


@pytest.mark.parametrize("example", EXAMPLES, ids=["duckdb", "qdrant", "milvus", "pgvector"])
def test_an_example_finds_the_text_that_was_asked_for(folder: Path, example: str) -> None:
    if "docs.parquet" in example:
        pytest.importorskip("pyarrow")
        run(job_of(folder / "in.jsonl", folder / "docs.parquet", columns=Columns(kept=("title",))))
    python = interpreter_with(sorted(set(re.findall(r"^(?:import|from) (\w+)", example, re.MULTILINE))))
    example = example.replace("384", str(WIDTH))
    done = subprocess.run([python, "-c", example], cwd=folder, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stderr
    if "docs.csv" in example:
        first = (folder / "docs.csv").read_text().splitlines()[0]
        assert re.fullmatch(r'1,title 1,"\[[-0-9.e]+(, [-0-9.e]+){15}\]"', first)
    else:
        assert done.stdout.strip() == "('title 1',)"
