"""Where texts lie in a packed row, and which of them share a padded batch. Knows lengths, and nothing of models."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KernelVariant = Literal["few", "many", "prepacked", "shared"]
"""How a row runs: through fused layers as one of few tokens or as one of many, or from prepacked weights, on one thread
or shared by several."""


# Of the tokens of a padded batch, padding may be this share before the batch is cut in two.
PADDING_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class LengthGroup:
    """`count` texts of `length` tokens that start at token `start` of the row."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """The token behind the last one."""
        return self.start + self.count * self.length


class PackedLayout:
    """Where each text lies in a packed row.

    Args:
        lengths: tokens of each text, sorted (either way), so that equal lengths are neighbours.
        device: where the tensors live.

    Attributes:
        starts, ends: int64 `[n]`, first token of each text and the one behind its last.
        segments: int64 `[T]`, the text that each token belongs to.
        positions: int64 `[T]`, the place of each token inside its text, from 0.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.num_tokens = sum(lengths)
        self.longest = max(lengths)
        sizes = np.array(lengths, dtype=np.int64)
        ends = sizes.cumsum()
        starts = ends - sizes
        segments = np.repeat(np.arange(len(lengths)), sizes)
        positions = np.arange(self.num_tokens) - starts[segments]
        whole = to_device(np.concatenate([starts, ends, segments, positions]), device)  # one copy, not four
        texts, tokens = len(lengths), self.num_tokens
        self.starts, self.ends = whole[:texts], whole[texts : 2 * texts]
        self.segments, self.positions = whole[2 * texts : -tokens], whole[-tokens:]

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """The texts of each length, which lie side by side."""
        groups, start = [], 0
        for length, run in groupby(self.lengths):
            group = LengthGroup(start, sum(1 for _ in run), length)
            groups.append(group)
            start = group.end
        return tuple(groups)

    @cached_property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """How a row is spread to a padded batch, and back: for each place `[n, L]` the token of the row that stands
        there (padding repeats the first one), of each text its tokens `[n]`, and of each token its place `[T]`.
        """
        sizes = np.array(self.lengths, dtype=np.int64)
        starts, place = (sizes.cumsum() - sizes)[:, None], np.arange(self.longest)
        is_token = place < sizes[:, None]
        return np.where(is_token, starts + place, starts), sizes.astype(np.int32), np.flatnonzero(is_token)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 `[n + 1]`, as flash attention's `cu_seq_lens` wants it."""
        return torch.cat([self.starts[:1], self.ends]).to(torch.int32)


class PackedState(threading.local):
    """The row that runs now on this thread, for code that transformers calls without passing it on."""

    layout: PackedLayout | None = None
    is_fused: bool = False
    form: KernelVariant | None = None

    @contextmanager
    def running(self, layout: PackedLayout, *, is_fused: bool, form: KernelVariant | None = None) -> Iterator[None]:
        """Inside, a row of this layout runs. A pass that gives way to another has its own state back afterwards.

        Args:
            is_fused: through the layers of `engines/layers/fused.py`.
            form: in which they run it; None is whichever suits.
        """
        before = self.layout, self.is_fused, self.form
        self.layout, self.is_fused, self.form = layout, is_fused, form
        try:
            yield
        finally:
            self.layout, self.is_fused, self.form = before


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """A tensor of it there. On its way to a GPU it lies in pinned memory, so that nobody waits for the copy."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def copy_to(tensor: Tensor, array: NDArray[np.int64]) -> None:
    """Overwrite a tensor of the same shape, without waiting for the copy either."""
    source = torch.from_numpy(array)
    tensor.copy_(source if tensor.device.type == "cpu" else source.pin_memory(), non_blocking=True)


def padded(texts: Sequence[NDArray[np.int64]], filler: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids `[n, L]` of texts as a padded batch, and 1 where a token is a text's."""
    shape = len(texts), max(len(ids) for ids in texts)
    ids, mask = np.full(shape, filler, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def bucket_by_length(lengths: Sequence[int], padding_share: float = PADDING_SHARE) -> Iterator[tuple[int, int]]:
    """Cut sorted lengths into runs (start, end) whose padding stays within a share of what is computed."""
    start, real = 0, 0
    for end, length in enumerate(lengths):
        real += length
        longest = max(lengths[start], length)
        if real < (1 - padding_share) * longest * (end + 1 - start):
            yield start, end
            start, real = end, length
    if lengths:
        yield start, len(lengths)
