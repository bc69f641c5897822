"""MaxSim is sentence-transformers', whatever the lengths, the order and the size of the pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.util.similarity import maxsim
from torch import Tensor
from torch.nn.functional import normalize

from engines.layers import maxsim as module
from engines.layers.maxsim import EMPTY_SCORE, max_sim

WIDTH = 16


def vectors(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def scores(query: Tensor, documents: list[Tensor]) -> Tensor:
    return max_sim(query, torch.cat(documents), [len(document) for document in documents])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.sampled_from([64, 1000, module.PIECE_ELEMENTS]),
)
def test_scores_are_those_of_sentence_transformers(num_query: int, counts: list[int], piece: int) -> None:
    query = vectors(num_query, 1)
    documents = [vectors(count, seed) for seed, count in enumerate(counts)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_ELEMENTS", piece)
        found = scores(query, documents)

    assert torch.allclose(found, maxsim([query], documents)[0], atol=1e-5)


def test_a_document_has_the_same_score_beside_any_others() -> None:
    query, document = vectors(32, 1), vectors(20, 2)

    alone = scores(query, [document])
    beside = scores(query, [vectors(300, 3), document, vectors(1, 4)])

    assert abs(float(alone[0] - beside[1])) <= 1e-5


def test_a_negative_best_match_is_not_hidden_by_padding() -> None:
    query = torch.tensor([[1.0, 0.0]])

    found = max_sim(query, torch.tensor([[-1.0, 0.0], [0.5, 0.5], [-0.2, 1.0], [-0.3, 1.0]]), [1, 3])

    assert np.allclose(found, [-1.0, 0.5])


def test_a_document_without_vectors_is_below_all_others() -> None:
    query = vectors(4, 1)

    found = max_sim(query, vectors(3, 2), [0, 3, 0])

    assert found[0] == found[2] == EMPTY_SCORE
    assert float(found[1]) > -4
    assert max_sim(query, torch.empty(0, WIDTH), [0]).tolist() == [EMPTY_SCORE]


def test_the_products_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 100)
    counts = [5, 5, 60, 1, 1, 9]

    runs = list(module._runs(counts, 8))

    assert [index for start, end in runs for index in range(start, end)] == list(range(len(counts)))
    for start, end in runs:
        assert end - start == 1 or 8 * max(counts[start:end]) * (end - start) <= 100
