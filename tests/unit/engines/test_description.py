"""What a model's own files say of it: read from a folder whole, and from a hub without the weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lib.hub import LISTING, LoopbackHub, server_error
from engines.description import Description, describe
from engines.errors import AccessDenied, BrokenFiles, HubUnreachable, UnsupportedModel
from engines.hub.client import HubConfig
from engines.hub.store import ModelStore
from engines.spec import ModelSpec
from tests.testkit.model_folders import plain_model, sentence_model, write_json

CARD = "---\nlicense: apache-2.0\ntags:\n- embeddings\n---\n# A model\n"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def store(hub: LoopbackHub, tmp_path: Path) -> Iterator[ModelStore]:
    config = HubConfig(endpoint=hub.url, cache_dir=str(tmp_path / "cache"), token=False, backoff_s=0.0, offline=False)
    store = ModelStore(config)
    yield store
    store.close()


def full_model(folder: Path) -> Path:
    """Write a model that states everything: prompts, widths, a limit and a licence."""
    sentence_model(folder)
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query", "matryoshka_dims": [8, 4, 10]},
    )
    (folder / "README.md").write_text(CARD)
    return folder


FULL = Description(
    width=10, max_tokens=16, num_parameters=1032, prompts={"query": "q: "}, default_prompt="query",
    matryoshka_widths=(4, 8), license="Apache-2.0", outputs=("dense",),
)  # fmt: skip


def local(folder: Path) -> ModelSpec:
    return ModelSpec(model_id="m", source=str(folder))


def test_a_folder_tells_what_its_files_state(store: ModelStore, tmp_path: Path) -> None:
    assert describe(store, local(full_model(tmp_path / "full"))) == FULL


def test_a_hub_tells_the_same_and_nothing_large_is_downloaded(
    store: ModelStore, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add("org/full", full_model(tmp_path / "full"))

    assert describe(store, ModelSpec(model_id="m", source="org/full")) == FULL
    assert hub.downloads("org/full", "model.safetensors") == 1, "its header"
    assert hub.downloads("org/full", "tokenizer.json") == 0
    assert store.locate(ModelSpec(model_id="m", source="org/full")) is None


def test_a_hub_that_is_away_is_not_needed_for_what_is_on_disk(
    store: ModelStore, hub: LoopbackHub, tmp_path: Path
) -> None:
    spec = ModelSpec(model_id="m", source="org/full")
    hub.add("org/full", full_model(tmp_path / "full"))
    store.fetch(spec, lambda *_: None)
    hub.fail("org/full", server_error(), file=LISTING)
    found = describe(store, spec)

    assert (found.width, found.prompts) == (10, {"query": "q: "})
    assert found.license == "", "the model card is not among the files of a model"


def test_a_hub_that_is_away_is_said_so(store: ModelStore, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/full", full_model(tmp_path / "full"))
    hub.fail("org/full", server_error(), file=LISTING)

    with pytest.raises(HubUnreachable):
        describe(store, ModelSpec(model_id="m", source="org/full"))
    with pytest.raises(AccessDenied):
        describe(store, ModelSpec(model_id="m", source="org/other"))


def test_a_folder_without_modules_gets_the_pooling_that_sentence_transformers_takes(
    store: ModelStore, tmp_path: Path
) -> None:
    found = describe(store, local(plain_model(tmp_path / "plain")))

    assert (found.assumed_pooling, found.width, found.max_tokens) == ("mean", 10, 16)


@pytest.mark.parametrize(
    ("labels", "task"),
    [({"id2label": {"0": "LABEL_0"}}, "rerank"), ({"num_labels": 1}, "rerank"), ({"num_labels": 3}, "classify"),
     ({}, "classify")],
)  # fmt: skip
def test_a_classifier_with_one_label_reranks(
    labels: dict[str, object], task: str, store: ModelStore, tmp_path: Path
) -> None:
    folder = plain_model(tmp_path / "cross")
    write_json(
        folder / "config.json", {"architectures": ["BertForSequenceClassification"], "hidden_size": 10, **labels}
    )

    assert describe(store, local(folder)).task == task


def test_a_model_says_what_it_gives_for_a_text(store: ModelStore, tmp_path: Path) -> None:
    dense, late = sentence_model(tmp_path / "dense"), sentence_model(tmp_path / "late")
    write_json(late / "config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"})
    assert describe(store, local(dense)).outputs == ("dense",)

    (dense / "colbert_linear.pt").touch()
    found = describe(store, local(late))

    assert describe(store, local(dense)).outputs == ("dense", "multi_vector")
    assert (found.task, found.outputs, found.width) == ("embed", ("multi_vector",), None)


def test_a_model_that_cannot_be_served_is_refused_with_the_reason(store: ModelStore, tmp_path: Path) -> None:
    sparse = sentence_model(tmp_path / "sparse")
    write_json(sparse / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    no_weights = plain_model(tmp_path / "none")
    (no_weights / "model.safetensors").unlink()
    broken = plain_model(tmp_path / "broken")
    (broken / "config.json").write_text("{")

    with pytest.raises(UnsupportedModel, match="SparseEncoder"):
        describe(store, local(sparse))
    with pytest.raises(UnsupportedModel, match="no supported weights"):
        describe(store, local(no_weights))
    with pytest.raises(BrokenFiles, match=r"config\.json"):
        describe(store, local(broken))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, "Apache-2.0"),
        ("---\nlicense: other\nlicense_name: m3e\n---\n", "m3e"),
        ("---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: 'a\\nb\n---\n", ""),
        ("---\nlicense: " + "x" * 200 + "\n---\n", ""),
        ("---\nlicense: mit\n", ""),
        ("# no front matter\n---\nlicense: mit\n---\n", ""),
        ("---\n- mit\n---\n", ""),
        ("", ""),
    ],
)
def test_the_licence_is_that_of_the_model_card(card: str, expected: str, store: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "plain")
    (folder / "README.md").write_text(card)

    assert describe(store, local(folder)).license == expected


def test_a_card_that_is_not_text_has_no_licence(store: ModelStore, tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "plain")
    (folder / "README.md").write_bytes(b"\xff\xfe---\n")

    assert describe(store, local(folder)).license == ""


def test_the_count_of_parameters_is_that_of_the_weights(store: ModelStore, tmp_path: Path) -> None:
    found = describe(store, local(plain_model(tmp_path / "plain")))

    assert found.num_parameters == pytest.approx(1000, rel=0.05)
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["hidden_size"] == found.width


def test_a_folder_tells_which_outputs_it_gives(store: ModelStore, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "m3")
    assert describe(store, local(folder)).outputs == ("dense",)

    (folder / "sparse_linear.pt").write_bytes(b"")

    assert describe(store, local(folder)).outputs == ("dense", "sparse")
