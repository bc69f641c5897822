"""Lays texts out in packed rows and padded batches. Depends on their lengths only, not on models."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, groupby
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.inputs.token_ids import UNSEEN, num_seen

KernelVariant = Literal["few", "many", "prepacked", "shared"]
"""The kernels that run a row: those of fused layers for few or for many tokens, or those of prepacked weights on one
thread or shared by several threads."""

TokenChoice = Literal["all", "first", "last"]
"""The tokens of each text whose hidden states a head reads."""

# The largest share of padding among the tokens of a padded batch; beyond it the batch is cut in two.
PADDING_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class LengthGroup:
    """`count` texts of `length` tokens that start at token `start` of the row."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """The index after the last token."""
        return self.start + self.count * self.length


SCORES = 2**18
"""Attention scores at once: with twice or half as many in float32, texts of 64 to 250 tokens take 1.1 to 1.2 times as
long."""

_KEPT_TOKENS = 256
"""The places of a single text of up to so many tokens are kept for the next one: 1 MiB for all lengths. To make them
takes 14 calls of numpy and torch, 60 µs behind a forward pass that has emptied the caches."""

_STEPS = ((128, 16), (256, 32))
"""Lengths up to the first are rounded up to a multiple of the second; longer ones to one of `_LONG_STEP`."""

_LONG_STEP = 64


def rounded_length(length: int) -> int:
    """Returns the length to which texts of similar lengths are padded where they share products."""
    step = next((step for longest, step in _STEPS if length <= longest), _LONG_STEP)
    return -(-length // step) * step


def attention_blocks(layout: "PackedLayout", heads: int, *, is_rounded: bool) -> tuple[list[list[int]], list[Tensor]]:
    """Cuts a row into blocks of texts of similar lengths, each padded to one length.

    Args:
        is_rounded: whether the lengths of blocks are rounded up, so that they are few.

    Returns:
        Of each block: its first token and the one after its last, its texts, their padded length, and where its
        tensors begin, -1 where it has no padding. The tensors: for each place of the padded texts, the index of a token
        in the row; for each token, the index of its place; and float32 `[texts × heads, 1, length]`, 1 for tokens and
        0 for padding.
    """
    blocks: list[list[int]] = []
    places: list[Tensor] = []
    starts, first = layout.text_starts, 0
    for rounded, similar in groupby(layout.lengths, key=rounded_length):
        lengths = list(similar)
        length = rounded if is_rounded else max(lengths)
        most = max(1, SCORES // (heads * length * length))
        while lengths:
            count = 1 << (min(most, len(lengths)).bit_length() - 1)
            block, lengths = lengths[:count], lengths[count:]
            start, first = starts[first], first + count
            is_padded = min(block) < length
            blocks.append([start, start + sum(block), count, length, len(places) if is_padded else -1])
            if is_padded:
                places += _padded_places(start, block, length, heads)
    return blocks, places


def causal_blocks(layout: "PackedLayout", heads: int) -> tuple[list[list[int]], list[Tensor]]:
    """Cuts a row of a causal model into blocks of texts of similar lengths; those that share tokens have these in a
    block of their own, the first.

    Returns:
        As `attention_blocks`, with rounded lengths; and of each block the number of tokens that its texts share.
    """
    shared = 0 if layout.prefix is None else layout.prefix.length
    rest = PackedLayout(layout.lengths[1:], torch.device("cpu")) if shared else layout
    blocks, places = attention_blocks(rest, heads, is_rounded=True)
    moved = [[start + shared, end + shared, *block, shared] for start, end, *block in blocks]
    if not shared:
        return moved, places
    return [[0, shared, 1, shared, -1, 0], *moved], [
        place + shared if index % 3 == 0 else place for index, place in enumerate(places)
    ]


def _padded_places(start: int, lengths: list[int], length: int, heads: int) -> list[Tensor]:
    """Returns the tensors of a padded block: see `attention_blocks`."""
    sizes = np.array(lengths, dtype=np.int64)[:, None]
    starts, place = start + sizes.cumsum(0) - sizes, np.arange(length)
    is_token = place < sizes
    spread = np.where(is_token, starts + place, starts)
    real = np.repeat(is_token.astype(np.float32), heads, axis=0)[:, None]
    return [torch.from_numpy(each) for each in (spread.ravel(), np.flatnonzero(is_token), real)]


class WindowMasks:
    """Keeps the masks of windowed attention, each made when it is first needed.

    One encoder owns them: they are the same for every layer and batch, and are freed with the model.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """The bytes of all masks so far."""
        return sum(mask.nbytes for mask in self._masks.values())

    def get(self, make: "partial[Tensor]") -> Tensor:
        """Returns what `make` returns; calls that have the same arguments share one mask."""
        mask = self._masks.get(make.args)  # two threads may both make one: they are equal
        if mask is None:
            mask = self._masks[make.args] = make()
        return mask


class PackedLayout:
    """The places of texts in a packed row.

    Args:
        lengths: tokens of each text, sorted (either way), so that equal lengths are neighbours.
        device: of the tensors.
        masks: the encoder's; None keeps them no longer than this layout.

    Attributes:
        starts, ends: int64 `[n]`, the index of each text's first token and the one after its last.
        segments: int64 `[T]`, the index of the text that each token belongs to.
        positions: int64 `[T]`, the position of each token inside its text, from 0.
        prefix: the tokens in front of the texts that all of them share; None for none.
        in_blocks: whether attention runs in blocks wherever it can, as it does for long texts.
        is_forced: whether it does, and texts share tokens, wherever that can be, worthwhile or not.
        variant: the kernels that must run the row; None for the fastest.
        padding_share: the largest share of padding in a padded batch of these texts.
        needs_all: whether the hidden states of all tokens are needed, also where the vector is that of one token.
        texts: the ids of each text, where heads read them.
    """

    prefix: LengthGroup | None = None
    in_blocks = False
    is_forced = False
    variant: KernelVariant | None = None
    padding_share = PADDING_SHARE
    needs_all = False
    texts: Sequence[NDArray[np.int64]] = ()

    def __init__(self, lengths: list[int], device: torch.device, masks: WindowMasks | None = None) -> None:
        self.masks = masks or WindowMasks()
        self._moved: dict[torch.device, PackedLayout] = {}
        self._causal_blocks: dict[int, tuple[list[list[int]], list[Tensor]]] = {}
        self.lengths = lengths
        self.num_tokens = sum(lengths)
        self.longest = max(lengths)
        is_kept = len(lengths) == 1 and self.num_tokens <= _KEPT_TOKENS and device.type == "cpu"
        places = _kept_places(self.num_tokens) if is_kept else _places(lengths, device)
        self.starts, self.ends, self.segments, self.positions = places

    def run_like(self, other: "PackedLayout") -> None:
        """Takes over how another row runs."""
        self.needs_all, self.padding_share = other.needs_all, other.padding_share
        self.variant, self.is_forced = other.variant, other.is_forced

    def on(self, device: torch.device) -> "PackedLayout":
        """Returns the same layout with its tensors on another device, for layers that are there."""
        if self.starts.device == device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            moved = copy(self)
            moved._moved, moved.masks = {}, WindowMasks()
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(moved, name, value.to(device, non_blocking=True))
            self._moved[device] = moved
        return moved

    @cached_property
    def longest_whole(self) -> int:
        """The most tokens of a text, with those that all texts share."""
        return self.longest if self.prefix is None else self.prefix.length + max(self.lengths[1:])

    def causal_blocks(self, heads: int) -> tuple[list[list[int]], list[Tensor]]:
        """Returns `causal_blocks` of this layout, made once for so many heads."""
        if heads not in self._causal_blocks:
            self._causal_blocks[heads] = causal_blocks(self, heads)
        return self._causal_blocks[heads]

    @cached_property
    def text_starts(self) -> list[int]:
        """The index of each text's first token, on the host."""
        return [0, *accumulate(self.lengths)][:-1]

    @cached_property
    def ids(self) -> Tensor:
        """The ids of all tokens, int64 `[T]`, as `texts` has them."""
        ids = self.texts[0] if len(self.texts) == 1 else np.concatenate(self.texts)
        return to_device(ids, self.starts.device)

    @cached_property
    def num_visible(self) -> Sequence[int] | None:
        """The first tokens of each text that attention reads; None where it reads all (`token_ids.UNSEEN`)."""
        for ids in self.texts:  # a loop: a generator is a call for each text
            if len(ids) and ids[-1] >= UNSEEN:
                return [num_seen(ids) for ids in self.texts]
        return None

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """The groups of texts of one length, which lie side by side."""
        groups, start = [], 0
        for length, run in groupby(self.lengths):
            group = LengthGroup(start, sum(1 for _ in run), length)
            groups.append(group)
            start = group.end
        return tuple(groups)

    @cached_property
    def padded_places(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """The indices that turn a row into a padded batch and back.

        For each place of the batch, int64 `[n, L]`, the index of its token in the row (padding repeats the first token
        of the text); for each text, int32 `[n]`, its number of tokens; and for each token, int64 `[T]`, the index of
        its place in the flattened batch.
        """
        sizes = np.array(self.lengths, dtype=np.int64)
        place = np.arange(self.longest)
        if len(sizes) == 1:
            return place[None], sizes.astype(np.int32), place
        starts = (sizes.cumsum() - sizes)[:, None]
        is_token = place < sizes[:, None]
        return np.where(is_token, starts + place, starts), sizes.astype(np.int32), np.flatnonzero(is_token)

    @cached_property
    def offsets(self) -> Tensor:
        """Flash attention's `cu_seq_lens`, int32 `[n + 1]`."""
        return torch.cat([self.starts[:1], self.ends]).to(torch.int32)


def _places(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `starts`, `ends`, `segments` and `positions` of `PackedLayout`."""
    sizes = np.array(lengths, dtype=np.int64)
    ends = sizes.cumsum()
    starts = ends - sizes
    segments = np.repeat(np.arange(len(lengths)), sizes)
    positions = np.arange(len(segments)) - starts[segments]
    whole = to_device(np.concatenate([starts, ends, segments, positions]), device)  # one copy, not four
    texts, tokens = len(lengths), len(segments)
    return whole[:texts], whole[texts : 2 * texts], whole[2 * texts : -tokens], whole[-tokens:]


@lru_cache(maxsize=_KEPT_TOKENS)
def _kept_places(num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the places of one text on the CPU. All layouts of its length share them: nothing may write to them."""
    return _places([num_tokens], torch.device("cpu"))


def _no_pause() -> None:
    """Does nothing."""


class PackedState(threading.local):
    """The layout of the row that this thread runs now, for code that transformers calls without passing it.

    Args:
        pause: called by fused layers between two products; it may run other rows, on the same thread.

    Attributes:
        layout: None outside of a packed row.
        is_fused: whether the row runs through fused layers.
        variant: the kernels that it must use; None for the fastest.
        kept: the tokens of each text that the last layer gives.
    """

    layout: PackedLayout | None = None
    is_fused: bool = False
    variant: KernelVariant | None = None
    kept: TokenChoice = "all"

    def __init__(self, pause: Callable[[], None] = _no_pause) -> None:
        self.pause = pause

    @contextmanager
    def running(
        self,
        layout: PackedLayout,
        *,
        is_fused: bool,
        variant: KernelVariant | None = None,
        kept: TokenChoice = "all",
    ) -> Iterator[None]:
        """Sets the state of a row inside the block, and restores that of a preempted pass afterwards.

        Args:
            is_fused: whether the row runs through the layers of `engines/layers/fused.py` or `decoder.py`.
            variant: the kernels that it must use; None for the fastest.
            kept: the tokens that a fused last layer gives: all `[T, H]`, or one of each text `[n, H]`.
        """
        before = self.layout, self.is_fused, self.variant, self.kept
        self.layout, self.is_fused, self.variant, self.kept = layout, is_fused, variant, kept
        try:
            yield
        finally:
            self.layout, self.is_fused, self.variant, self.kept = before


def to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copies an array to a tensor on the device; to a GPU through pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def copy_to(tensor: Tensor, array: NDArray[np.int64]) -> None:
    """Overwrites a tensor of the same shape, without waiting for the copy."""
    source = torch.from_numpy(array)
    tensor.copy_(source if tensor.device.type == "cpu" else source.pin_memory(), non_blocking=True)


def padded(texts: Sequence[NDArray[np.int64]], filler: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the ids `[n, L]` of a padded batch, and its mask: 1 where a token belongs to a text."""
    shape = len(texts), max(len(ids) for ids in texts)
    ids, mask = np.full(shape, filler, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def bucket_by_length(lengths: Sequence[int], padding_share: float = PADDING_SHARE) -> Iterator[tuple[int, int]]:
    """Cuts sorted lengths into runs (start, end) whose share of padding is at most `padding_share`."""
    start, real = 0, 0
    for end, length in enumerate(lengths):
        real += length
        longest = max(lengths[start], length)
        if real < (1 - padding_share) * longest * (end + 1 - start):
            yield start, end
            start, real = end, length
    if lengths:
        yield start, len(lengths)
