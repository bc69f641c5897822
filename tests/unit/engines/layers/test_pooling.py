"""Pooling on a packed row against sentence-transformers' Pooling on the padded batch of the same texts."""

from itertools import combinations
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.nn.functional import normalize as torch_normalize

from engines.layers.packing import PackedLayout
from engines.layers.pooling import normalize, pool, truncate_and_normalize
from engines.spec import PoolingMode

MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
CPU = torch.device("cpu")
WIDTH = 6


def hidden_of(lengths: list[int]) -> Tensor:
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(sum(lengths)))


def padded(hidden: Tensor, lengths: list[int], modes: tuple[PoolingMode, ...], prompt: int | None, side: str) -> Tensor:
    """Pools the same texts with sentence-transformers, padded on that side."""
    longest = max(lengths)
    batch, mask = torch.full((len(lengths), longest, WIDTH), 7.0), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, text in enumerate(torch.split(hidden, lengths)):
        place = slice(len(text)) if side == "right" else slice(longest - len(text), longest)
        batch[row, place], mask[row, place] = text, 1
    features = {"token_embeddings": batch, "attention_mask": mask}
    if prompt is not None:
        features["prompt_length"] = torch.tensor([prompt])
    module = Pooling(WIDTH, modes, include_prompt=prompt is None)
    out: Tensor = module(features)["sentence_embedding"]
    return out


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(sorted),
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=3, unique=True),
    side=st.sampled_from(["left", "right"]),
)
def test_every_mode_and_mixture_is_sentence_transformers(
    lengths: list[int], modes: list[PoolingMode], side: str
) -> None:
    hidden = hidden_of(lengths)

    torch.testing.assert_close(
        pool(hidden, PackedLayout(lengths, CPU), modes),
        padded(hidden, lengths, tuple(modes), None, side),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), *combinations(MODES, 2)])
@pytest.mark.parametrize("prompt", [0, 1, 3])
@pytest.mark.parametrize("lengths", [[4, 4, 5, 9], [5]])
def test_a_prompt_is_left_out_as_sentence_transformers_does(
    lengths: list[int], modes: tuple[PoolingMode, ...], prompt: int
) -> None:
    hidden = hidden_of(lengths)
    got = pool(hidden, PackedLayout(lengths, CPU), modes, [prompt] * len(lengths))

    torch.testing.assert_close(got, padded(hidden, lengths, modes, prompt, "right"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean", "mean_sqrt_len_tokens"])
def test_a_prompt_that_is_the_whole_text_leaves_what_sentence_transformers_leaves(mode: PoolingMode) -> None:
    lengths = [3, 5]
    hidden = hidden_of(lengths)
    got = pool(hidden, PackedLayout(lengths, CPU), [mode], [3, 3])

    torch.testing.assert_close(got, padded(hidden, lengths, (mode,), 3, "right"), rtol=0, atol=1e-6)


def test_prompts_of_different_requests_are_left_out_each_by_itself() -> None:
    lengths = [4, 4, 6]
    hidden = hidden_of(lengths)
    got = pool(hidden, PackedLayout(lengths, CPU), ["mean"], [0, 2, 3])
    texts = torch.split(hidden, lengths)

    wanted = torch.stack([texts[0].mean(0), texts[1][2:].mean(0), texts[2][3:].mean(0)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_is_done_in_float32(dtype: torch.dtype) -> None:
    lengths = [700]
    hidden = hidden_of(lengths).to(dtype)

    assert pool(hidden, PackedLayout(lengths, CPU), ["mean"]).dtype == torch.float32
    torch.testing.assert_close(
        pool(hidden, PackedLayout(lengths, CPU), ["mean"]),
        hidden.double().mean(0, keepdim=True).float(),
        rtol=0,
        atol=1e-6,
    )


# Truncating and normalizing.


VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 5


def test_vectors_are_truncated_before_they_are_normalized() -> None:
    out = truncate_and_normalize(VECTORS, dimensions=3, normalized=True, pre_norm=False)

    torch.testing.assert_close(out, VECTORS[:, :3] / VECTORS[:, :3].norm(dim=1, keepdim=True))


def test_truncating_alone_changes_no_component() -> None:
    assert torch.equal(truncate_and_normalize(VECTORS, dimensions=5, normalized=False, pre_norm=False), VECTORS[:, :5])


def test_the_layer_norm_is_over_the_full_width_and_before_truncating() -> None:
    out = truncate_and_normalize(VECTORS, dimensions=3, normalized=False, pre_norm=True)

    torch.testing.assert_close(out, layer_norm(VECTORS, (8,))[:, :3])


def test_the_layer_norm_is_left_out_without_truncating() -> None:
    assert torch.equal(truncate_and_normalize(VECTORS, dimensions=8, normalized=False, pre_norm=True), VECTORS)


def test_vectors_are_normalized_to_the_same_bits_as_by_torch() -> None:
    vectors = torch.cat([VECTORS, torch.zeros(1, 8), torch.full((1, 8), 1e-20), torch.full((1, 8), float("nan"))])

    torch.testing.assert_close(normalize(vectors), torch_normalize(vectors, dim=-1), rtol=0, atol=0, equal_nan=True)


def test_a_zero_vector_stays_zero() -> None:
    assert not truncate_and_normalize(torch.zeros(1, 4), dimensions=4, normalized=True, pre_norm=False).any()
