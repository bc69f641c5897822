"""Packed attention against the plain formula, for each text by itself: scores, mask, softmax."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.layers import attention
from engines.layers.attention import band, has_varlen, packed_attention
from engines.layers.packing import PackedLayout, WindowMasks
from tests.testkit.encoders import varlen

CPU = torch.device("cpu")
HEADS, WIDTH = 4, 8


class Layer(nn.Module):
    """A layer with the attributes that transformers' attention interface reads."""

    def __init__(self, is_causal: bool | None = None, config: object = None) -> None:
        super().__init__()
        self.config = config
        if is_causal is not None:
            self.is_causal = is_causal


def states(tokens: int, heads: int = HEADS, seed: int = 0) -> Tensor:
    return torch.randn(1, heads, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain(  # noqa: PLR0913  # the formula's arguments
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, bias: Tensor | None, scaling: float | None
) -> Tensor:
    """Computes attention of one text by the formula: `[heads, L, d]` each to `[L, heads, d]`."""
    length = q.shape[1]
    k, v = (states.repeat_interleave(q.shape[0] // states.shape[0], dim=0) for states in (k, v))
    scores = q @ k.transpose(1, 2) * (WIDTH**-0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + bias[0, :, :length, :length]
    for i in range(length):
        for j in range(length):
            is_hidden = (causal and j > i) or (window is not None and abs(i - j) >= window)
            if is_hidden:
                scores[:, i, j] = -torch.inf
    return (scores.softmax(-1) @ v).transpose(0, 1)


def packed(
    lengths: list[int], *, kv_heads: int = HEADS, layer: Layer | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Returns packed attention of texts of those lengths, and that of the formula, `[1, T, heads, d]` each."""
    total = sum(lengths)
    q, k, v = states(total), states(total, kv_heads, 1), states(total, kv_heads, 2)
    module = layer or Layer(bool(options.get("is_causal")))
    out, weights = packed_attention(module, q, k, v, None, packed_layout=PackedLayout(lengths, CPU), **options)
    assert weights is None
    starts = np.cumsum([0, *lengths])
    texts = [
        plain(
            q[0, :, a:b], k[0, :, a:b], v[0, :, a:b],
            causal=bool(options.get("is_causal")), window=options.get("sliding_window"),
            bias=options.get("position_bias"), scaling=options.get("scaling"),
        )
        for a, b in pairwise(starts)
    ]  # fmt: skip
    return out, torch.cat(texts)[None]


MIXED = [1, 1, 2, 3, 3, 3, 7, 12, 12, 20]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_each_text_attends_to_itself_only(causal: bool, window: int | None, kv_heads: int) -> None:
    got, wanted = packed(MIXED, kv_heads=kv_heads, is_causal=causal, sliding_window=window)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8).map(sorted),
    window=st.one_of(st.none(), st.integers(1, 30)),
    causal=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    scaling=st.one_of(st.none(), st.floats(0.1, 2.0)),
)
def test_any_lengths_any_window_any_heads(
    lengths: list[int], window: int | None, causal: bool, kv_heads: int, scaling: float | None
) -> None:
    got, wanted = packed(lengths, kv_heads=kv_heads, is_causal=causal, sliding_window=window, scaling=scaling)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 17, 64, 129, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_a_long_text_in_blocks_is_the_same_as_in_one_piece(causal: bool, window: int) -> None:
    length = 2 * attention._WHOLE + 37
    got, _ = packed_attention(
        Layer(causal), states(length), states(length, 2, 1), states(length, 2, 2), None,
        packed_layout=PackedLayout([length], CPU), sliding_window=window,
    )  # fmt: skip
    place = torch.arange(length)
    apart = place[:, None] - place[None, :]
    mask = (apart < window) & ((apart >= 0) if causal else (apart > -window))
    k, v = (states(length, 2, seed).repeat_interleave(2, dim=1) for seed in (1, 2))
    whole = nn.functional.scaled_dot_product_attention(states(length), k, v, attn_mask=mask)

    torch.testing.assert_close(got, whole.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_a_position_bias_is_cut_to_each_text(causal: bool, window: int | None) -> None:
    by_distance = torch.randn(HEADS, 61, generator=torch.Generator().manual_seed(5))
    place = torch.arange(30)
    bias = by_distance[:, place[:, None] - place[None, :] + 30][None]
    got, wanted = packed(MIXED, is_causal=causal, sliding_window=window, position_bias=bias, scaling=1.0)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "causal"),
    [
        (Layer(True), True),
        (Layer(False), False),
        (Layer(), True),
        (Layer(True, type("Config", (), {"is_causal": False})), False),
        (Layer(True, type("Config", (), {"is_causal": True})), True),
        (Layer(False, type("Config", (), {"is_causal": True})), False),
        (Layer(True, type("Config", (), {"is_causal": None})), True),
    ],
)
def test_causality_is_that_of_the_layer_unless_its_config_turns_it_off(layer: Layer, causal: bool) -> None:
    got, _ = packed([5, 6], layer=layer)
    _, wanted = packed([5, 6], is_causal=causal)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_the_causality_of_the_call_counts_more_than_the_layers() -> None:
    got, wanted = packed([5, 6], layer=Layer(True), is_causal=False)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "options", "feature"),
    [
        (None, {"softcap": 30.0}, "soft-capped scores"),
        (None, {"s_aux": torch.zeros(HEADS)}, "attention sinks"),
        (torch.zeros(1, 1, 4, 4), {}, "a mask of the model's own"),
    ],
)
def test_unsupported_changes_of_the_scores_are_refused(
    mask: Tensor | None, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"its attention has {feature}"):
        packed_attention(
            Layer(True), states(4), states(4), states(4), mask, packed_layout=PackedLayout([4], CPU), **options
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_band_is_the_mask_of_a_window_and_does_not_grow_with_texts(causal: bool, window: int) -> None:
    allowed = band(causal, window, CPU)
    i, j = torch.meshgrid(torch.arange(allowed.shape[0]), torch.arange(allowed.shape[1]), indexing="ij")
    j = j - (window - 1)

    assert torch.equal(allowed, ((i - j).abs() < window) & ((i >= j) if causal else torch.tensor(True)))
    assert allowed.shape == (256, 256 + (window - 1) * (1 if causal else 2))


@pytest.mark.parametrize(("causal", "size_bytes"), [(True, 8_454_144 - 256), (False, 16_842_752 - 512)])
def test_the_band_of_a_long_window_is_small(causal: bool, size_bytes: int) -> None:
    assert band(causal, 32_768, CPU).nbytes == size_bytes


def test_the_masks_of_windows_are_made_once_and_freed_with_their_owner() -> None:
    masks, length = WindowMasks(), 40
    for window in (3, 5, 3, length):
        for causal in (True, False):
            packed_attention(
                Layer(causal), states(length), states(length), states(length), None,
                packed_layout=PackedLayout([length], CPU, masks), sliding_window=window,
            )  # fmt: skip
    kept = [weakref.ref(mask) for mask in masks._masks.values()]
    size_bytes = masks.size_bytes
    del masks
    gc.collect()

    assert len(kept) == 4, "none for a window that reaches everywhere"
    assert size_bytes == 256 * (4 * 256 + 2 + 4 + 4 + 8)
    assert [mask() for mask in kept] == [None] * 4


@pytest.mark.parametrize(
    ("window", "causal", "flash"),
    [(None, True, (-1, 0)), (None, False, (-1, -1)), (5, True, (4, 0)), (5, False, (4, 4)), (1, False, (0, 0))],
)
def test_flash_attention_counts_its_window_inclusively(
    window: int | None, causal: bool, flash: tuple[int, int]
) -> None:
    assert attention._flash_window(window, causal) == flash


@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_only_half_precision_on_cuda_has_the_kernel(dtype: torch.dtype, has: bool) -> None:
    assert has_varlen(torch.device("cuda:1"), dtype) == (has and hasattr(torch.nn.attention, "varlen"))
    assert not has_varlen(CPU, dtype)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernels_arguments_mean_the_same_as_attention_by_length(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, kv_heads: int
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "_VARLEN", {("cpu", torch.float32)})
    got, wanted = packed(MIXED, kv_heads=kv_heads, is_causal=causal, sliding_window=window, scaling=0.4)

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_on_cuda_the_whole_row_goes_to_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the arguments and the shapes on both sides, without the kernel, which only CUDA has."""
    seen: dict[str, Any] = {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.update(options, q=q.shape, k=k.shape, offsets=args[0].tolist(), longest=args[2:])
        return q

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    layout = PackedLayout([2, 3], CPU)
    monkeypatch.setattr(attention, "_VARLEN", {("cpu", torch.float32)})
    out, _ = packed_attention(
        Layer(True), states(5), states(5, 2, 1), states(5, 2, 2), None,
        packed_layout=layout, scaling=0.5, sliding_window=4,
    )  # fmt: skip

    assert seen == {
        "q": (5, 4, 8), "k": (5, 2, 8), "offsets": [0, 2, 5], "longest": (3, 3), "scale": 0.5, "window_size": (3, 0),
        "enable_gqa": True,
    }  # fmt: skip
    assert torch.equal(out, states(5).transpose(1, 2))


# Packed layouts.


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12).map(sorted))
def test_a_layout_gives_each_token_its_text_and_position(lengths: list[int]) -> None:
    layout = PackedLayout(lengths, CPU)
    tokens = [(text, place) for text, length in enumerate(lengths) for place in range(length)]

    assert layout.segments.tolist() == [text for text, _ in tokens]
    assert layout.positions.tolist() == [place for _, place in tokens]
    assert [end - start for start, end in zip(layout.starts.tolist(), layout.ends.tolist(), strict=True)] == lengths
    assert layout.offsets.tolist() == [0, *layout.ends.tolist()]
    assert layout.offsets.dtype == torch.int32
    assert (layout.num_tokens, layout.longest) == (len(tokens), max(lengths))


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12).map(sorted))
def test_texts_of_one_length_are_one_group(lengths: list[int]) -> None:
    groups = PackedLayout(lengths, CPU).groups

    assert [group.length for group in groups] == sorted(set(lengths))
    assert [group.count for group in groups] == [lengths.count(group.length) for group in groups]
    assert [group.start for group in groups] == [0, *(group.end for group in groups[:-1])]
    assert groups[-1].end == sum(lengths)
