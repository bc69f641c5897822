"""Compares packed attention on the device with float32 attention of each text by itself."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.rig import timed
from benchmarks.gpu.runner import PartContext
from engines.layers.attention import packed_attention
from engines.layers.packing import PackedLayout
from engines.models.base import Size
from engines.models.cuda_graphs import FixedPackedLayout

HEAD_WIDTHS = (12, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 512)
LENGTHS = (1, 2, 2, 7, 33, 64, 64, 200, 300)
"""Shorter and longer than the blocks of windowed attention; neighbours of one length share a call."""

ERROR_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of the norm of the difference to that of the result: bfloat16 keeps 8 bits, and rounds probabilities and values."""

SPEED_LENGTHS = {"cuda": (128,) * 128, "cpu": (128,) * 4}
_REPEATS = 10


class Case(Struct, frozen=True, kw_only=True):
    """One form of attention."""

    name: str
    head_width: int
    heads: int = 4
    key_heads: int = 4
    causal: bool = False
    window: int | None = None


def cases() -> Iterator[Case]:
    """Every head width, with each thing that changes which kernel runs."""
    for width in HEAD_WIDTHS:
        yield Case(name="plain", head_width=width)
        yield Case(name="causal", head_width=width, causal=True)
        yield Case(name="grouped queries", head_width=width, key_heads=2, causal=True)
        yield Case(name="window", head_width=width, window=25)
        yield Case(name="causal window", head_width=width, causal=True, window=25)


def run(context: PartContext) -> None:
    """Record the error of each case, of rows with empty places, and the time of a layer."""
    device = torch.device(context.device)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if context.is_cuda else (torch.float32,)
    for case in cases():
        for dtype in dtypes:
            layout = PackedLayout(list(LENGTHS), device)
            states = random_states(case, layout.num_tokens, device, dtype)
            context.record(**judge(case, states, layout, LENGTHS))
        if case.name == "plain":
            for dtype in dtypes[:2]:
                context.record(**speed(case, device, dtype))
    if context.is_cuda:
        for width in HEAD_WIDTHS:
            context.record(**empty_places(Case(name="empty places", head_width=width), device))


def random_states(case: Case, num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value `[1, heads, T, d]`."""
    generator = torch.Generator().manual_seed(case.head_width)
    return [
        torch.randn(1, heads, num_tokens, case.head_width, generator=generator).to(device, dtype)
        for heads in (case.heads, case.key_heads, case.key_heads)
    ]


def attend(case: Case, states: Sequence[Tensor], layout: PackedLayout) -> Tensor:
    """Return packed attention `[T, heads, d]`."""
    query, key, value = states
    out, _ = packed_attention(
        nn.Module(), query, key, value, None, packed_layout=layout, scaling=case.head_width**-0.5,
        is_causal=case.causal, sliding_window=case.window,
    )  # fmt: skip
    return out[0]


def expected(case: Case, states: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Return attention `[T, heads, d]` of each text by itself, in float32 on the CPU."""
    query, key, value = (each.float().cpu() for each in states)
    rows, start = [], 0
    for length in lengths:
        places = torch.arange(length)
        distance = places[:, None] - places[None, :]
        seen = torch.ones(length, length, dtype=torch.bool) if not case.causal else distance >= 0
        if case.window is not None:
            seen &= distance.abs() < case.window
        q, k, v = (each[:, :, start : start + length] for each in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True, scale=case.head_width**-0.5)
        rows.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(rows)


def judge(case: Case, states: Sequence[Tensor], layout: PackedLayout, lengths: Sequence[int]) -> dict[str, object]:
    """Return a record: the error, or what was raised."""
    dtype = states[0].dtype
    found = {"case": case.name, "head_width": case.head_width, "dtype": str(dtype).removeprefix("torch.")}
    try:
        got = attend(case, states, layout)[: sum(lengths)].float().cpu()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {**found, "ok": False, "raised": f"{type(error).__name__}: {error}"[:300]}
    wanted = expected(case, [each[:, :, : sum(lengths)] for each in states], lengths)
    share = float((got - wanted).norm() / wanted.norm())
    return {**found, "ok": share <= ERROR_LIMITS[dtype], "error": share}


def empty_places(case: Case, device: torch.device) -> dict[str, object]:
    """Return the record of a row of a fixed size, as CUDA graphs have it, with texts in three of its eight places."""
    lengths = [5, 17, 60]
    layout = FixedPackedLayout(Size(256, 8), 0, device)
    layout.set_texts([np.zeros(length, dtype=np.int64) for length in lengths])
    states = random_states(case, layout.num_tokens, device, torch.bfloat16)
    return judge(case, states, layout, lengths)


def speed(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Return the record of the time that one layer's attention takes over many texts of 128 tokens."""
    layout = PackedLayout(list(SPEED_LENGTHS[device.type]), device)
    states = random_states(case, layout.num_tokens, device, dtype)

    def calls() -> None:
        for _ in range(_REPEATS):
            attend(case, states, layout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = {"case": "speed", "head_width": case.head_width, "dtype": str(dtype).removeprefix("torch.")}
    try:
        calls()
        seconds = min(timed(calls) for _ in range(3)) / _REPEATS
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {**found, "ok": False, "raised": f"{type(error).__name__}: {error}"[:300]}
    return {**found, "ok": True, "tokens": layout.num_tokens, "microseconds": round(seconds * 1e6, 1)}
