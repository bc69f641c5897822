"""`embedyard pull`: exit codes, lines in pipes, bars on terminals. With a hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.lib import hub as loopback
from benchmarks.lib.hub import LISTING, LoopbackHub
from engines.hub import store as engines_hub
from engines.hub.client import HubConfig
from router.cli import pull
from router.cli.pull import command
from router.config.settings import VARIABLES
from tests.testkit.model_folders import plain_model, tensors

REGISTRY = """\
version: 1
models:
  - {name: one, source: org/one, aliases: [uno]}
  - {name: two, source: org/two}
  - {name: here, source: ./here}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with two repositories, a folder beside the registry, and a cache that is empty."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    plain_model(tmp_path / "here")
    with LoopbackHub() as hub:
        hub.add("org/one", plain_model(tmp_path / "repo-one"))
        hub.add("org/two", plain_model(tmp_path / "repo-two", tensors(seed=2)))
        config = HubConfig(endpoint=hub.url, cache_dir=str(tmp_path / "cache"), token=False, backoff_s=0.0)
        # The command takes the hub from the environment, which huggingface_hub read when it was imported.
        monkeypatch.setattr(engines_hub, "HubConfig", lambda: config)
        yield hub


def run(*args: str) -> Result:
    return CliRunner().invoke(command, args, prog_name="embedyard pull")


def test_models_are_pulled_by_name_or_alias(hub: LoopbackHub) -> None:
    result = run("uno", "two")

    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["ok", "one"], ["ok", "two"]]
    assert result.stderr == ""


def test_a_model_named_twice_is_pulled_once(hub: LoopbackHub) -> None:
    assert run("one", "uno").stdout.count("ok  one") == 1


def test_all_means_all_of_the_registry(hub: LoopbackHub) -> None:
    result = run("--all")

    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["one", "two", "here"]
    assert hub.downloads("org/one", "model.safetensors") == 1


def test_a_line_names_size_and_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.add("org/one", tmp_path / "repo-one")

    assert run("one").stdout == f"ok  one  4.3 KiB  {commit[:12]}\n"


def test_one_failure_does_not_stop_the_others(hub: LoopbackHub) -> None:
    hub.fail("org/one", loopback.gated(), file="model.safetensors")

    result = run("--all")

    assert result.exit_code == 1
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["two", "here"]
    assert result.stderr.startswith("failed  one  org/one is gated: accept its licence at http://")
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_folder_fails(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "here" / "config.json").unlink()

    result = run("here")

    assert result.exit_code == 1
    assert "config.json is missing" in result.stderr


def test_pulling_again_brings_what_is_newer_and_nothing_else(hub: LoopbackHub, tmp_path: Path) -> None:
    run("--all")
    commit = hub.add("org/one", plain_model(tmp_path / "newer", tensors(seed=9)))

    result = run("--all")

    assert commit[:12] in result.stdout
    assert hub.downloads("org/one", "model.safetensors") == 2
    assert hub.downloads("org/two", "model.safetensors") == 1


def test_what_is_here_stays_good_when_the_hub_is_down(hub: LoopbackHub) -> None:
    run("one")
    hub.fail("org/one", loopback.server_error(503))

    result = run("one")

    assert result.exit_code == 0
    assert result.stdout.startswith("ok  one  ")
    assert "not checked for updates: http://" in result.stdout


def test_a_hub_that_is_down_fails_what_is_not_here(hub: LoopbackHub) -> None:
    hub.fail("org/one", loopback.server_error(503), file=LISTING)

    result = run("one")

    assert result.exit_code == 1
    assert "answered 503" in result.stderr


@pytest.mark.parametrize("args", [[], ["one", "--all"], ["--registry"], ["one", "--nonsense"]])
def test_a_wrong_command_line_exits_2(hub: LoopbackHub, args: list[str]) -> None:
    result = run(*args)

    assert result.exit_code == 2
    assert hub.requests == []


def test_a_model_of_the_hub_need_not_be_in_the_registry(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/three", plain_model(tmp_path / "repo-three", tensors(seed=3)))
    listed = run("org/three", "one")
    (tmp_path / "registry.yaml").unlink()
    alone = run("org/three")

    assert (listed.exit_code, alone.exit_code) == (0, 0)
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["ok", "three"], ["ok", "one"]]
    assert alone.stdout.startswith("ok  three  ")
    assert hub.downloads("org/three", "model.safetensors") == 1


def test_an_unknown_model_exits_2_before_anything_is_pulled(hub: LoopbackHub) -> None:
    result = run("one", "onne")

    assert result.exit_code == 2
    assert "did you mean one" in result.stderr
    assert hub.requests == []


def test_a_registry_with_mistakes_exits_2(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("version: 7\n")

    result = run("--all", "--registry", "other.yaml")

    assert result.exit_code == 2
    assert "version" in result.stderr


def test_another_registry_can_be_given(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("version: 1\nmodels:\n  - {name: deux, source: org/two}\n")

    assert run("--all", "--registry", "other.yaml").stdout.startswith("ok  deux  ")


def test_model_path_alone_is_enough(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registry.yaml").unlink()
    monkeypatch.setenv("MODEL_PATH", "org/two")

    assert run("--all").stdout.startswith("ok  two  ")


def test_a_long_download_says_in_a_pipe_how_far_it_is(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/one", plain_model(tmp_path / "long", {"big": np.zeros(3_000_000, np.float32)}))
    hub.fail("org/one", loopback.Slow(bytes_per_s=8_000_000), file="model.safetensors")

    lines = run("one").stdout.splitlines()

    assert len(lines) >= 3
    assert all(line.startswith("...  one  ") and line.endswith(" of 11.4 MiB") for line in lines[:-1])
    assert lines[-1].startswith("ok  one  11.4 MiB  ")


def test_a_terminal_shows_bars_and_keeps_the_outcomes(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "is_terminal", lambda: True)
    hub.fail("org/two", loopback.gated(), file="model.safetensors")

    result = run("--all")

    assert result.exit_code == 1
    assert "ok  one  4.3 KiB" in result.stdout
    assert "failed  two  org/two is gated" in result.stdout
    assert "━" in result.stdout
