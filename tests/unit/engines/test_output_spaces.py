"""The listed spaces of sparse outputs and of vectors of tokens are those that answers have, in memory and on disk."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.lib.engine_kit import Kit
from engines.disk_spaces import DiskSpaces, spaces_on_disk
from engines.hub.content_digests import ContentDigests
from engines.hub.file_selection import COLBERT_LINEAR, SPARSE_LINEAR
from engines.space import SIDES, Ingredients, Listed, list_output_spaces, output_name
from engines.spec import Matryoshka, ModelSpec, Output
from engines.types import Outputs, OutputsCall
from tests.testkit import late_models
from tests.testkit.model_folders import FolderFiles
from tests.testkit.sparse_models import save_router, save_splade

WIDTH = 48
PROMPTS = {"query": "q: ", "other": "o: "}
MODEL = Ingredients({"weights": "a", "sparse:weights": "b", "multi_vector:weights": "c"})
ALL: tuple[Output, ...] = ("dense", "sparse", "multi_vector")


def on_disk(folder: Path, prompts: dict[str, str]) -> DiskSpaces:
    spec = ModelSpec(model_id="m", source="fake/m", prompts=prompts)
    return spaces_on_disk(FolderFiles(folder), spec, "cpu", ContentDigests(None))


def bge_m3(kit: Kit, folder: Path) -> None:
    shutil.copytree(kit.recipe_folder("xlm-roberta-cls"), folder)
    for name, rows in ((SPARSE_LINEAR, 1), (COLBERT_LINEAR, 24)):
        torch.save({"weight": torch.randn(rows, WIDTH), "bias": torch.zeros(rows)}, folder / name)


FOLDERS: dict[str, Callable[[Kit, Path], None]] = {
    "splade": lambda _, folder: save_splade(folder),
    "router": lambda _, folder: save_router(folder),
    "bge-m3": bge_m3,
    "stanford": lambda _, folder: late_models.FAMILIES["stanford"].build(folder),
    "pooled": lambda _, folder: late_models.FAMILIES["pooled"].build(folder),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_listed_space_is_that_of_an_answer(kit: Kit, tmp_path: Path, name: str) -> None:
    FOLDERS[name](kit, tmp_path / name)
    engine = kit.load(tmp_path / name, prompts=PROMPTS)
    disk, info = on_disk(tmp_path / name, PROMPTS), engine.info
    listed = Listed(
        width=info.dimensions, prompts=info.prompts, matryoshka=info.matryoshka, outputs=info.outputs,
        vector_width=info.vector_width, token_pooling=info.token_pooling,
    )  # fmt: skip
    assert info.ingredients is not None
    found = list_output_spaces(info.ingredients, listed)

    assert found == disk.output_spaces
    assert bool(disk.spaces) == ("dense" in info.outputs)
    assert len(found) == 2 ** len(info.outputs) - 1 - ("dense" in info.outputs)
    for outputs, prompts in found.items():
        assert {"", "query", "other"} <= {*prompts}
        for side in SIDES:
            call = OutputsCall(
                model_id="m", texts=("text",), outputs=tuple(outputs.split("+")), input_type=side,  # type: ignore[arg-type]  # the names of outputs
            )  # fmt: skip
            result = asyncio.run(engine.run(call))
            assert isinstance(result, Outputs)
            assert result.space == prompts[side if side in prompts else ""][side]
    engine.close()


def test_each_output_prompt_and_side_has_a_space_of_its_own() -> None:
    listed = Listed(width=8, prompts=PROMPTS, matryoshka=Matryoshka(widths=(4,)), outputs=ALL, vector_width=2)
    found = list_output_spaces(MODEL, listed)
    spaces = [space for prompts in found.values() for row in prompts.values() for space in row.values()]

    assert [*found] == [
        "sparse", "multi_vector", "dense+sparse", "dense+multi_vector", "sparse+multi_vector",
        "dense+sparse+multi_vector",
    ]  # fmt: skip
    assert len({*spaces}) == len(spaces) == 6 * 3 * 2


def test_models_with_dense_vectors_only_list_no_others() -> None:
    assert list_output_spaces(MODEL, Listed(width=8, prompts={}, matryoshka=Matryoshka())) == {}


def test_the_head_of_another_output_does_not_change_a_space() -> None:
    listed = Listed(width=8, prompts={}, matryoshka=Matryoshka(), outputs=ALL, vector_width=2)
    other = Ingredients(MODEL.values | {"multi_vector:weights": "d"})
    before, after = list_output_spaces(MODEL, listed), list_output_spaces(other, listed)

    assert {name for name in before if before[name] == after[name]} == {"sparse", "dense+sparse"}


def test_merged_vectors_lie_in_another_space() -> None:
    listed = Listed(
        width=0, prompts={}, matryoshka=Matryoshka(), outputs=("multi_vector",), vector_width=2,
        token_pooling={"document": "by two"},
    )  # fmt: skip
    plain = Listed(width=0, prompts={}, matryoshka=Matryoshka(), outputs=("multi_vector",), vector_width=2)
    before, after = (list_output_spaces(MODEL, each)["multi_vector"][""] for each in (plain, listed))

    assert (before["query"], before["document"] != after["document"]) == (after["query"], True)
    assert output_name(["multi_vector"], "document", "by two") == "multi_vector of a document, merged by by two"


def test_a_head_that_cannot_be_read_leaves_the_other_outputs(kit: Kit, tmp_path: Path) -> None:
    bge_m3(kit, tmp_path / "m")
    (tmp_path / "m" / COLBERT_LINEAR).write_bytes(b"no head")
    found = on_disk(tmp_path / "m", {})

    assert (bool(found.spaces), [*found.output_spaces]) == (True, ["sparse", "dense+sparse"])


def test_listing_ninety_models_again_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(
        width=8, prompts={}, matryoshka=Matryoshka(), outputs=("dense", "sparse", "multi_vector"), vector_width=4
    )
    models = [Ingredients({**MODEL.values, "weights": f"{number:032x}"}) for number in range(90)]
    first = [list_output_spaces(model, listed) for model in models]
    monkeypatch.setattr("engines.space.space_of", None)

    assert [list_output_spaces(model, listed) for model in models] == first
