"""The `embedyard` command: exit codes, output for eyes and pipes, and what it does not import."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from router import commands, terminal
from router.cli import SUMMARIES, cli
from router.commands import models
from router.settings import VARIABLES

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "litestar", "uvicorn", "limits", "numpy", "rich"}
HUB = {"huggingface_hub", "numpy", "rich"}
"""What it takes to look whether a model's files are here."""
FIVE_MISTAKES = """\
version: 1
default_model: bge-m4
models:
  - name: bge-m3
    source: BAAI/bge-m3
    poling: cls
    keep_alive: soon
  - name: bge-m3
    source: https://huggingface.co/BAAI/bge-m3
"""
GOOD = """\
version: 1
default_model: m3
models:
  - {name: bge-m3, source: BAAI/bge-m3, aliases: [m3], license: MIT, description: "Many\\nlanguages"}
  - {name: e5, source: o/e5, revision: v1, prompts: {query: "q: ", document: "d: "}, matryoshka: [64, 32]}
  - {name: q, source: ./q, matryoshka: {min: 32}}
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    path = tmp_path / "registry.yaml"
    path.write_text(GOOD)
    return path


def run(*args: str, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner().invoke(cli, args, env=env, prog_name="embedyard")


def test_check_prints_one_line_per_model(registry: Path) -> None:
    result = run("check")

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok  bge-m3  BAAI/bge-m3  (default)",
        "ok  e5  o/e5@v1",
        "ok  q  ./q",
        "registry.yaml: 3 models, no mistakes",
    ]


def test_check_lists_all_five_mistakes_and_exits_2(registry: Path) -> None:
    registry.write_text(FIVE_MISTAKES)

    result = run("check", str(registry))

    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.partition(": ")[0].strip() for line in result.stderr.splitlines()[1:]] == [
        "line 2, default_model",
        "line 6, models[0].poling (bge-m3)",
        "line 7, models[0].keep_alive (bge-m3)",
        "line 8, models[1].name (bge-m3)",
        "line 9, models[1].source (bge-m3)",
    ]


def test_check_without_a_file_checks_the_settings_too(registry: Path) -> None:
    (registry.parent / ".env").write_text("PORT=99999\n")

    result = run("check", env={"DEVICE": "gpu"})

    assert result.exit_code == 2
    assert "PORT=99999" in result.stderr
    assert "DEVICE=gpu" in result.stderr


def test_check_with_a_file_leaves_the_settings_alone(registry: Path) -> None:
    assert run("check", str(registry), env={"PORT": "99999"}).exit_code == 0


def test_check_takes_the_registry_that_the_settings_name(registry: Path) -> None:
    registry.rename(registry.parent / "other.yaml")

    assert run("check", env={"REGISTRY": "other.yaml"}).exit_code == 0
    assert "there is no file registry.yaml" in run("check").stderr


def test_models_is_plain_in_a_pipe(registry: Path) -> None:
    result = run("models")

    assert result.exit_code == 0
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["bge-m3", "absent", "", "", "", "MIT", "BAAI/bge-m3", "Many languages"],
        ["e5", "absent", "", "", "(64, 32)", "", "o/e5", ""],
        ["q", "absent", "", "", "(32+)", "", "./q", ""],
    ]


def test_models_is_a_table_on_a_terminal(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)

    lines = run("models", env={"COLUMNS": "140"}).stdout.splitlines()

    assert re.split(r"\s{2,}", lines[0].strip()) == list(models.COLUMNS)
    assert [line.split()[0] for line in lines[1:]] == ["bge-m3", "e5", "q"]
    assert lines[0].index("source") == lines[1].index("BAAI/bge-m3")


def test_models_as_json_holds_every_field(registry: Path) -> None:
    found = json.loads(run("models", "--json").stdout)

    assert [(model["model_id"], model["is_default"]) for model in found] == [
        ("bge-m3", True),
        ("e5", False),
        ("q", False),
    ]
    assert found[0]["aliases"] == ["m3"]
    assert found[1]["prompts"] == {"query": "q: ", "document": "d: "}
    assert found[2]["matryoshka"] == {"widths": [], "minimum": 32, "layer_norm": False}


@pytest.mark.parametrize("content", [FIVE_MISTAKES, None])
def test_models_of_a_broken_or_missing_file_exits_2(registry: Path, content: str | None) -> None:
    registry.write_text(content) if content else registry.unlink()

    result = run("models", "--registry", str(registry))

    assert result.exit_code == 2
    assert "in the registry:" in result.stderr


def test_help_shows_commands_and_examples_without_importing_them() -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert "Examples:\n    embedyard check" in result.stdout
    assert SUMMARIES["check"] in result.stdout


def test_every_command_has_a_line_in_the_help_and_an_example() -> None:
    names = [module.name for module in pkgutil.iter_modules(commands.__path__)]

    assert set(names) <= SUMMARIES.keys()
    for name in names:
        command = importlib.import_module(f"router.commands.{name}").command
        assert isinstance(command, click.Command)


@pytest.mark.parametrize("name", ["check", "models"])
def test_help_of_a_command_has_examples(name: str) -> None:
    result = run(name, "--help")

    assert result.exit_code == 0
    assert f"  embedyard {name}" in result.stdout.partition("Examples:")[2]


def test_an_unknown_command_exits_2() -> None:
    result = run("chekc")

    assert result.exit_code == 2
    assert "chekc" in result.stderr


def test_version_is_shown() -> None:
    result = run("--version")

    assert result.exit_code == 0
    assert result.stdout.startswith("embedyard")


@pytest.mark.parametrize(("args", "allowed"), [("['check']", set()), ("['models']", HUB), ("['--help']", set())])
def test_light_commands_import_nothing_heavy(args: str, allowed: set[str]) -> None:
    program = f"""
import sys
from router.cli import cli
cli({args}, standalone_mode=False)
print("heavy:", *sorted(({HEAVY!r} - {allowed!r}) & set(sys.modules)))
"""

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "heavy:"


def test_the_module_runs_and_hub_variables_of_dotenv_arrive_first(registry: Path) -> None:
    (registry.parent / ".env").write_text("HF_HOME=/from/dotenv\n")
    program = """
import os, sys
from router.cli import main
sys.argv = ["embedyard", "check"]
try:
    main()
finally:
    print(os.environ["HF_HOME"])
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(registry.parent)}

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=registry.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "/from/dotenv"


def test_python_m_router_is_the_command(registry: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "router", "check"],
        cwd=registry.parent,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(registry.parent)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
