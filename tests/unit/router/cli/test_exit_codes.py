"""The exit codes in docs/operations.md are those of `--help`, and each of them is the outcome of a command."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engines.hub import store as engines_hub
from engines.hub.client import HubConfig
from router.cli.main import SUMMARIES, cli
from router.config.settings import VARIABLES
from tests.testkit.model_folders import plain_model, sentence_model, write_json

ROOT = Path(__file__).parents[4]
REGISTRY = """\
version: 1
models:
  - {name: gone, source: ./gone}
  - {name: gpu, source: ./model, device: cuda}
"""
CASES = {
    ("serve", 2): ["serve", "none"],
    ("init", 2): ["init"],
    ("add", 1): ["add", "./sparse"],
    ("add", 2): ["add", "./none"],
    ("check", 1): ["check"],
    ("check", 2): ["check", "none.yaml"],
    ("models", 2): ["models", "--registry", "none.yaml"],
    ("pull", 1): ["pull", "gone"],
    ("pull", 2): ["pull", "none"],
    ("plan", 1): ["plan", "gpu"],
    ("plan", 2): ["plan", "none"],
    ("replay", 2): ["replay", "none.jsonl"],
    ("precision", 1): ["precision", "gone"],
    ("precision", 2): ["precision", "none"],
    ("spaces", 1): ["spaces", "registry.yaml", "registry.yaml"],
    ("spaces", 2): ["spaces", "none.yaml"],
    ("calibrate", 2): ["calibrate", "gpu", "none.txt"],
    ("embed", 2): ["embed", "none", "none.txt", "-o", "out.jsonl"],
    ("keys", 2): ["keys", "list", "--file", "none.yaml"],
    ("bench", 2): ["bench", "http://127.0.0.1:9", "--rate", "1", "--seconds", "1", "--no-report"],
    ("ray", 2): ["ray", "deploy"],
    ("doctor", 1): ["doctor"],
}
ELSEWHERE = {
    ("serve", 1): "tests/integration/test_shutdown.py",
    ("embed", 1): "tests/unit/router/cli/test_embed.py",
    ("bench", 1): "tests/unit/router/cli/test_bench.py",
}
"""Codes that take a running server, and the tests that have one."""


def documented(language: str = "") -> set[tuple[str, int]]:
    """Return the commands and codes of the table in the docs."""
    text = (ROOT / "docs" / language / "operations.md").read_text()
    rows = re.findall(rf"^\| `({'|'.join(SUMMARIES)})` \|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    rows = [(name, no.strip(), wrong.strip()) for name, no, wrong in rows]
    return {(name, code) for name, *cells in rows for code, cell in enumerate(cells, start=1) if cell}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of a model that is not here and one for a GPU, a model that cannot be served, and no hub."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    plain_model(tmp_path / "model")
    sparse = sentence_model(tmp_path / "sparse")
    write_json(sparse / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "state"))
    config = HubConfig(endpoint="http://127.0.0.1:9", cache_dir=str(tmp_path / "cache"), offline=True)
    monkeypatch.setattr(engines_hub, "HubConfig", lambda: config)
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="embedyard")


def test_every_documented_code_has_a_case() -> None:
    assert documented() == CASES.keys() | ELSEWHERE.keys()
    assert documented("zh") == documented()
    for file in ELSEWHERE.values():
        assert re.search(r"(exit_code|returncode|wait\(\d+\)).* == 1", (ROOT / file).read_text()), file


@pytest.mark.parametrize("name", sorted(SUMMARIES.keys() - {"completion"}))
def test_help_tells_the_codes_of_the_docs(name: str) -> None:
    text = " ".join(run(name, "--help").stdout.partition("Options:")[0].split())
    told = {int(code) for code in re.findall(r"\b([012]):", text.partition("Exit code ")[2])}

    assert told == {0} | {code for command, code in documented() if command == name}


@pytest.mark.parametrize(("case", "args"), CASES.items(), ids=[f"{name} {code}" for name, code in CASES])
def test_a_command_exits_as_the_docs_say(folder: Path, case: tuple[str, int], args: list[str]) -> None:
    if case == ("ray", 2):
        (folder / "registry.yaml").write_text("version: 7\n")
    result = run(*args)

    assert result.exit_code == case[1], result.output
    assert result.output
