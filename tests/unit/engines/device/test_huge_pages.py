"""Tests that huge pages change where tensors lie, and nothing else."""

import ctypes

import pytest
import torch

from engines.device import huge_pages
from engines.device.huge_pages import join_rows, use_huge_pages


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Records the ranges for which the system is asked."""
    ranges: list[tuple[int, int]] = []

    class Library:
        def madvise(self, first: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            assert first.value is not None
            ranges.append((first.value, size.value))
            return -1

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda _: Library())  # type: ignore[attr-defined]  # a module
    monkeypatch.setattr(huge_pages, "PAGE_BYTES", 4096)
    return ranges


def test_whole_pages_inside_a_tensor_are_asked_for(advised: list[tuple[int, int]]) -> None:
    tensor = torch.empty(10_000)
    use_huge_pages(tensor)

    [(first, size)] = advised
    assert first % 4096 == size % 4096 == 0
    assert tensor.data_ptr() <= first < tensor.data_ptr() + 4096
    assert 0 <= tensor.data_ptr() + tensor.nbytes - first - size < 4096


def test_nothing_is_asked_for_a_small_tensor(advised: list[tuple[int, int]]) -> None:
    use_huge_pages(torch.empty(1000))

    assert not advised


@pytest.mark.parametrize("shape", [(5,), (5, 700)])
def test_parts_are_joined_as_torch_joins_them(advised: list[tuple[int, int]], shape: tuple[int, ...]) -> None:
    parts = [torch.randn(shape, dtype=torch.bfloat16), torch.randn((2, *shape[1:]), dtype=torch.bfloat16)]

    joined = join_rows(parts)

    assert torch.equal(joined, torch.cat(parts))
    assert joined.is_contiguous()
    assert len(advised) == (len(shape) > 1)
