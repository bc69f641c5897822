"""Tests the cache of vectors: exact, within its bytes, and the oldest evicted first."""

import numpy as np
from numpy.typing import NDArray

from engines.batching.cache import VectorCache
from engines.batching.output import DenseOutput
from engines.batching.request import Key


def key(name: str) -> Key:
    return name.encode(), 0, "", DenseOutput


def vectors(*firsts: float) -> NDArray[np.float32]:
    return np.array([[first, 0.5] for first in firsts], dtype=np.float32)


def test_what_was_kept_is_found_by_its_place() -> None:
    cache = VectorCache(10_000)
    cache.keep([key("a"), key("b")], vectors(1, 2))

    found = cache.find([key("c"), key("b"), key("a")])

    assert {index: float(vector[0]) for index, vector in found.items()} == {1: 2.0, 2: 1.0}


def test_the_same_ids_behind_another_prompt_are_something_else() -> None:
    cache = VectorCache(10_000)
    cache.keep([(b"a", 3, "", DenseOutput)], vectors(1))

    assert cache.find([(b"a", 0, "", DenseOutput)]) == {}


def test_the_least_recently_used_leaves_first_and_the_bytes_are_kept() -> None:
    cache = VectorCache(1000)
    for number in range(4):
        cache.keep([key(str(number))], vectors(number))
    cache.find([key("0")])
    cache.keep([key("new")], vectors(9))

    assert list(cache.find([key(name) for name in ("0", "1", "2", "3", "new")])) == [0, 2, 3, 4]
    assert cache.size_bytes <= 1000


def test_what_is_kept_twice_counts_once() -> None:
    cache = VectorCache(10_000)
    cache.keep([key("a")], vectors(1))
    before = cache.size_bytes
    cache.keep([key("a")], vectors(1))

    assert cache.size_bytes == before


def test_a_vector_does_not_keep_its_batch_in_memory() -> None:
    cache = VectorCache(10_000)
    batch = vectors(*range(50))
    cache.keep([key("a")], batch[:1])

    assert cache.find([key("a")])[0].base is None


def test_a_cache_too_small_for_anything_keeps_nothing() -> None:
    cache = VectorCache(10)
    cache.keep([key("a")], vectors(1))

    assert cache.find([key("a")]) == {}
    assert cache.size_bytes == 0
