"""Computes attention inside each text of a packed row by one kernel: flash attention, which torch has on CUDA only.

torch's operator `aten::_flash_attention_forward` is called directly. `torch.nn.attention.varlen.varlen_attn` runs the
same kernel, but through a custom operator written in Python, which costs the host 24 µs a layer, and not every release
can express every call:

| torch | `varlen_attn` | the operator |
|---|---|---|
| 2.9 | – | scale, window |
| 2.10 | `is_causal` | scale, window |
| 2.11 | `scale`, `window_size` | scale, window |
| 2.12, 2.13 | `scale`, `window_size`, `enable_gqa` | scale, window |

So the public function is used only where the operator has changed, or does not give the same result; and where that
function cannot express a call, `engines/layers/attention.py` computes it by text length.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import structlog
import torch
from msgspec import Struct
from torch import Tensor
from torch.nn.functional import pad

from engines.device.torch_runtime import compute_capability
from engines.layers.packing import PackedLayout

log = structlog.get_logger(__name__)

MAX_HEAD_WIDTH = 256
_HEAD_MULTIPLE = 8
"""The kernel takes heads of a multiple of 8 up to 256 wide; others are padded with zeros, which changes no score."""

_AMPERE = (8, 0)
"""The compute capability from which on the kernel exists."""

Window = tuple[int, int]
"""Tokens that a query attends to on its left and right besides itself; -1 is unbounded."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, Window], Tensor]
"""(query, key, value `[T, heads, d]`, int32 offsets `[n + 1]`, longest text, scale, window) → `[T, heads, d]`."""

_UNBOUNDED: Window = (-1, -1)
_CAUSAL: Window = (-1, 0)


class VarlenKernel(Struct, frozen=True):
    """One way to call the kernel.

    Args:
        run: calls it.
        has_scale: whether it takes another scale than `d ** -0.5`.
        has_window: whether it takes bounded windows.
    """

    run: Run
    has_scale: bool = True
    has_window: bool = True

    def supports(self, query: Tensor, value: Tensor, scale: float | None, window: Window) -> bool:
        """Tells whether it can compute the attention of these states `[1, heads, T, d]`."""
        width = query.shape[-1]
        needs_scale = width % _HEAD_MULTIPLE != 0 or scale not in (None, width**-0.5)
        return (
            width <= MAX_HEAD_WIDTH
            and value.shape[-1] == width
            and (self.has_scale or not needs_scale)
            and (self.has_window or window in (_UNBOUNDED, _CAUSAL))
        )

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float | None, window: Window
    ) -> Tensor:
        """Computes the attention of a row, `[1, heads, T, d]` each, to `[1, T, heads, d]`."""
        width = query.shape[-1]
        missing = -width % _HEAD_MULTIPLE
        q, k, v = (_rows(states, missing) for states in (query, key, value))
        if missing and scale is None:
            scale = width**-0.5
        out = self.run(q, k, v, layout.offsets, layout.longest, scale, window)
        return (out[..., :width] if missing else out)[None]


def _rows(states: Tensor, missing: int) -> Tensor:
    """Returns `[1, heads, T, d]` as contiguous `[T, heads, d + missing]`."""
    rows = states[0].transpose(0, 1)
    return pad(rows, (0, missing)) if missing else rows.contiguous()


@lru_cache(maxsize=64)
def choose_kernel(public: Callable[..., Any] | None, device: torch.device) -> VarlenKernel | None:
    """Returns the kernel of a device, None where it has none.

    The operator is compared with the public function once a device; where a GPU is only simulated, it cannot be.

    Args:
        public: torch's public function; None where this torch has none.
    """
    capability = compute_capability(device)
    if capability is not None and capability < _AMPERE:
        return None
    direct = direct_kernel(torch.ops.aten._flash_attention_forward.default) if device.type == "cuda" else None
    other = None if public is None else public_kernel(public)
    if direct is None or other is None:
        return direct or other
    if capability is not None and not gives_the_same(direct, other, device):
        log.warning("varlen.operator_differs", device=str(device), torch=torch.__version__)
        return other
    return direct


def direct_kernel(operator: Any) -> VarlenKernel | None:
    """Returns the kernel by torch's operator; None where that has not the arguments that it had from 2.5 to 2.13."""
    names = [argument.name for argument in operator._schema.arguments]
    first = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    named = {"scale", "window_size_left", "window_size_right"}
    if names[:10] != [*first, "return_debug_mask"] or not named.issubset(names[10:]):
        return None

    def run(  # noqa: PLR0913  # see `Run`
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float | None, window: Window
    ) -> Tensor:
        out: Tensor = operator(
            q, k, v, offsets, offsets, longest, longest, 0.0, window == _CAUSAL, False,
            scale=scale, window_size_left=window[0], window_size_right=window[1],
        )[0]  # fmt: skip
        return out

    return VarlenKernel(run)


def public_kernel(public: Callable[..., Any]) -> VarlenKernel | None:
    """Returns the kernel by torch's public function, as far as its signature goes; None where it is unknown."""
    parameters = inspect.signature(public).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    has_scale, has_window, has_gqa = (
        takes_any or name in parameters for name in ("scale", "window_size", "enable_gqa")
    )
    if not has_window and "is_causal" not in parameters:
        return None

    def run(  # noqa: PLR0913  # see `Run`
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float | None, window: Window
    ) -> Tensor:
        options: dict[str, Any] = {"window_size": window} if has_window else {"is_causal": window == _CAUSAL}
        if has_scale:
            options["scale"] = scale
        if has_gqa:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        out = public(q, k, v, offsets, offsets, longest, longest, **options)
        assert isinstance(out, Tensor)
        return out

    return VarlenKernel(run, has_scale, has_window)


@torch.inference_mode()
def gives_the_same(one: VarlenKernel, other: VarlenKernel, device: torch.device) -> bool:
    """Tells whether two ways to call the kernel give the same bits, for each kind of call that both can express."""
    layout = PackedLayout([1, 5, 12], device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, layout.num_tokens, 64, generator=generator).to(device, torch.float16)
        for heads in (4, 2, 2)
    )
    scales = (None, 0.25) if one.has_scale and other.has_scale else (None,)
    windows = (_UNBOUNDED, _CAUSAL, (3, 3), (3, 0)) if one.has_window and other.has_window else (_UNBOUNDED, _CAUSAL)
    try:
        return all(
            torch.equal(*(kernel(q, k, v, layout, scale, window) for kernel in (one, other)))
            for scale in scales
            for window in windows
        )
    except Exception as error:  # noqa: BLE001  # one of them fails: the public one is the one that torch promises
        log.warning("varlen.not_compared", reason=type(error).__name__)
        return False
