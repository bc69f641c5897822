"""Garbage collection during and after the imports of a start."""

import gc

import pytest

from engines.collection import no_collection


def test_nothing_is_collected_in_the_block_and_what_it_made_stays_out_of_later_collections() -> None:
    before = gc.get_freeze_count()

    with no_collection():
        assert not gc.isenabled()
        kept: list[list[int]] = [[] for _ in range(10)]

    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    assert not any(each is kept for each in gc.get_objects())


def test_a_failed_block_leaves_garbage_collection_on() -> None:
    with pytest.raises(ValueError, match="broken"), no_collection():
        raise ValueError("broken")

    assert gc.isenabled()
