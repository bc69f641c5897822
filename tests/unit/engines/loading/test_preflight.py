"""Tests that a folder whose config needs more memory than its weight files hold is rejected before allocation."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPTJConfig

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES, configure, edit_json
from engines.errors import BrokenFiles
from engines.loading import pretrained
from engines.loading.preflight import check_proportions
from engines.loading.weight_reader import WeightReader
from tests.testkit.model_folders import write_json
from tests.testkit.refusals import refusal

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A copy of a small BERT for a test to break."""
    return Path(shutil.copytree(kit.recipe_folder("bert-dense-identity"), tmp_path / "bert"))


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the folders whose weights are loaded, except the intact one that `refusal` loads afterwards."""
    loaded: list[str] = []
    load, read = AutoModel.from_pretrained, WeightReader

    def note(path: Path, **options: Any) -> Any:
        loaded.append(Path(path).name)
        return load(path, **options)

    def note_read(path: Path, *options: Any) -> Any:
        loaded.append(path.name)
        return read(path, *options)

    monkeypatch.setattr(AutoModel, "from_pretrained", note)
    monkeypatch.setattr(pretrained, "WeightReader", note_read)
    return loaded


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize("change", [lambda folder: None, _pickled], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 250), ("hidden_size", 40_000), ("vocab_size", 10**12), ("intermediate_size", 10**9),
        ("max_position_embeddings", 10**9), ("type_vocab_size", 10**10),
    ],
)  # fmt: skip
def test_a_config_of_a_larger_model_is_refused_before_any_weight_is_read(
    kit: Kit, folder: Path, nothing_is_loaded: list[str], change: Callable[[Path], None], key: str, value: int
) -> None:
    change(folder)
    edit_json(folder / "config.json", **{key: value})
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == "config.json"
    assert "parameters, but the weight files hold" in str(error)
    assert folder.name not in nothing_is_loaded


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "n_layer", "encoder_layers", "num_local_experts"])
def test_things_without_end_are_not_even_counted(
    kit: Kit, folder: Path, nothing_is_loaded: list[str], key: str
) -> None:
    edit_json(folder / "config.json", text_config={key: [3, 10**9]})
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert f"{key} in config.json is 1000000000, but the limit is 1024" in str(error)
    assert folder.name not in nothing_is_loaded


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [-5, 10**19, 10**40])
def test_numbers_that_no_tensor_can_have_are_refused(kit: Kit, folder: Path, key: str, value: int) -> None:
    edit_json(folder / "config.json", **{key: value})
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)


def test_computed_tables_are_bounded_too(kit: Kit) -> None:
    """GPT-J's sines are computed, not stored."""
    folder = kit.recipe_folder("bert-cls")
    config = configure(GPTJConfig, n_embd=48, n_layer=1, n_head=4, rotary_dim=4, vocab_size=900, n_positions=10**8)

    with pytest.raises(BrokenFiles, match="computed tables of 1600000000 bytes"):
        check_proportions(AutoModel, config, folder, [], trust_remote_code=False)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**63 + 5) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 60_000) + (b'{"a":' + b"[" * 59_995),
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9999999999]}}'[:62],
        struct.pack("<Q", 63) + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0, 16]}}' + bytes(16),
    ],
    ids=["length", "negative", "longer than the file", "nested", "cut", "shape"],
)
@pytest.mark.parametrize("name", [WEIGHTS, f"2_Dense/{WEIGHTS}"])
def test_a_wrong_header_is_refused(kit: Kit, folder: Path, name: str, header: bytes) -> None:
    (folder / name).write_bytes(header)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == name


@pytest.mark.parametrize("name", ["config.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize(
    "break_it",
    [lambda path: path.write_text('{"a":' * 100_000), lambda path: os.truncate(path, 2**30)],
    ids=["nested", "huge"],
)
def test_a_config_that_would_fill_the_memory_or_the_stack_is_refused(
    kit: Kit, folder: Path, name: str, break_it: Callable[[Path], None]
) -> None:
    break_it(folder / name)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == name


@pytest.mark.parametrize("width", [10**9, 10**30, -1, 0, 1.5, "wide", True, None])
def test_a_dense_width_that_is_none_is_refused(kit: Kit, folder: Path, width: object) -> None:
    edit_json(folder / "2_Dense/config.json", out_features=width)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert "2_Dense" in str(error)


@pytest.mark.parametrize(
    "mapping",
    [torch.zeros(3_000_000, dtype=torch.long), torch.full((900,), 50), torch.full((900,), -1), torch.zeros(30, 30)],
    ids=["long", "beyond", "negative", "flat"],
)
def test_a_mapping_that_does_not_fit_its_table_is_refused(kit: Kit, tmp_path: Path, mapping: torch.Tensor) -> None:
    vocabularies.bare().save(str(tmp_path / "tokenizer.json"))
    save_file({"embeddings": torch.randn(50, 24), "mapping": mapping}, tmp_path / WEIGHTS)
    kind = "sentence_transformers.models.StaticEmbedding"
    write_json(tmp_path / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])
    error = refusal(kit, tmp_path)

    assert isinstance(error, BrokenFiles)
    assert f"'mapping' in {WEIGHTS} has {mapping.numel()} entries for a table of 50 rows" in str(error)


@pytest.mark.parametrize("name", RECIPES)
def test_no_model_of_any_family_is_larger_than_its_files(kit: Kit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("engines.loading.preflight._SPARE", 0)
    monkeypatch.setattr("engines.loading.preflight._SPARE_SHARE", 1.0)

    kit.load(kit.recipe_folder(name), **RECIPES[name].spec)
