"""Runs docs/vector-stores.md: qdrant in memory and Milvus Lite, with the answers of a server over fake engines.

The stores are in an environment of their own (`make install-test`); without it these tests are skipped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.testing.outputs import SPARSE_ENTRIES, fake_row
from tests.testkit.output_servers import serve_outputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vector-stores.md"
PYTHON = Path(sys.prefix) / "clients" / "stores" / "bin" / "python"
FIRST = "The cat sits outside"
DOCUMENTED_ADDRESS = "http://127.0.0.1:6008"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_outputs() as url:
        yield url


@pytest.fixture(scope="module")
def outcome(url: str) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.skip("the environment of the vector stores is not installed: make install-test")
    blocks = [block.replace(DOCUMENTED_ADDRESS, url) for block, _ in snippets()]
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vector_store_blocks.py")],
        input=json.dumps(blocks), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def snippets() -> list[tuple[str, str]]:
    """Return the Python blocks of the page, each with the output that stands behind it; empty where none does."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    return re.findall(pattern, PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_has_an_example_for_each_store() -> None:
    assert len(snippets()) == PAGE.read_text().count("```python") == 7


def test_every_example_prints_what_the_page_shows(outcome: dict[str, Any]) -> None:
    assert outcome["printed"] == [shown for _, shown in snippets()]


def test_what_pgvector_gets_is_read_as_it_reads_it_from_1_on(outcome: dict[str, Any]) -> None:
    _, dense, sparse = outcome["records"][0]
    pairs, dimension = sparse.removeprefix("{").split("}/")
    read = {int(place) - 1: float(value) for place, value in (pair.split(":") for pair in pairs.split(","))}

    assert read == weights_of(FIRST)
    assert int(dimension) == SPARSE_ENTRIES
    assert len(json.loads(dense)) == 16


def test_what_elasticsearch_and_weaviate_get_has_the_values_of_the_answer(outcome: dict[str, Any]) -> None:
    document, stored = outcome["documents"][0], outcome["objects"][0]

    assert document["sparse"] == {str(index): value for index, value in weights_of(FIRST).items()}
    assert all("." not in name for name in document["sparse"])
    assert outcome["search"]["query"]["sparse_vector"]["query_vector"].keys() <= {str(i) for i in range(SPARSE_ENTRIES)}
    assert stored["vectors"]["tokens"] == pytest.approx(fake_row(FIRST).vectors)


def weights_of(text: str) -> dict[int, float]:
    row = fake_row(text)
    return dict(zip(row.entries.tolist(), row.weights.tolist(), strict=True))
