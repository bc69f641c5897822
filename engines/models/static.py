"""Runs models without a transformer: a table with a row for each token, and the mean of a text's rows (model2vec)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engines.inputs.tokenizer import Ids
from engines.layers.packing import PackedLayout, to_device
from engines.models.base import SinglePathEncoder
from engines.models.head import EmbeddingHead


class StaticEncoder(SinglePathEncoder):
    """The mean of the tokens' rows of a table. Nothing to pad, nothing to fall back to.

    Args:
        table: float32 `[vocabulary, H]` on the device.
        chain: starts with mean pooling.
    """

    def __init__(self, table: Tensor, chain: EmbeddingHead, device: torch.device) -> None:
        self._table = table
        self._chain = chain
        self._device = device
        self.dimensions = chain.dimensions

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`. The vector of a text without any known token is all zeros, as in sentence-transformers."""
        layout = PackedLayout([len(ids) for ids in texts], self._device)
        row = to_device(np.concatenate(texts), self._device)
        return self._chain(self._table[row], layout, prompt_tokens)

    def tensors(self) -> list[Tensor]:
        """See `LoadedEncoder`."""
        return [self._table, *self._chain.weights]

    def token_bytes(self) -> int:
        """See `LoadedEncoder`: a token's row and its copy."""
        return 2 * self._table.shape[1] * self._table.dtype.itemsize
