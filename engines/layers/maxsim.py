"""Computes MaxSim, the score of late interaction, of a query with documents whose vectors lie one after the other.

`sum_i max_j (q_i · d_j)` over the vectors `q` of the query and `d` of a document (ColBERT, arXiv:2004.12832, section
3.3). Everything here is float32.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.layers.packing import to_device

PIECE_ELEMENTS = 1 << 22
"""The most products of two vectors that are held at once, 16 MiB, unless one vector of a query has more."""

EMPTY_SCORE = -1e9
"""The score of a document of which no token is scored: below every other, as in sentence-transformers."""


def max_sim(query: Tensor, documents: Tensor, counts: Sequence[int]) -> Tensor:
    """Computes the score of each document, float32 `[n]`.

    Args:
        query: float32 `[q, W]`.
        documents: float32 `[sum(counts), W]`, one document after the other.
        counts: the number of vectors of each document.
    """
    found, first = [], 0
    for start, end in _runs(counts, max(len(query), 1)):
        size = sum(counts[start:end])
        found.append(_scores(query, documents[first : first + size], counts[start:end]))
        first += size
    return torch.cat(found) if found else documents.new_empty(0)


def _runs(counts: Sequence[int], num_queries: int) -> Iterator[tuple[int, int]]:
    """Cuts documents into runs (start, end) that have, padded to the longest, at most `PIECE_ELEMENTS` products."""
    start, longest = 0, 0
    for end, count in enumerate(counts):
        if end > start and num_queries * max(longest, count) * (end + 1 - start) > PIECE_ELEMENTS:
            yield start, end
            start, longest = end, 0
        longest = max(longest, count)
    if counts:
        yield start, len(counts)


def _scores(query: Tensor, documents: Tensor, counts: Sequence[int]) -> Tensor:
    sizes = np.array(counts, dtype=np.int64)
    total = documents.new_zeros(len(counts))
    if len(documents):
        places = to_device(_padded_places(sizes), documents.device)
        rows = max(1, PIECE_ELEMENTS // places.numel())
        for first in range(0, len(query), rows):
            products = query[first : first + rows] @ documents.T
            total += products[:, places].amax(-1).sum(0)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        total[to_device(empty, total.device)] = EMPTY_SCORE
    return total


def _padded_places(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the indexes of each document's vectors, `[n, longest]`; the last one fills shorter rows, which changes no
    maximum. A document without vectors gets another's."""
    starts = sizes.cumsum() - sizes
    offsets = np.minimum(np.arange(sizes.max())[None], np.maximum(sizes - 1, 0)[:, None])
    places: NDArray[np.int64] = np.minimum(starts[:, None] + offsets, sizes.sum() - 1)
    return places
