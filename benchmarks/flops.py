"""Arithmetic of a transformer from its config: linear layers and attention of real tokens, embeddings for free.

A multiply-add counts as two operations. What is not a matrix product (norms, activations, softmax, pooling) is not
counted: it is what keeps an engine from its ceiling.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct


class Shape(Struct, frozen=True):
    """The linear layers of one block as (in, out), how many blocks there are, and the width of the queries."""

    linears: tuple[tuple[int, int], ...]
    num_layers: int
    query_width: int

    @property
    def linear_flops(self) -> int:
        """For one token, through all blocks."""
        return 2 * self.num_layers * sum(rows * columns for rows, columns in self.linears)

    def flops(self, lengths: Sequence[int]) -> int:
        """For texts of these lengths: linear layers, and scores and their sums of values within each text."""
        attention = 4 * self.num_layers * self.query_width
        return self.linear_flops * sum(lengths) + attention * sum(length * length for length in lengths)


def read_shape(folder: Path) -> Shape:
    """The shape of the model in a folder: BERT and its kin, and decoders with grouped queries and a gated layer.

    Raises:
        KeyError: config.json lacks one of the sizes.
    """
    config = json.loads((folder / "config.json").read_text())
    hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    keys = head * config.get("num_key_value_heads", heads)
    query = head * heads
    is_gated = config.get("hidden_act") in ("silu", "gelu_pytorch_tanh") and "num_key_value_heads" in config
    widening = [(hidden, inner)] * (2 if is_gated else 1)
    linears = [(hidden, query), (hidden, keys), (hidden, keys), (query, hidden), *widening, (inner, hidden)]
    return Shape(tuple(linears), config["num_hidden_layers"], query)
