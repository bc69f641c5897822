"""Writes small folders with the files of a model and weights that are never run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles
from engines.types import ModelFiles

TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
DENSE = "sentence_transformers.models.Dense"
NORMALIZE = "sentence_transformers.models.Normalize"

Tensors = Mapping[str, NDArray[np.generic]]


class FolderFiles(FakeFiles):
    """The files of every model are one folder's."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def locate(self, spec: ModelSpec) -> ModelFiles:
        """Returns the folder."""
        return ModelFiles(path=str(self._folder), revision="r", size_bytes=1)


def tensors(num_elements: int = 1000, *, seed: int = 0) -> Tensors:
    """Returns a float32 matrix and the int64 buffer that BERT models have."""
    rng = np.random.default_rng(seed)
    return {
        "encoder.weight": rng.standard_normal((num_elements // 10, 10)).astype(np.float32),
        "embeddings.position_ids": np.arange(16, dtype=np.int64),
    }


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_weights(path: Path, weights: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), path)


def plain_model(folder: Path, weights: Tensors | None = None) -> Path:
    """Writes a transformers folder without modules.json, with the usual other files of a hub repository."""
    write_json(folder / "config.json", {"model_type": "bert", "hidden_size": 10})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 16})
    write_json(folder / "special_tokens_map.json", {})
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    (folder / "README.md").write_text("# A model\n" * 20)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    write_weights(folder / "model.safetensors", tensors() if weights is None else weights)
    return folder


def sentence_model(folder: Path, weights: Tensors | None = None, *, dense: bool = False) -> Path:
    """Writes a sentence-transformers folder: a chain of modules, and weights in formats that must not be selected."""
    plain_model(folder, weights)
    modules = [("", TRANSFORMER), ("1_Pooling", POOLING), *([("2_Dense", DENSE)] if dense else []), ("3_N", NORMALIZE)]
    write_modules(folder, modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}})
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    if dense:
        write_json(folder / "2_Dense" / "config.json", {"in_features": 10, "out_features": 4})
        write_weights(folder / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((4, 10), np.float32)})
    for name in ("pytorch_model.bin", "onnx/model.onnx", "openvino/openvino_model.bin", "tf_model.h5", "model.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 500)
    return folder


def adapter_folder(folder: Path, base: str = "org/model") -> Path:
    """Writes a PEFT adapter with the usual other files of a hub repository."""
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2})
    write_weights(
        folder / "adapter_model.safetensors", {"base_model.model.lora_A.weight": np.ones((2, 10), np.float32)}
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "training_args.bin").write_bytes(b"x" * 100)
    return folder


def write_modules(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / "modules.json", entries)


def sharded_model(folder: Path, num_shards: int = 3) -> Path:
    """Writes a model whose weights are split over several files with an index."""
    plain_model(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        weight_map[f"layer.{shard}"] = name
        write_weights(folder / name, {f"layer.{shard}": np.full((20, 5), shard, np.float32)})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder
