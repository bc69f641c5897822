"""`embedyard completion`: the shells accept the scripts; completed names and options."""

import shutil
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from router.cli.main import SUMMARIES, cli


def run(shell: str) -> Result:
    return CliRunner().invoke(cli, ["completion", shell], prog_name="embedyard")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_that_asks_embedyard(shell: str) -> None:
    result = run(shell)

    assert result.exit_code == 0
    assert f"_EMBEDYARD_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_it(shell: str, tmp_path: Path) -> None:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(run(shell).stdout)

    assert subprocess.run([found, "-n", str(script)], capture_output=True, check=False).returncode == 0


def test_an_unknown_shell_exits_2_and_names_the_known_ones() -> None:
    result = run("cmd")

    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry.yaml").write_text(
        "version: 1\nmodels:\n  - {name: bge-m3, source: BAAI/bge-m3, aliases: [big]}\n  - {name: e5, source: o/e5}\n"
    )
    (tmp_path / "other.yaml").write_text("version: 1\nmodels:\n  - {name: only, source: o/only}\n")
    (tmp_path / "keys.yaml").write_text(f"- {{id: web, sha256: '{'0' * 64}'}}\n- {{id: lab, sha256: '{'1' * 64}'}}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "begun", "expected"),
    [
        (["pull"], "", {"bge-m3", "big", "e5"}),
        (["pull", "e5"], "b", {"bge-m3", "big"}),
        (["serve"], "", {"bge-m3", "big", "e5"}),
        (["plan", "--registry", "other.yaml"], "", {"only"}),
        (["plan", "--registry", "none.yaml"], "", set()),
        (["keys", "revoke", "--file", "keys.yaml"], "w", {"web"}),
        (["keys", "revoke"], "", set()),
    ],
)
def test_names_are_offered_and_what_cannot_be_read_offers_none(
    folder: Path, args: list[str], begun: str, expected: set[str]
) -> None:
    completer = ShellComplete(cli, {}, "embedyard", "_EMBEDYARD_COMPLETE")

    assert {item.value for item in completer.get_completions(args, begun)} == expected


def test_commands_and_options_are_offered() -> None:
    completer = ShellComplete(cli, {}, "embedyard", "_EMBEDYARD_COMPLETE")
    offered = {item.value for item in completer.get_completions([], "")}
    options = {item.value for item in completer.get_completions(["doctor"], "--")}

    assert {"serve", "add", "init", "doctor", "completion"} <= offered <= SUMMARIES.keys()
    assert "--json" in options
