"""Decides in which form a model's weights are kept on a CPU, and replaces its products accordingly.

The form is applied once, after the layers are fused. Weights are held once: what is replaced is freed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from msgspec import Struct, field
from torch import nn

from engines.device.cpu_features import has_fast_bfloat16
from engines.device.load_throttle import throttle_point
from engines.errors import UnsupportedModel
from engines.layers import packed_linear
from engines.layers.decoder import FusedDecoderLayer
from engines.layers.fused import FusedLayer
from engines.layers.packed_linear import Int8Embedding, Int8Linear, PackedLinear, Product, total_bytes
from engines.layers.product_check import check_product
from engines.layers.products import onednn_is_faster
from engines.layers.weight_only import (
    Int4Linear,
    Int8WeightLinear,
    can_multiply_int4,
    dequantize_groups,
    fits_int4,
    quantize_groups,
)

Take = Callable[[torch.Tensor, Callable[[], tuple[torch.Tensor, ...]]], tuple[torch.Tensor, ...]]
"""(weight, makes its tensors) → the tensors of the product that replaces a weight."""


def make_anew(_: torch.Tensor, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Makes the tensors of a product from its weights; see `WeightForm.take`."""
    return make()


class WeightForm(Struct, frozen=True):
    """The form of a model's weights.

    Attributes:
        is_int8: int8 with a scale for each row, also in the table of token embeddings (but see `joined_product`); else
            packed as they are.
        is_int4: int4 with a scale for each group of a row. Queries, keys and values, and the table, are int8.
        is_weight_only: products multiply in the dtype of their inputs, which are not rounded; see `Int8WeightLinear`.
        activations: dtype of everything between the products (but see `_between`); None for that of the weights.
        is_for_decoders: whether other models are left as they are.
        checked: the shapes (and whether with a bias) of float32 products, once one has been compared with plain
            arithmetic; empty where each is compared. Shapes decide oneDNN's kernels, and weights do not; float32
            weights of 1.8 GB took 2.9 s to pack on a busy machine, and all of their products 6 s to compare.
        take: returns the tensors of the product that replaces a weight, which may be on torch's meta device where they
            are read from a file (`engines/loading/form_files.py`).
    """

    is_int8: bool = False
    is_int4: bool = False
    is_weight_only: bool = False
    activations: torch.dtype | None = None
    is_for_decoders: bool = False
    checked: set[tuple[int, ...]] = field(default_factory=set)
    take: Take = make_anew

    def apply(self, model: Any, fused: Sequence[FusedLayer | FusedDecoderLayer]) -> int:
        """Replaces the products of fused layers, and of the rest of the model where int8 is to save memory there or
        nothing is fused. Returns the bytes of the products' weights.

        Raises:
            UnsupportedModel: int8 for a model that reads its weights in ways of its own, as state-space layers do.
        """
        between = self._between(fused)
        if self.is_for_decoders and not (fused and all(isinstance(layer, FusedDecoderLayer) for layer in fused)):
            return 0
        if getattr(model, "_is_stateful", False):
            if self.name:
                raise UnsupportedModel(
                    f"`dtype: {self.name}` is not supported for {model.config.model_type}: set another"
                )
            return 0
        for layer in fused:
            is_encoder = isinstance(layer, FusedLayer)
            layer.replace_products(self.product, self.product if is_encoder else self.joined_product)
            throttle_point()
        self._replace_rest(model, between, is_fused=bool(fused))
        if between is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(between)
        return total_bytes(model.modules())

    def _replace_rest(self, model: Any, between: torch.dtype | None, *, is_fused: bool) -> None:
        """Replaces what is not in fused layers."""
        if self.name or not is_fused:
            self._replace_linears(model)
        if self.name:
            self._replace_table(model, between)
        if self.is_int4 and not any(isinstance(part, Int4Linear) for part in model.modules()):
            raise UnsupportedModel(
                "`dtype: int4` needs matrices with a multiple of 64 outputs and of 32 inputs, and this model has none: "
                "set `dtype: int8`"
            )

    @property
    def name(self) -> str:
        """The dtype of quantised weights; empty for others."""
        return "int4" if self.is_int4 else "int8" if self.is_int8 else ""

    def _between(self, fused: Sequence[FusedLayer | FusedDecoderLayer]) -> torch.dtype | None:
        """Returns the dtype of sums and norms. In encoder layers they are float32 beside int8: products read and give
        it, and torch adds bfloat16 half as fast."""
        is_encoder = bool(fused) and all(isinstance(layer, FusedLayer) for layer in fused)
        return torch.float32 if self.is_int8 and is_encoder and not self.is_weight_only else self.activations

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Makes a product in this form, and compares it with plain arithmetic.

        Raises:
            SelfCheckFailed: it computes something else.
        """
        if self.is_for_decoders:
            kind = (*weight.shape, bias is not None)
            if kind in self.checked:
                return PackedLinear(weight, bias)
            self.checked.add(kind)
        if not self.name:
            return self._checked(partial(PackedLinear, weight), weight, bias)
        if self.is_int4 and fits_int4(weight):
            return self._int4_product(weight, bias)
        return self._int8_product(weight, bias)

    def _int8_product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        rounded, scale = self._rounded(weight)
        dtype = self.activations or weight.dtype
        is_weight_only = self.is_weight_only or self.is_int4
        kind = partial(Int8WeightLinear, dtype=dtype) if is_weight_only else Int8Linear
        make = partial(kind, rounded, scale=scale)
        if not weight.is_meta:
            return self._checked(make, weight, bias)
        return self._checked(make, rounded.float().mul_(scale[:, None]), bias, is_rounded=True)

    def _int4_product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Makes a product of int4 weights, both of whose kernels are compared with plain arithmetic."""
        packed, scales = self.take(weight, lambda: quantize_groups(weight))
        made, rounded = Int4Linear(packed, bias, scales), dequantize_groups(packed, scales)
        bias = None if bias is None else bias.bfloat16()
        check_product(made, rounded, bias, torch.bfloat16, is_rounded=True)
        made.few_rows, few_rows = 0, made.few_rows  # unpacks to bfloat16
        check_product(made, rounded.bfloat16().float(), bias, torch.bfloat16, is_rounded=True)
        made.few_rows = few_rows
        return made

    def joined_product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Makes the product of queries, keys and values of a decoder: see `product`. Beside int8 it stays in bfloat16
        where that is fast: of all products it moves vectors most (`docs/accuracy.md`)."""
        if self.is_int4:
            return self._int8_product(weight, bias)
        if self.is_int8 and self.activations is torch.bfloat16 and not self.is_weight_only:
            (rounded,) = self.take(weight, lambda: (weight.to(torch.bfloat16),))
            return self._checked(partial(PackedLinear, rounded), rounded, bias)
        return self.product(weight, bias)

    def _rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.take(weight, lambda: packed_linear.quantize_rows(weight))

    def _checked(
        self,
        make: Callable[[torch.Tensor | None], Product],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        is_rounded: bool = False,
    ) -> Product:
        dtype = self.activations or weight.dtype
        bias = None if bias is None else bias.to(dtype)
        made = make(bias)
        check_product(made, weight, bias, dtype, is_rounded=is_rounded)
        return made

    def _replace_linears(self, model: nn.Module) -> None:
        for name, part in list(model.named_modules()):
            if type(part) is nn.Linear:
                model.set_submodule(name, self.product(part.weight, part.bias))
                throttle_point()

    def _replace_table(self, model: Any, dtype: torch.dtype | None) -> None:
        """Replaces the table of token embeddings; others are small. One that scales its rows stays as it is."""
        table = model.get_input_embeddings()
        if type(table) is not nn.Embedding:
            return
        rounded, scale = self._rounded(table.weight)
        made = Int8Embedding(rounded, dtype or table.weight.dtype, scale)
        for name in [name for name, part in model.named_modules() if part is table]:
            model.set_submodule(name, made)


@torch.inference_mode()
def fix_steps(model: nn.Module, run_texts: Callable[[], None]) -> None:
    """Gives int8 products behind norms one step for all tokens, by the ranges of the texts that are run.

    Raises:
        SelfCheckFailed: such a product computes something else.
    """
    products = [part for part in model.modules() if isinstance(part, Int8Linear) and part.is_behind_norm]
    for product in products:
        product.observe()
    if products:
        run_texts()
    for product in products:
        product.fix_step()
        throttle_point()


def weight_form(dtype: str, device: torch.device, take: Take = make_anew) -> WeightForm | None:
    """Returns the form of weights in a dtype on a device; None where torch's own is the fastest that is known."""
    if dtype == "int8":
        if device.type != "cpu":
            return WeightForm(is_int8=True, is_weight_only=True, take=take)
        return WeightForm(is_int8=True, activations=torch.bfloat16 if has_fast_bfloat16() else torch.float32, take=take)
    if dtype == "int4":
        if device.type != "cpu" or not can_multiply_int4():
            raise UnsupportedModel(
                f"`dtype: int4` needs a CPU with AVX512-BF16 or AMX and the installed torch's kernel, and {device} has "
                "not both: set `dtype: int8`"
            )
        return WeightForm(is_int4=True, activations=torch.bfloat16, take=take)
    if dtype == "float32" and device.type == "cpu" and onednn_is_faster():
        return WeightForm(is_for_decoders=True)
    return WeightForm() if dtype == "bfloat16" and device.type == "cpu" and has_fast_bfloat16() else None
