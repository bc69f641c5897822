"""`embedyard completion`: scripts that the shells accept, and what they offer."""

import shutil
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from router.cli import SUMMARIES, cli


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


def test_commands_and_options_are_offered() -> None:
    completer = ShellComplete(cli, {}, "embedyard", "_EMBEDYARD_COMPLETE")
    offered = {item.value for item in completer.get_completions([], "")}
    options = {item.value for item in completer.get_completions(["doctor"], "--")}

    assert {"serve", "doctor", "completion"} <= offered <= SUMMARIES.keys()
    assert "--json" in options
