"""What is known of widely used models without a registry: the shipped one, as data of the package."""

from pathlib import Path

import pytest
from msgspec import structs

from router.registry import catalogue as module
from router.registry.catalogue import FILE, catalogue, known_model, with_known
from router.registry.new_entry import NewEntry
from router.registry.registry import Registry, parse_registry
from router.registry.starter import starter_text

ROOT = Path(__file__).parents[4]
HUB_IDS = [next(alias for alias in catalogue().aliases_of(name) if "/" in alias) for name in catalogue().models]


def test_the_catalogue_is_the_shipped_registry() -> None:
    shipped = (ROOT / "registry.yaml").read_bytes()

    assert (Path(module.__file__).parent / FILE).read_bytes() == shipped, "run make format: it copies registry.yaml"


@pytest.mark.parametrize("hub_id", HUB_IDS)
def test_an_entry_holds_everything_that_is_known(hub_id: str) -> None:
    known = known_model(hub_id)
    assert known is not None
    entry = with_known(NewEntry(name="mine", source=hub_id, aliases=(hub_id,)), known, Registry())
    registry = parse_registry(starter_text(has_embedded=False, entry=entry))

    assert registry.models["mine"] == structs.replace(known, model_id="mine")
    assert registry.resolve(hub_id).model_id == "mine"


def test_what_is_known_leaves_out_the_settings_and_the_package_of_the_shipped_file() -> None:
    known = known_model("sentence-transformers/all-MiniLM-L6-v2")

    assert known is not None
    assert (known.source, known.sha256, known.preload) == ("sentence-transformers/all-MiniLM-L6-v2", {}, False)
    assert known_model("BAAI/bge-m9") is None
    assert known_model("bge-m3") is None, "no hub id"


def test_names_that_are_taken_are_no_aliases_of_a_new_entry() -> None:
    known = known_model("Qwen/Qwen3-Embedding-0.6B")
    assert known is not None
    entry = NewEntry(name="qwen", source="Qwen/Qwen3-Embedding-0.6B", aliases=("Qwen/Qwen3-Embedding-0.6B",))
    taken = Registry(aliases={"qwen3-embedding:0.6b": "other"})

    assert with_known(entry, known, taken).aliases == ("Qwen/Qwen3-Embedding-0.6B",)
    assert with_known(entry, known, Registry()).aliases == ("Qwen/Qwen3-Embedding-0.6B", "qwen3-embedding:0.6b")
