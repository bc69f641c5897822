"""Runs a post-norm encoder of int8 products by TorchScript: see `engines/layers/int8_script.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.device.cpu_features import has_fast_bfloat16
from engines.layers.fused import FusedLayer
from engines.layers.int8_script import int8_script
from engines.layers.packing import PackedLayout, attention_blocks
from engines.models.onnx_graph import Shape

_PARTS = 5
"""Lists of tensors of a layer: its four products, and its norms."""


class ScriptedInt8Encoder:
    """Runs an encoder whose layers have `int8_products`.

    Args:
        tables: levels of words, embeddings of positions, scale and shift of the norm of their sum, and what is added.
        scale: of each word's levels.

    Attributes:
        longest: the most tokens of a text.
    """

    longest = 512

    def __init__(self, tables: Sequence[Tensor], scale: Tensor, layers: Sequence[FusedLayer], shape: Shape) -> None:
        self._script = int8_script()
        self._tables, self._scale = [table.detach() for table in tables], scale
        self._tensors: list[list[Tensor]] = []
        self._steps: list[list[float]] = []
        for layer in layers:
            joined, context, up, down = layer.int8_products
            self._tensors += [part.tensors for part in (joined, context, up, down)]
            self._tensors.append([tensor.detach() for tensor in layer.norms])
            self._steps.append([*joined.steps, *up.steps])
        self._shape, self._activation, self._eps = shape, shape.activation.lower(), list(shape.eps)
        self._dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32

    def blocks(self, layout: PackedLayout) -> tuple[list[list[int]], list[Tensor]]:
        """Returns the blocks of a row's texts in which attention runs."""
        return attention_blocks(layout, self._shape.heads, is_rounded=self._dtype is torch.bfloat16)

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Turns ids, positions and types `[T]` into states, float32 `[T, H]`."""
        found: Tensor = self._script.embed_levels(ids, positions, types, self._tables, self._scale, self._eps[0])
        return found

    def __call__(self, x: Tensor, blocks: tuple[list[list[int]], list[Tensor]], layers: range) -> Tensor:
        """Runs some layers, `[T, H]` to `[T, H]`, on as many cores as torch uses."""
        found: Tensor = self._script.run_int8_layers(
            x, self._tensors[_PARTS * layers.start : _PARTS * layers.stop], self._steps[layers.start : layers.stop],
            *blocks, self._shape.heads, self._shape.width, self._dtype, self._activation, self._eps,
        )  # fmt: skip
        return found
