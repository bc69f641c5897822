"""Writes small transformers of many layers, which are split over simulated devices, and counts their bytes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, BertTokenizer, PretrainedConfig, Qwen3Config

WORDS = ("the", "yard", "keeps", "cats", "dogs", "birds", "boats", "over", "old", "new", "red", "a", "b", "one", "two")
TEXTS = ("the yard keeps old boats", "one", "two red birds over the yard keeps cats dogs a b", "new birds")

NUM_LAYERS = 12
WIDTH = 128


def bert_config() -> PretrainedConfig:
    """Returns a BERT of twelve layers, of 10 MB."""
    return BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=WIDTH, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        intermediate_size=4 * WIDTH, max_position_embeddings=64,
    )  # fmt: skip


def qwen3_config() -> PretrainedConfig:
    """Returns a decoder of twelve layers, of 9 MB."""
    return Qwen3Config(
        vocab_size=5 + len(WORDS), hidden_size=WIDTH, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=3 * WIDTH, max_position_embeddings=64,
    )  # fmt: skip


def write_model(folder: Path, config: PretrainedConfig) -> Path:
    """Writes a model with random weights and a small vocabulary."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(5)
    kind: Any = AutoModel
    model = kind.from_config(config)
    model.save_pretrained(folder)
    return folder
