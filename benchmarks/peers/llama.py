"""Runs a decoder in llama.cpp, from GGUF files that are written here from a model folder in F32 and Q8_0.

Tokens come from the folder's own tokenizer, so that every program computes the same ones; the files name no vocabulary.
Vectors of F32 must equal ours: `deviations` in `benchmarks/offline/throughput.py` shows by how much they do not.
"""

import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORMS = ("F32", "Q8_0")
"""The files of a folder: 32 bits a weight, and 8.5."""

_BATCH_TOKENS = 512
"""Tokens of one pass, llama.cpp's own default; a text must fit."""

_POOLINGS = {"pooling_mode_lasttoken": "LAST", "pooling_mode_mean_tokens": "MEAN"}

_MODEL_TYPE = "qwen3"
"""The one architecture that is written."""


def export_gguf(folder: str, target: str) -> None:
    """Write a Qwen3 folder as one GGUF file for each form, beside its tokenizer.

    Raises:
        ValueError: the folder has another architecture, or another pooling than by the mean or the last token.
    """
    source, out = Path(folder), Path(target)
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != _MODEL_TYPE:
        raise ValueError(f"GGUF files are written of {_MODEL_TYPE} only, not of {config['model_type']}")
    pooling = json.loads((source / "1_Pooling" / "config.json").read_text())
    kinds = [kind for key, kind in _POOLINGS.items() if pooling.get(key)]
    if not kinds:
        raise ValueError("the pooling is neither by the mean nor by the last token")
    out.mkdir(parents=True)
    shutil.copy(source / "tokenizer.json", out / "tokenizer.json")
    for form in FORMS:
        _write(source, out / f"{form}.gguf", config, form, kinds[0])


def _write(source: Path, path: Path, config: dict[str, Any], form: str, pooling: str) -> None:
    gguf: Any = importlib.import_module("gguf")
    numpy: Any = importlib.import_module("numpy")
    safetensors: Any = importlib.import_module("safetensors.numpy")
    writer = gguf.GGUFWriter(path, _MODEL_TYPE)
    _describe(writer, config, gguf.PoolingType[pooling])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType[form]
    weights = [file for shard in sorted(source.glob("*.safetensors")) for file in safetensors.load_file(shard).items()]
    for name, weight in weights:
        full = name if name.startswith("model.") else f"model.{name}"
        known = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"llama.cpp knows no tensor {name!r}")
        weight = weight.astype(numpy.float32)
        if weight.ndim == 1 or form == "F32":
            writer.add_tensor(known, weight)
        else:
            writer.add_tensor(known, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any], pooling: Any) -> None:
    """Write the sizes, the pooling, and that there is no vocabulary."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_pooling_type(pooling)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _rope_theta(config: dict[str, Any]) -> float:
    found = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return float(found)


class FolderTokenizer:
    """The folder's own tokenizer, with the one method of `Llama`'s tokenizers that embedding calls."""

    def __init__(self, folder: str) -> None:
        tokenizers: Any = importlib.import_module("tokenizers")
        self._tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._tokenizer.enable_truncation(_BATCH_TOKENS)
        self._tokenizer.no_padding()

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> Sequence[int]:  # as it is called
        """Return the ids of a text; the folder decides about special tokens."""
        found: list[int] = self._tokenizer.encode(text.decode()).ids
        return found


def llama_cpp(folder: str, form: str) -> Callable[[list[str]], Any]:
    """Load a form of the folder in embedding mode, on all cores, with llama.cpp's default batch.

    Returns:
        The function from texts to float32 vectors `[n, D]` of unit length.
    """
    numpy: Any = importlib.import_module("numpy")
    package: Any = importlib.import_module("llama_cpp")
    cores = len(os.sched_getaffinity(0))
    model = package.Llama(
        f"{folder}/{form}.gguf", embedding=True, n_ctx=_BATCH_TOKENS, n_batch=_BATCH_TOKENS, n_ubatch=_BATCH_TOKENS,
        n_threads=cores, n_threads_batch=cores, tokenizer=FolderTokenizer(folder), verbose=False,
    )  # fmt: skip
    return lambda texts: numpy.asarray(model.embed(texts, normalize=True), dtype=numpy.float32)
