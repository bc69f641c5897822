"""Runs products of reduced precision from weights kept once, in the form that the CPU's instructions read.

`PackedLinear` keeps bfloat16 weights as oneDNN reorders them: torch reorders them in every call. For float32
`engines/layers/products.py` needs no other form. `Int8Linear` keeps one byte a weight,
with a scale for each output, and rounds the inputs of each token to 8 bits between their least and their largest: a
token's result depends on no other token of the batch.

Measured on one core of an EPYC (Zen 5), 256 × 384 × 1536 in µs: packed bfloat16 634; int8 310, with rounding and
scaling 398. 256 × 1536 × 384: 699; 324, 400. Two threads take half of each. Of the other kernels for int8 that were
measured, ONNX Runtime's for blocks of weights (`MatMulNBits`, 8 and 4 bits) take three times as long, and the rest have
one scale for all tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from engines.device.cpu_features import has_fast_int8
from engines.errors import SelfCheckFailed
from engines.layers.int8_script import int8_script
from engines.layers.static_quantization import StaticQuantizer, is_supported

_LEVELS = 127
"""Steps of int8 on each side of zero."""

_PACKED_FOR_ROWS = 64
"""The form of oneDNN's packed weights depends on the number of rows that they are packed for; all rows may use it."""

_TOLERANCE = 1e-2
"""Error of an output whose inputs need no rounding, of its distance from the bias."""

_OUTPUT_ROUNDING = 2**-8
"""What bfloat16 may round an output by, of the output: with a large bias, or no weights, that is most of the error."""

_BY_TOKEN = 5
"""Tensors of a product whose tokens have steps of their own."""

TRAILER = 8
"""Bytes behind the levels of each token: see `quantize_tokens`."""


class Product(nn.Module):
    """Base of products that stand in for an `nn.Linear`. Weights are no parameters: torch cannot read their form.

    Attributes:
        weight: a placeholder of the dtype of the weights, which architectures ask for.
        size_bytes: bytes of weights and scales.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.empty(0, dtype=dtype)
        self.size_bytes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out]` from `[..., in]`, in the dtype of `x`."""
        return self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """Returns `[T, out]` from `[T, in]`."""
        raise NotImplementedError


ProductFactory = Callable[[Tensor, Tensor | None], Product]
"""Makes a product from weights `[out, in]` and a bias `[out]`."""


class PackedLinear(Product):
    """A product in the dtype of its weights, float32 or bfloat16.

    Attributes:
        packed: the weights in oneDNN's form; `bias` `[out]`. torch's operators take both.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, weight.dtype)
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_FOR_ROWS)
        self.bias = None if bias is None else bias.detach().clone()
        self.size_bytes = weight.numel() * weight.itemsize

    def multiply(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return self._multiply(x, "none")

    def multiply_and_gelu(self, x: Tensor) -> Tensor:
        """Returns the exact (erf) GELU of the product, computed before it is rounded to the dtype of `x`."""
        return self._multiply(x.reshape(-1, self.in_features), "gelu").view(*x.shape[:-1], self.out_features)

    def multiply_and_silu(self, x: Tensor) -> Tensor:
        """Returns SiLU of the product, computed before it is rounded to the dtype of `x`."""
        return self._multiply(x.reshape(-1, self.in_features), "swish").view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, activation: str) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), self.packed, self.bias, activation, [], "none"
        )
        return found


class Int8Linear(Product):
    """A product of int8 weights.

    Args:
        weight: `[out, in]`, of any float dtype, or int8 with `scale` `[out]`.
        bias: `[out]`.

    Attributes:
        out_dtype: of the outputs; None for that of the inputs.
        is_behind_norm: whether a norm gives the inputs, so that one step suits all tokens.
        tensors: as the functions of `engines/layers/int8_script.py` take them; empty where this machine has none for
            them. Weight, scale, zeros, sums of rows, bias. With one step for all tokens also a bias for that, and
            `StaticQuantizer.tensors`.
        steps: the numbers beside them, two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        super().__init__(weight, torch.int8)
        rounded, scale = quantize_rows(weight) if scale is None else (weight, scale)
        self.out_dtype: torch.dtype | None = None
        self.is_behind_norm = False
        self._scale, self._bias = scale, None if bias is None else bias.detach().float()
        self._seen: Tensor | None = None
        self._plain = rounded
        self._packed: PackedInt8 | None = None
        self.tensors: list[Tensor] = []
        self.steps = [0.0, 0.0]
        self.size_bytes = rounded.numel() + 8 * len(scale)
        if can_multiply_int8():
            self._plain = rounded.new_empty(0)
            self._set_packed(rounded)

    def _set_packed(self, rounded: Tensor) -> None:
        packed = self._packed = PackedInt8.of(rounded, self._scale)
        row_sums = self._scale * rounded.float().sum(1)  # exact, and 28 times as fast as sums of int8
        bias = self._scale.new_empty(0) if self._bias is None else self._bias
        self.tensors = [*packed, row_sums, bias]
        self.size_bytes = len(rounded) * (rounded.shape[1] + TRAILER + 8)

    @property
    def has_one_step(self) -> bool:
        """Whether the inputs of all tokens have the same step."""
        return len(self.tensors) > _BY_TOKEN

    def observe(self) -> None:
        """Notes the range of the inputs from now on, until `fix_step`."""
        self._seen = torch.tensor([[float("inf")], [float("-inf")]]).repeat(1, self.in_features)

    def fix_step(self) -> None:
        """Gives all tokens one step, by the ranges that were seen: see `engines/layers/static_quantization.py`.

        Raises:
            SelfCheckFailed: the product computes something else with it.
        """
        seen, self._seen = self._seen, None
        if seen is None or self._packed is None or not is_supported(*seen):
            return
        static = StaticQuantizer(*seen)
        if not static.suits_most:
            return
        rounded = self._packed.rounded(self.in_features)
        plain = rounded.float() * self._scale[:, None]
        x = static.exact_inputs()
        wanted = linear(x, plain, self._bias)
        self._bias = bias = linear(static.centre, plain, self._bias)
        self._set_packed(static.widen(rounded))
        self.steps = [static.step, static.half]
        self.tensors += [bias - static.half * self.tensors[3], *static.tensors]
        errors = (self.multiply(x) - wanted).norm(dim=0).sub_(_OUTPUT_ROUNDING * wanted.norm(dim=0)).clamp_(min=0)
        far = float((errors / (wanted - bias).norm(dim=0).clamp_(min=1e-30)).max())
        if not far <= _TOLERANCE:
            raise SelfCheckFailed(
                f"a product of int8 weights with one step for all tokens is {far:.1e} from plain arithmetic, more than "
                f"{_TOLERANCE:.0e}: set `dtype: float32` in the registry"
            )

    def multiply(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return self._multiply(x, "none", self.out_dtype or x.dtype)

    def multiply_and_gelu(self, x: Tensor) -> Tensor:
        """Returns the exact (erf) GELU of the product, `[T, out]` from `[T, in]`."""
        return self._multiply(x, "gelu", self.out_dtype or x.dtype)

    def multiply_and_add(self, x: Tensor, other: Tensor) -> Tensor:
        """Returns the sum of the product and `other`, float32 `[T, out]`; `x` `[T, in]`."""
        return self._multiply(x, "none", torch.float32, other)

    def _multiply(self, x: Tensor, activation: str, dtype: torch.dtype, other: Tensor | None = None) -> Tensor:
        if self._seen is not None:
            self._seen = torch.stack([self._seen[0].minimum(x.amin(0)), self._seen[1].maximum(x.amax(0))])
        if not self.tensors:  # smaller, but no faster
            found = linear(x.float(), self._plain * self._scale[:, None], self._bias)
            found = torch.ops.aten.gelu_(found) if activation == "gelu" else found
            return (found if other is None else found.add_(other)).to(dtype)
        product: Tensor = int8_script().multiply(x, self.tensors, self.steps, dtype, activation, other)
        return product


class PackedInt8(NamedTuple):
    """Weights of int8 products in oneDNN's form, for levels with a trailer.

    Attributes:
        weight: opaque; `scale`: float32 `[out]`; `zeros`: int64 `[out]`.
    """

    weight: Tensor
    scale: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, rounded: Tensor, scale: Tensor) -> "PackedInt8":
        """Packs int8 weights `[out, columns]`, with zeros for the trailer."""
        wide = pad(rounded, (0, TRAILER))
        packed = torch.ops.onednn.qlinear_prepack(wide, [_PACKED_FOR_ROWS, wide.shape[1]])
        return cls(packed, scale, torch.zeros(len(scale), dtype=torch.int64))

    def multiply(self, levels: Tensor) -> Tensor:
        """Multiplies levels, uint8 `[T, columns + 8]`; float32."""
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    def rounded(self, num_columns: int) -> Tensor:
        """Returns the int8 weights `[out, columns]`: products of ones."""
        ones = torch.eye(num_columns, num_columns + TRAILER, dtype=torch.uint8)
        return self._replace(scale=torch.ones_like(self.scale)).multiply(ones).T.to(torch.int8)


class JoinedPart(nn.Module):
    """Some outputs of a joined product, for code that calls query, key and value one by one."""

    def __init__(self, joined: Product, first: int, count: int) -> None:
        super().__init__()
        self._joined, self._first = [joined], first  # in a list: the module belongs elsewhere
        self.weight, self.in_features, self.out_features = joined.weight, joined.in_features, count

    def forward(self, x: Tensor) -> Tensor:
        """Returns this part of the joined product's outputs."""
        whole: Tensor = self._joined[0](x)
        return whole[..., self._first : self._first + self.out_features].to(x.dtype)


def replace_joined(layer: nn.Module, names: Sequence[str], owner: str, products: Sequence[Product]) -> None:
    """Replaces linear layers by the parts of products, which give the outputs of all of them in their order.

    Args:
        names: of the linear layers inside of `layer`.
        owner: the name of the module there that shall own the products.
    """
    index, first = 0, 0
    for name in names:
        count: int = layer.get_submodule(name).out_features  # type: ignore[assignment]  # torch types attributes loosely
        if first == products[index].out_features:
            index, first = index + 1, 0
        layer.set_submodule(name, JoinedPart(products[index], first, count))
        first += count
    for number, product in enumerate(products):
        layer.get_submodule(owner).add_module(f"joined_products_{number}", product)


class Int8Embedding(nn.Module):
    """A table of embeddings with one byte a number and a scale for each row.

    Args:
        weight: `[rows, H]`, of any float dtype, or int8 with `scale` `[rows]`.
        dtype: of the embeddings that it returns.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        super().__init__()
        rounded, scale = quantize_rows(weight) if scale is None else (weight, scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self._dtype = dtype
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", rounded, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of the ids, `[..., H]`."""
        rows = ids.reshape(-1)  # copied whole: 49 µs for 512 × 384, and 140 by indexing
        found = self.weight.index_select(0, rows).float().mul_(self.scale.index_select(0, rows)[:, None])
        return found.to(self._dtype).view(*ids.shape, self.embedding_dim)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row `[n, K]` to int8, with a float32 scale `[n]`: the row's largest magnitude is 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny * _LEVELS).div_(_LEVELS)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each row of `[T, K]` to 0 … 255 between its least and its largest element, in one pass.

    torch's operator is made for tables of embeddings: 24 µs for 512 × 384 on one core of an EPYC (Zen 5), where seven
    of its elementwise operators take 100. It adds 1e-8 to the span of a row, which is lost in the rounding of any span
    that a norm or an activation has.

    Returns:
        Levels `[T, K + 8]`, uint8, of which the last eight are the bytes of the others: products have zeros for them,
        which costs 2 % and spares a copy (19 to 89 µs). And what a level is worth and the least element, float32
        `[T, 1]` each: `x ≈ levels × step + lowest`.
    """
    found: tuple[Tensor, Tensor, Tensor] = int8_script().quantize_tokens(x.float())
    return found


@cache
def can_multiply_int8() -> bool:
    """Whether this machine multiplies int8 fast, and the installed torch does so exactly."""
    if not has_fast_int8():
        return False
    weight = (torch.arange(32 * 64) % 255 - 127).to(torch.int8).view(32, 64)
    wanted = (torch.arange(8 * 64) % 256).to(torch.uint8).view(8, 64)
    wanted[:, 0], wanted[:, 1] = 0, 255
    try:
        packed = PackedInt8.of(weight, torch.ones(32))
        levels, step, lowest = quantize_tokens(wanted * 0.5 - 3)
        found = packed.multiply(levels)
    except (RuntimeError, AttributeError, NotImplementedError):  # its names are torch's own, and may change
        return False
    is_rounded = torch.equal(levels[:, :64], wanted) and torch.allclose(step, torch.tensor(0.5))
    is_exact = torch.equal(found, wanted.float() @ weight.float().T)
    return is_rounded and is_exact and bool((lowest == -3).all())


def total_bytes(modules: Iterable[nn.Module]) -> int:
    """Returns the bytes of the weights of products among these modules."""
    return sum(module.size_bytes for module in modules if isinstance(module, Product))
