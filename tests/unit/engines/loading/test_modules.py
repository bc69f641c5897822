"""Tests what the embedding head rejects; test_parity compares what it computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.models import WIDTH, dense, edit_json, reference
from benchmarks.lib.workloads import SENTENCES
from engines.errors import BrokenFiles, UnsupportedModel
from engines.loading.module_settings import pooling_of
from tests.testkit.refusals import refusal

TEXTS = list(SENTENCES[:6])
DENSE = "2_Dense"


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A copy of a BERT with Dense and Normalize for a test to break."""
    return Path(shutil.copytree(kit.recipe_folder("bert-dense-identity"), tmp_path / "bert"))


def _modules(folder: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = json.loads((folder / "modules.json").read_text())
    return lines


def _write_modules(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "modules.json").write_text(json.dumps(lines))


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("break_it", [Path.unlink, _halve, lambda path: path.write_bytes(b"")])
def test_dense_weights_that_are_missing_or_broken_are_named(
    kit: Kit, folder: Path, break_it: Callable[[Path], None]
) -> None:
    break_it(folder / DENSE / "model.safetensors")
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == f"{DENSE}/model.safetensors"
    assert f"{DENSE}/model.safetensors" in str(error)


def test_a_broken_pickle_of_dense_weights_is_named(kit: Kit, folder: Path) -> None:
    (folder / DENSE / "model.safetensors").unlink()
    (folder / DENSE / "pytorch_model.bin").write_bytes(b"\x80\x04no pickle")

    assert f"{DENSE}/pytorch_model.bin is truncated or corrupt" in str(refusal(kit, folder))


def test_a_pickle_that_would_run_code_is_refused(kit: Kit, folder: Path) -> None:
    (folder / DENSE / "model.safetensors").unlink()
    torch.save({"linear.weight": dense}, folder / DENSE / "pytorch_model.bin")

    assert f"{DENSE}/pytorch_model.bin" in str(refusal(kit, folder))


def test_a_dense_without_its_matrix_is_named(kit: Kit, folder: Path) -> None:
    save_file({"weight": torch.zeros(64, WIDTH)}, folder / DENSE / "model.safetensors")

    assert f"{DENSE}/model.safetensors lacks 'linear.weight' (it holds weight)" in str(refusal(kit, folder))


def test_an_unused_dense_tensor_is_refused(kit: Kit, folder: Path) -> None:
    weights = load_file(folder / DENSE / "model.safetensors")
    save_file({**weights, "gate.weight": torch.zeros(2)}, folder / DENSE / "model.safetensors")

    assert "holds 'gate.weight'" in str(refusal(kit, folder))


def test_dense_weights_that_do_not_fit_their_config_are_named(kit: Kit, folder: Path) -> None:
    edit_json(folder / DENSE / "config.json", out_features=32)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert f"is 64 x {WIDTH}, but {DENSE}/config.json needs 32 x {WIDTH}" in str(error)


def test_a_dense_that_takes_another_width_is_refused(kit: Kit, folder: Path) -> None:
    edit_json(folder / "1_Pooling/config.json", pooling_mode=["cls", "mean"])
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert f"in_features in {DENSE}/config.json is {WIDTH}, but the vectors have width {2 * WIDTH}" in str(error)


@pytest.mark.parametrize(
    "activation",
    ["transformers.activations.GELUActivation", "os.system", "torch.nn.functional.relu", "torch.nn.X", None],
)
def test_an_activation_that_is_not_of_torch_is_refused_instead_of_replaced(
    kit: Kit, folder: Path, activation: str | None
) -> None:
    edit_json(folder / DENSE / "config.json", activation_function=activation)
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert f"{DENSE}/config.json names the activation {activation!r}" in str(error)


def test_an_activation_left_out_is_tanh(kit: Kit, folder: Path) -> None:
    config = json.loads((folder / DENSE / "config.json").read_text())
    del config["activation_function"]
    (folder / DENSE / "config.json").write_text(json.dumps(config))

    assert_same(embed(kit.load(folder), TEXTS), encode(reference(folder), TEXTS))


@pytest.mark.parametrize("kind", ["CNN", "LSTM", "WeightedLayerPooling", "Router", "Pooling2"])
def test_an_unknown_module_is_refused_by_name(kit: Kit, folder: Path, kind: str) -> None:
    lines = _modules(folder)
    lines[2]["type"] = f"sentence_transformers.models.{kind}"
    _write_modules(folder, lines)
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert (
        f"modules.json names the unsupported module {kind!r}; supported: Pooling, Dense, LayerNorm, Normalize, Dropout"
        in str(error)
    )


def test_dropout_does_nothing(kit: Kit, folder: Path) -> None:
    lines = _modules(folder)
    (folder / "9_Dropout").mkdir()
    (folder / "9_Dropout/config.json").write_text('{"dropout": 0.9}')
    dropout = {"idx": 9, "name": "9", "path": "9_Dropout", "type": "sentence_transformers.models.Dropout"}
    _write_modules(folder, [*lines[:2], dropout, *lines[2:]])

    assert_same(embed(kit.load(folder), TEXTS), embed(kit.engine("bert-dense-identity"), TEXTS))


def test_modules_run_in_the_order_of_the_file_whatever_their_idx_says(kit: Kit, folder: Path) -> None:
    lines = _modules(folder)
    for line in lines:
        line["idx"] = 7 - line["idx"]
    _write_modules(folder, lines)

    assert_same(embed(kit.load(folder), TEXTS), encode(reference(folder), TEXTS))


def test_a_dense_in_front_of_the_pooling_that_feeds_it_is_refused(kit: Kit, folder: Path) -> None:
    transformer, pooling, projection, _ = _modules(folder)
    _write_modules(folder, [transformer, projection, pooling])

    assert f"{DENSE} (Dense) reads 'sentence_embedding', but the modules before it give token_embeddings" in str(
        refusal(kit, folder)
    )


def test_without_a_pooling_module_the_registry_must_say(kit: Kit, folder: Path) -> None:
    lines = _modules(folder)
    _write_modules(folder, [lines[0], *lines[2:]])

    assert "modules.json has no Pooling module" in str(refusal(kit, folder))
    assert_same(embed(kit.load(folder, pooling=("mean",)), TEXTS), embed(kit.engine("bert-dense-identity"), TEXTS))


def test_a_pooling_that_contradicts_itself_is_refused_until_the_registry_settles_it(kit: Kit, folder: Path) -> None:
    edit_json(folder / "1_Pooling/config.json", pooling_mode_cls_token=True)
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert "1_Pooling/config.json states two poolings, mean (pooling_mode) and cls (legacy keys)" in str(error)
    assert_same(embed(kit.load(folder, pooling=("mean",)), TEXTS), embed(kit.engine("bert-dense-identity"), TEXTS))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode": "cls", "pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_mean_tokens": False}, ("mean",)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
    ],
)
def test_pooling_modes_are_read_in_both_vocabularies(config: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert pooling_of(config, "1_Pooling/config.json") == modes


def test_an_unknown_pooling_is_refused(kit: Kit, folder: Path) -> None:
    edit_json(folder / "1_Pooling/config.json", pooling_mode="attention")

    with pytest.raises(
        UnsupportedModel, match=r"1_Pooling/config\.json names the unsupported pooling 'attention'; supported: cls"
    ):
        kit.load(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("break_it", [Path.unlink, _halve])
def test_a_static_model_without_a_file_is_refused_by_its_name(
    kit: Kit, tmp_path: Path, file: str, break_it: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("static"), tmp_path / "static"))
    kept = next(path for path in (folder / file, folder / "0_StaticEmbedding" / file) if path.exists())
    break_it(kept)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == str(kept.relative_to(folder))
