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

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engines.device.cpu_features import has_fast_int8

_LEVELS = 127
"""Steps of int8 on each side of zero."""

_PACKED_FOR_ROWS = 64
"""The form of oneDNN's packed weights depends on the number of rows that they are packed for; all rows may use it."""


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

    def multiply_and_add(self, x: Tensor, other: Tensor) -> Tensor:
        """Returns the sum of the product and `other` `[T, out]`, rounded once; `x` `[T, in]`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), other, self.packed, self.bias, "add")
        return found

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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        super().__init__(weight, torch.int8)
        rounded, scale = quantize_rows(weight) if scale is None else (weight, scale)
        self.out_dtype: torch.dtype | None = None
        self._scale, self._bias = scale, None if bias is None else bias.detach().float()
        self._zeros = torch.zeros(len(scale), dtype=torch.int64)
        self._row_sums = scale * rounded.float().sum(1)  # exact, and 28 times as fast as sums of int8
        self._is_packed = can_multiply_int8()
        shape = [_PACKED_FOR_ROWS, self.in_features]
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, shape) if self._is_packed else rounded
        self.size_bytes = weight.numel() + 8 * len(scale)

    def multiply(self, x: Tensor) -> Tensor:
        """See `Product`."""
        dtype = self.out_dtype or x.dtype
        if not self._is_packed:  # smaller, but no faster
            return linear(x.float(), self._weight * self._scale[:, None], self._bias).to(dtype)
        levels, scale, lowest = quantize_tokens(x)
        # In place: new memory costs more than the sums. In float32: torch adds bfloat16 half as fast.
        found = _sums(levels, self._weight, self._scale, self._zeros).mul_(scale).addcmul_(lowest, self._row_sums)
        return (found if self._bias is None else found.add_(self._bias)).to(dtype)


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

    torch's operator is made for tables of embeddings: 35 µs for 512 × 384 on one core of an EPYC (Zen 5), where seven
    of its elementwise operators take 100. It adds 1e-8 to the span of a row, which is lost in the rounding of any span
    that a norm or an activation has.

    Returns:
        Levels `[T, K]`, uint8; what a level is worth and the least element, float32 `[T, 1]` each:
        `x ≈ levels × scale + lowest`.
    """
    rows: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(x.float())
    width = x.shape[1]
    bounds = rows[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)  # aligned
    return rows[:, :width].contiguous(), bounds[:, :1], bounds[:, 1:]


def _sums(levels: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Multiplies levels `[T, K]` with packed weights, and scales each output; gives float32."""
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, 0, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
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
        packed = torch.ops.onednn.qlinear_prepack(weight, [8, 64])
        levels, scale, lowest = quantize_tokens(wanted * 0.5 - 3)
        found = _sums(levels, packed, torch.ones(32), torch.zeros(32, dtype=torch.int64))
    except (RuntimeError, AttributeError, NotImplementedError):  # its names are torch's own, and may change
        return False
    is_rounded = torch.equal(levels, wanted) and torch.allclose(scale, torch.tensor(0.5)) and bool((lowest == -3).all())
    return is_rounded and torch.equal(found, levels.float() @ weight.float().T)


def total_bytes(modules: Iterable[nn.Module]) -> int:
    """Returns the bytes of the weights of products among these modules."""
    return sum(module.size_bytes for module in modules if isinstance(module, Product))
