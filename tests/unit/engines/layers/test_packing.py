"""The places of texts in a packed row, which a single short text shares with others of its length."""

import pytest
import torch

from engines.layers.packing import PackedLayout

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [1, 7, 256, 257])
def test_a_text_alone_has_the_places_that_it_has_in_front_of_others(length: int) -> None:
    alone, first = PackedLayout([length], CPU), PackedLayout([length, length + 1], CPU)

    for name, size in {"starts": 1, "ends": 1, "segments": length, "positions": length}.items():
        assert torch.equal(getattr(alone, name), getattr(first, name)[:size])


def test_a_text_alone_is_one_row_of_a_batch_without_padding() -> None:
    spread, lengths, picked = PackedLayout([3], CPU).padded_places

    assert (spread.tolist(), lengths.tolist(), picked.tolist()) == ([[0, 1, 2]], [3], [0, 1, 2])


def test_the_places_of_short_texts_are_made_once_for_each_length() -> None:
    layouts = [PackedLayout([length], CPU) for length in (9, 9, 10, 257, 257)]
    nine, again, ten, long, longer = (layout.positions.data_ptr() for layout in layouts)

    assert nine == again
    assert len({nine, ten, long, longer}) == 4
