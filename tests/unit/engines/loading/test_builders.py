"""Tests that a folder with incomplete or unsupported weights is rejected, naming the file and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import BartConfig, BertModel

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.models import edit_json, reference, transformer
from benchmarks.lib.workloads import SENTENCES
from engines.errors import BrokenFiles, OutOfMemory, UnsupportedModel
from tests.testkit.refusals import refusal

TEXTS = list(SENTENCES[:8])
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A copy of a small BERT for a test to break."""
    return _copy(kit, "bert-cls", tmp_path / "bert")


def _copy(kit: Kit, name: str, target: Path) -> Path:
    return Path(shutil.copytree(kit.recipe_folder(name), target))


def _bare(kit: Kit, name: str, target: Path) -> Path:
    """Copies a recipe's folder without the files of sentence-transformers."""
    _copy(kit, name, target)
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (target / file).unlink()
    return target


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _shard(folder: Path) -> list[Path]:
    BertModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_memory_does_not_suffice_for_is_not_broken(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(BertModel, "from_pretrained", load)

    with pytest.raises(OutOfMemory):
        kit.load(folder)


def test_a_truncated_weight_file_is_named(kit: Kit, folder: Path) -> None:
    _truncate(folder / WEIGHTS)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == WEIGHTS
    assert str(error).startswith(WEIGHTS)


@pytest.mark.parametrize("break_it", [_truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_broken_or_missing_shard_is_named(kit: Kit, folder: Path, break_it: Callable[[Path], None]) -> None:
    shards = _shard(folder)
    assert len(shards) >= 2
    break_it(shards[1])
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == shards[1].name


def test_shards_that_are_whole_are_served(kit: Kit, folder: Path) -> None:
    wanted = embed(kit.load(folder), TEXTS)
    _shard(folder)

    assert_same(embed(kit.load(folder), TEXTS), wanted)


def test_missing_weights_are_named(kit: Kit, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == WEIGHTS


def test_pickled_weights_are_served_when_whole_and_named_when_not(kit: Kit, folder: Path) -> None:
    wanted = embed(kit.load(folder), TEXTS)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()

    assert_same(embed(kit.load(folder), TEXTS), wanted)
    _truncate(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in str(refusal(kit, folder))


def test_a_tensor_that_would_be_random_is_named(kit: Kit, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    lost = "encoder.layer.1.attention.self.query.weight"
    del weights[lost]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == WEIGHTS
    assert f"lacks 1 tensors that the model needs (first: {lost!r})" in str(error)


def test_a_checkpoint_of_another_architecture_is_refused(kit: Kit, folder: Path) -> None:
    """jina-embeddings-v2 declares itself a BERT; without its own code most of its weights would be random."""
    weights = {
        name.replace("intermediate.dense", "mlp.gated_layers"): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, {"format": "pt"})

    assert "trust_remote_code" in str(refusal(kit, folder))


def test_a_checkpoint_whose_own_code_is_for_a_type_of_the_library_is_not_fetched_again(kit: Kit, folder: Path) -> None:
    """jina-reranker-v2 is an XLM-RoBERTa with other tensors: its files are whole, whatever the library looks for."""
    edit_json(folder / "config.json", auto_map={"AutoModel": "own.M"})
    weights = {name.replace("attention.self", "mixer"): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})

    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert "config.json names code from the model's own repository" in str(error)


def test_a_pooler_that_no_embedding_passes_may_be_missing(kit: Kit, folder: Path) -> None:
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if not name.startswith("pooler")}
    assert len(weights) < len(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS, {"format": "pt"})

    assert_same(embed(kit.load(folder), TEXTS), embed(kit.engine("bert-cls"), TEXTS))


def test_weights_of_other_shapes_than_the_config_says_are_refused(kit: Kit, folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=128)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert f"{WEIGHTS} does not match config.json" in str(error)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no-such-model"}, "a model type that the installed transformers does not support"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}, "trust_remote_code: true"),
        ({"hidden_size": "wide"}, "config.json cannot be read"),
    ],
)
def test_a_config_that_is_not_for_us_is_refused(kit: Kit, folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_json(folder / "config.json", **changes)
    error = refusal(kit, folder)

    assert "config.json" in str(error)
    assert says in str(error)


def test_a_missing_config_is_named(kit: Kit, folder: Path) -> None:
    (folder / "config.json").unlink()

    assert "config.json" in str(refusal(kit, folder))


def test_an_adapter_is_refused(kit: Kit, folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert "adapter_config.json" in str(error)
    assert "`adapter`" in str(error)


@pytest.mark.parametrize("name", ["gemma3-bidirectional", "qwen3-last", "t5-mean-dense"])
def test_float16_is_refused_where_it_overflows(kit: Kit, name: str) -> None:
    assert "overflows in float16" in str(refusal(kit, kit.recipe_folder(name), dtype="float16"))


def test_bfloat16_is_close_and_vectors_are_float32(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("bert-mean-normalize-legacy"), dtype="bfloat16")
    got, wanted = embed(engine, TEXTS), embed(kit.engine("bert-mean-normalize-legacy"), TEXTS)

    assert engine.info.dtype == "bfloat16"
    assert got.dtype == np.float32
    assert 1e-6 < 1 - (got * wanted).sum(axis=1).min() < 5e-3


def test_an_encoder_with_a_decoder_is_refused(kit: Kit, tmp_path: Path) -> None:
    tokenizer = vocabularies.roberta()
    shape = {
        f"{half}_{what}": size
        for half in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, max_position_embeddings=64, **shape)  # type: ignore[arg-type]  # plain sizes
    transformer(config).save_pretrained(tmp_path)  # type: ignore[operator]  # nn.Module types attributes as tensors or modules
    tokenizer.save_pretrained(tmp_path)

    assert "bart is an encoder-decoder" in str(refusal(kit, tmp_path))


def test_an_encoder_without_modules_is_pooled_by_its_mean(kit: Kit, tmp_path: Path) -> None:
    folder = _bare(kit, "bert-cls", tmp_path / "bare")

    assert_same(embed(kit.load(folder), TEXTS), encode(reference(folder), TEXTS))


def test_a_decoder_without_modules_is_refused_until_the_registry_says_how_to_pool(kit: Kit, tmp_path: Path) -> None:
    folder = _bare(kit, "qwen2-last", tmp_path / "bare")
    error = refusal(kit, folder)

    assert "there is no modules.json" in str(error)
    assert "`pooling: last_token`" in str(error)
    assert_same(embed(kit.load(folder, pooling=("lasttoken",)), TEXTS), embed(kit.engine("qwen2-last"), TEXTS))


def test_a_decoder_that_looks_both_ways_counts_as_an_encoder(kit: Kit, tmp_path: Path) -> None:
    folder = _bare(kit, "qwen2-bidirectional", tmp_path / "bare")

    assert_same(embed(kit.load(folder), TEXTS), encode(reference(folder), TEXTS))


def test_the_registrys_pooling_replaces_the_folders(kit: Kit) -> None:
    folder = kit.recipe_folder("bert-mean-normalize-legacy")
    model = reference(folder)
    setattr(model[1], "pooling_mode", "lasttoken")  # noqa: B010  # nn.Module types attributes as tensors or modules

    assert_same(embed(kit.load(folder, pooling=("lasttoken",)), TEXTS), encode(model, TEXTS))


def test_a_model_that_is_not_for_text_is_refused(kit: Kit, folder: Path) -> None:
    lines = json.loads((folder / "modules.json").read_text())
    lines[0]["type"] = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps(lines))

    assert "starts with the module 'CLIPModel'" in str(refusal(kit, folder))


OWN_CODE = """\
import torch
from transformers import BertConfig, BertModel


class OwnConfig(BertConfig):
    model_type = "own"


class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = torch.tanh(out.last_hidden_state)
        return out
"""


def test_trusted_code_of_the_repository_runs_is_as_exact_and_is_noted(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "code"))
    (folder / "own.py").write_text(OWN_CODE)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto)
    with capture_logs() as lines:
        engine = kit.load(folder, trust_remote_code=True, revision="f" * 40)
    plain = embed(kit.engine("bert-cls"), TEXTS)
    wanted = encode(reference(folder, trust_remote_code=True), TEXTS)

    assert_same(embed(engine, TEXTS), wanted)
    assert np.abs(wanted - plain).max() > 1e-2, "the repository's code makes a difference"
    assert [line["event"] for line in lines if "trusted" in line["event"]] == ["model.remote_code_trusted"]
