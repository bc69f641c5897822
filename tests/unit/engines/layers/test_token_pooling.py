"""Merging vectors of tokens is sentence-transformers' `HierarchicalTokenPooling`."""

import pytest
import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from torch import Tensor
from torch.nn.functional import normalize

from engines.layers.token_pooling import TokenPooling


def vectors(count: int, seed: int = 1) -> Tensor:
    return normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 80])
@pytest.mark.parametrize("factor", [1.5, 2, 3, 100])
@pytest.mark.parametrize(("protected", "normalized"), [(1, True), (0, False), (3, True)])
def test_vectors_are_merged_as_sentence_transformers_merges_them(
    count: int, factor: float, protected: int, normalized: bool
) -> None:
    theirs = HierarchicalTokenPooling(factor, num_protected_tokens=protected, normalize_embeddings=normalized)

    found = TokenPooling(factor=factor, num_protected=protected, normalized=normalized)(vectors(count))

    wanted = theirs.pool_one(vectors(count))
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_factor_of_one_merges_nothing() -> None:
    given = 2 * vectors(9)

    assert torch.equal(TokenPooling(normalized=False)(given), given)
    assert torch.allclose(TokenPooling()(given), vectors(9))
