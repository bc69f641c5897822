"""Builds small transformers with random weights, in memory only."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
)

SHAPE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
BERT: dict[str, Any] = {"vocab_size": 100, **SHAPE}


def build(kind: Any, config: object) -> Any:
    torch.manual_seed(3)
    return kind(config).eval()


def bert(**changes: object) -> Any:
    return build(BertModel, BertConfig(**{**BERT, **changes}))
