"""Lets texts that begin with the same tokens, as queries behind one instruction do, share these tokens in a row.

In a causal model a token depends on itself and those before it only: the first tokens of such texts have the same
hidden states, keys and values in every layer. They run once, in front of the rest of each text, which attends to them.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from engines.layers.packing import LengthGroup, PackedLayout, to_device

_FEWEST_SHARED = 4
"""Tokens that are worth sharing."""


_LEAST_SAVED = 1 / 8
"""The share of a batch's tokens that must be saved: the attention of shared tokens is a little slower."""


class SharedPrefixLayout(PackedLayout):
    """The places of texts in a packed row that begins with `num_shared` tokens of all of them.

    Args:
        lengths: tokens of each whole text, sorted; each is longer than what is shared.

    Attributes:
        lengths, starts, ends, segments: of what follows the shared tokens; these come first and belong to no text.
        positions: int64 `[T]`, the position of each token inside its whole text.
        spread: int64, the indices that turn the row into the packed row of the whole texts.
    """

    def __init__(self, lengths: Sequence[int], num_shared: int, device: torch.device) -> None:
        super().__init__([num_shared, *(length - num_shared for length in lengths)], device)
        self.prefix = LengthGroup(0, 1, num_shared)
        self.positions = self.positions + num_shared * (self.segments > 0)
        self.starts, self.ends = self.starts[1:], self.ends[1:]

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """The groups of texts of one length behind the shared tokens."""
        rest = PackedLayout(self.lengths[1:], torch.device("cpu")).groups
        shared = self.lengths[0]
        return tuple(LengthGroup(group.start + shared, group.count, group.length) for group in rest)

    @cached_property
    def spread(self) -> torch.Tensor:
        """The indices of the tokens of the whole texts, one text behind the other."""
        shared = np.arange(self.lengths[0])
        rest = np.split(np.arange(self.lengths[0], self.num_tokens), np.cumsum(self.lengths[1:-1]))
        indices = np.concatenate([part for text in rest for part in (shared, text)])
        return to_device(indices, self.starts.device)


def num_shared_tokens(texts: Sequence[NDArray[np.int64]], *, is_forced: bool = False) -> int:
    """Returns how many tokens these texts should share; 0 where that saves too little.

    Each text keeps a token of its own: its last one is pooled.

    Args:
        is_forced: share whatever is equal, up to half of the shortest text, so that there is something behind it.
    """
    shortest = min(len(ids) for ids in texts)
    begins = np.stack([ids[: shortest - 1] for ids in texts])
    differs = (begins != begins[0]).any(axis=0)
    shared = int(differs.argmax()) if differs.any() else shortest - 1
    if is_forced:
        return min(shared, shortest // 2)
    is_enough = shared >= _FEWEST_SHARED and shared * (len(texts) - 1) >= _LEAST_SAVED * sum(map(len, texts))
    return shared if is_enough else 0
