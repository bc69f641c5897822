"""Makes model folders with random weights in the shapes of well-known models, on the machine that measures them.

Speed does not depend on what the weights are, and a machine without a network has no others. Weights are written layer
by layer from one set of random tensors, so that a folder of 16 GB takes as long as its writing. Each has a WordPiece
tokenizer whose vocabulary is the words of the texts that are measured with, so that a word is mostly one token.
"""

import json
import os
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    PretrainedConfig,
    Qwen3Config,
    XLMRobertaConfig,
)

from benchmarks.lib.folders import BENCH, prepare
from benchmarks.lib.workloads import english

ROOT = BENCH / "gpu"
MAX_TOKENS = 512
_SHARD_BYTES = 2 * 10**9
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LEAST_VOCABULARY = 30522


class Model(Struct, frozen=True):
    """A model to make. `kind`: of its config; `pooling`: as sentence-transformers names it, or the class of a reranker,
    which has a head of its own; `shape`: of its config.
    """

    name: str
    kind: type[PretrainedConfig]
    pooling: str
    shape: dict[str, Any]

    @property
    def config(self) -> PretrainedConfig:
        """The config; special tokens are those of the tokenizer."""
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        head = {"architectures": [self.pooling], "num_labels": 1} if self.is_reranker else {}
        return self.kind(dtype="bfloat16", **{**ids, "vocab_size": _LEAST_VOCABULARY, **head, **self.shape})

    @property
    def is_reranker(self) -> bool:
        """Whether it gives scores."""
        return self.pooling.endswith("ForSequenceClassification")

    @property
    def last_file(self) -> str:
        """The file that is written last, so that a half-made folder is made again."""
        return "config.json" if self.is_reranker else "modules.json"


def _qwen3(name: str, *, layers: int, width: int, heads: int, inner: int) -> Model:
    shape = {
        "vocab_size": 151_936, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": inner, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return Model(name, Qwen3Config, "lasttoken", shape)


_XLMR = {
    "vocab_size": 250_002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1,
}  # fmt: skip
_SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_SMALL_DECODER = {**_SMALL, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}

_RERANKER = "XLMRobertaForSequenceClassification"
_XLMR_BASE = {"vocab_size": 250_002, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1}

MODELS = {
    model.name: model
    for model in (
        Model("bge-base", BertConfig, "cls", {}),
        Model("xlmr-large", XLMRobertaConfig, "cls", _XLMR),
        _qwen3("qwen3-0.6b", layers=28, width=1024, heads=16, inner=3072),
        _qwen3("qwen3-4b", layers=36, width=2560, heads=32, inner=9728),
        _qwen3("qwen3-8b", layers=36, width=4096, heads=32, inner=12_288),
        Model("bge-reranker-base", XLMRobertaConfig, _RERANKER, _XLMR_BASE),
        Model("small-reranker", XLMRobertaConfig, _RERANKER, {**_XLMR_BASE, **_SMALL, "vocab_size": 30522}),
        Model("small-bert", BertConfig, "cls", _SMALL),
        Model("small-xlmr", XLMRobertaConfig, "cls", {**_SMALL, "max_position_embeddings": 514, "type_vocab_size": 1}),
        Model("small-qwen3", Qwen3Config, "lasttoken", _SMALL_DECODER),
    )
}
SPEED_MODELS = {"full": ("bge-base", "xlmr-large", "qwen3-0.6b"), "small": ("small-bert", "small-xlmr", "small-qwen3")}
LOAD_MODELS = {"full": ("qwen3-0.6b", "qwen3-4b"), "small": ("small-qwen3",)}
"""Read from the disk, too, which takes the largest one longer than all other parts can spare."""

SWAP_MODELS = {"full": (*LOAD_MODELS["full"], "qwen3-8b"), "small": LOAD_MODELS["small"]}
RERANKER = {"full": "bge-reranker-base", "small": "small-reranker"}
BASE = {"full": "bge-base", "small": "small-bert"}
LARGE = {"full": "xlmr-large", "small": "small-xlmr"}


def folder_of(name: str, device: str = "cpu") -> Path:
    """Return the folder of a model of `MODELS`, made when it is not there yet.

    Args:
        device: draws the random numbers, which a GPU does in no time.
    """
    prepare(BENCH)
    folder = ROOT / name
    if not (folder / MODELS[name].last_file).exists():
        build(MODELS[name], folder, device)
    return folder


def build(model: Model, folder: Path, device: str = "cpu") -> None:
    """Make a folder, its `Model.last_file` last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model.config
    save_weights(config, folder, device, AutoModelForSequenceClassification if model.is_reranker else AutoModel)
    _save_tokenizer(folder)
    config.save_pretrained(folder)
    if not model.is_reranker:
        _save_modules(model, config, folder)


def _save_tokenizer(folder: Path) -> None:
    tokenizer().save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    _write(folder / "tokenizer_config.json", names | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS, "mask_token": "[MASK]",
    })  # fmt: skip


def _save_modules(model: Model, config: PretrainedConfig, folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    modes = {"cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    width = config.get_text_config().hidden_size
    pooling = dict.fromkeys(modes.values(), False) | {"pooling_mode_mean_tokens": False, modes[model.pooling]: True}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    _write(folder / "modules.json", [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ])  # fmt: skip


def save_weights(config: PretrainedConfig, folder: Path, device: str = "cpu", kind: Any = AutoModel) -> None:
    """Write bfloat16 weights of a config in shards, as the hub has them; tensors of one shape have the same values."""
    with torch.device("meta"):
        whole: Any = kind.from_config(config)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    drawn: dict[tuple[Any, ...], torch.Tensor] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in shapes.items():
        key = (shape, name.endswith("bias"))
        if key not in drawn:
            drawn[key] = _draw(shape, is_bias=key[1], device=device)
        if size and size + drawn[key].nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = drawn[key]
        size += drawn[key].nbytes
    _save_shards(shards, folder)


def _save_shards(shards: list[dict[str, torch.Tensor]], folder: Path) -> None:
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # safetensors refuses tensors that share memory.
        seen: set[int] = set()
        own = {}
        for name, tensor in shard.items():
            own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        save_file(own, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())}, "weight_map": places}
        _write(folder / "model.safetensors.index.json", index)


def _draw(shape: torch.Size, *, is_bias: bool, device: str) -> torch.Tensor:
    """Return values as a fresh model has them: projections of small variance; norms, which have one axis, near one."""
    generator = torch.Generator(device).manual_seed(7)
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if len(shape) > 1 or is_bias:
        return values.normal_(std=0.02, generator=generator).cpu()
    return values.fill_(1.0).cpu()


def forget_cache(folder: Path) -> None:
    """Write everything to the disk and drop it from the page cache, so that the next reader waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@cache
def tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer of BERT's kind whose vocabulary has the words of the English workloads."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(" ".join(english()))
    counts = Counter(word for word, _ in splitter.pre_tokenize_str(text))
    letters = sorted({letter for word in counts for letter in word})
    pieces = dict.fromkeys([*_SPECIALS, *letters, *(f"##{letter}" for letter in letters)])
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = list(pieces | dict.fromkeys(words))[:_LEAST_VOCABULARY]
    vocabulary += [f"[unused{number}]" for number in range(_LEAST_VOCABULARY - len(vocabulary))]
    made = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    made.add_special_tokens(list(_SPECIALS))
    around = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=around
    )
    return made


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
