"""The fake engine's sparse outputs and vectors of tokens: each word is a token, so that tests can compute them."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.types import OutputsCall

SPARSE_ENTRIES = 30_000
TOKEN_WIDTH = 4


Terms = tuple[NDArray[np.int32], NDArray[np.float32]]


class FakeRow(NamedTuple):
    """The outputs of one text: rising entries int32 `[k]`, their weights float32 `[k]`, vectors float32 `[n, 4]`."""

    entries: NDArray[np.int32]
    weights: NDArray[np.float32]
    vectors: NDArray[np.float32]


def fake_row(text: str) -> FakeRow:
    """Computes the outputs of a text: an entry for each distinct word, that weighs its count; a vector for each word
    and the two special tokens around them."""
    words = _words(text)
    entries, counts = np.unique([_entry(word) for word in words], return_counts=True)
    vectors = [_vector(word) for word in ("[CLS]", *words, "[SEP]")]
    return FakeRow(entries.astype("<i4"), counts.astype("<f4"), np.stack(vectors))


def fake_names(text: str) -> dict[int, str]:
    """Returns the word of each entry of a text."""
    return {_entry(word): word for word in _words(text)}


def fake_maxsim(query: str, text: str) -> float:
    """Computes the MaxSim of two texts from their vectors (`fake_row`)."""
    return float((fake_row(query).vectors @ fake_row(text).vectors.T).max(axis=1).sum(dtype=np.float32))


def chosen_terms(row: FakeRow, call: OutputsCall) -> Terms:
    """Returns the entries and weights of a row that a call asks for: the heaviest, the lower entry of equal ones."""
    order = np.lexsort((row.entries, -row.weights))[: call.sparse_top_k]
    kept = np.sort(order[row.weights[order] >= call.sparse_min_weight])
    return row.entries[kept], row.weights[kept]


def join_body(parts: Sequence[NDArray[np.float32] | NDArray[np.int32]]) -> bytes:
    """Joins arrays of little-endian numbers to the body of `Outputs`."""
    return b"".join(part.tobytes() for part in parts)


def _words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def _entry(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") % SPARSE_ENTRIES


def _vector(word: str) -> NDArray[np.float32]:
    raw = np.random.default_rng(_entry(word)).standard_normal(TOKEN_WIDTH)
    return (raw / np.linalg.norm(raw)).astype("<f4")
