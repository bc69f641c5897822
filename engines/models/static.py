"""Runs models without a transformer: a table with a row for each token, and the mean of a text's rows (model2vec)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engines.inputs.tokenizer import Ids
from engines.layers.packing import PackedLayout
from engines.models.base import PART_TOKENS, Attention, ForwardPath, Recheck, Size
from engines.models.head import EmbeddingHead


class StaticEncoder:
    """The mean of the tokens' rows of a table (`engines.models.base.Encoder`). Nothing to pad, nothing to fall back to.

    Args:
        table: float32 `[vocabulary, H]` on the device.
        chain: starts with mean pooling.
    """

    attention: Attention = "packed"
    path: ForwardPath = "packed"
    fallback = ""
    is_reentrant = True
    part_tokens = PART_TOKENS
    largest_copy, num_threads = 0, 1
    num_layers = 1
    window: int | None = None
    notes: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

    def __init__(self, table: Tensor, chain: EmbeddingHead, device: torch.device) -> None:
        self._table = table
        self._chain = chain
        self._device = device
        self.dimensions = chain.dimensions
        self.pause: Callable[[], None] = lambda: None  # a table is looked up at once
        self.recheck: Recheck = lambda encoder: None  # there is one path

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`. The vector of a text without any known token is all zeros, as in sentence-transformers."""
        layout = PackedLayout([len(ids) for ids in texts], self._device)
        row = torch.from_numpy(np.concatenate(texts)).to(self._device)
        return self._chain(self._table[row], layout, prompt_tokens)

    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`; each text alone."""
        rows = [self([ids], None if prompt_tokens is None else [prompt_tokens[i]]) for i, ids in enumerate(texts)]
        return torch.cat(rows)

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        """See `CheckableEncoder`; there is one."""
        return ("packed",)

    def encode_batched(self, texts: Sequence[Ids]) -> Tensor:
        """See `CheckableEncoder`."""
        return self(texts)[None]

    def encode_single(self, text: Ids) -> Tensor:
        """See `CheckableEncoder`."""
        return self([text])

    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """See `CheckableEncoder`; there are no sizes."""
        return self(texts)

    def extra_bytes(self) -> int:
        """See `CheckableEncoder`; there are none."""
        return 0

    def switch_to(self, path: ForwardPath) -> None:
        """See `CheckableEncoder`; there is one."""
        assert path == "packed"

    def tensors(self) -> list[Tensor]:
        """See `Encoder`."""
        return [self._table, *self._chain.weights]

    def token_bytes(self) -> int:
        """See `Encoder`: a token's row and its copy."""
        return 2 * self._table.shape[1] * self._table.dtype.itemsize
