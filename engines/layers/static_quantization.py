"""Rounds activations to 8 bits by one step for all tokens, which is fixed when a model loads (static quantization).

With a step of each token's own, the rows of a product are scaled afterwards, in passes over all outputs, and before an
activation, which the product could else apply itself. Inputs behind a norm have nearly the same range in all tokens,
but for some channels that are up to ten times as wide as the rest (in MiniLM one token of a text has 28 in channel 99).
Those are split over several columns with the same weights (outlier channel splitting, Zhao et al. 2019,
arXiv:1901.09504), here each with a part of the range: the step is that of the narrow channels. In a model of the
arithmetic in float32 (MiniLM, 116 texts) the worst cosine is 0.9980 and the median 0.9991; with steps of tokens 0.9975
and 0.9989, and with one step and no channel split 0.9941 and 0.9970.

Ranges come from calibration texts. No result depends on how good they are: a token that is out of range has a step of
its own. So its result depends on no other token.
"""

import math

import torch
from torch import Tensor

MARGIN = 1.28
"""Ranges are this many times as wide as what the calibration texts fill."""

EXTRA_COLUMNS = 32
"""Columns of split channels. With 16 the steps of MiniLM are 3 to 13 % larger, and products 3 % faster."""

_MULTIPLE = 32
"""Columns that torch's operator rounds at once; behind the last multiple it does not cut what is out of range."""

_LARGEST_LEVEL = 255

_EXACT_ROWS = 8

_LEAST_WIDTH = 1e-4
"""The least range of the widest channel: torch's operator adds 1e-8 to the width of a column, which is a sixteenth of
that, or more. Inputs are constant where the weights of a norm are zeros."""


_MOST_TO_MEDIAN = 4.0
"""The widest columns, in half widths of the median channel. With one channel 100 times as wide as the rest, of 384,
they are 6 of them, and a token with little in that channel has a cosine of 0.998 where a step of its own gives 0.9997;
with one 1,000 times as wide 0.857 and 0.9995. In MiniLM they are 1.2 to 2.8."""


class StaticQuantizer:
    """Rounds inputs `[T, K]` to levels of columns: one of each channel, then those of split channels.

    Args:
        lowest, highest: of each channel over the calibration texts, float32 `[K]`.

    Attributes:
        step: between two levels.
        half: a column has levels from `-half` to `half`.
        suits_most: whether the step is small enough for most channels; else steps of tokens are better.
        num_columns: of the levels.
    """

    def __init__(self, lowest: Tensor, highest: Tensor) -> None:
        self._centre = (lowest + highest) / 2
        needed = ((highest - lowest) / 2 * MARGIN).clamp_(min=torch.finfo(torch.float32).tiny)
        self.half = _half_width(needed)
        self.suits_most = self.half <= _MOST_TO_MEDIAN * float(needed.median())
        parts = _num_parts(needed, self.half)
        self.step = 2 * self.half / _LARGEST_LEVEL
        self.num_columns = len(needed) + EXTRA_COLUMNS
        # A split channel's own column only shows whether it is in range: it is narrowed, and has no weights.
        self._factor = parts.reciprocal()
        self._shift = -self._centre * self._factor
        self._is_whole = parts == 1
        split = torch.nonzero(parts > 1)[:, 0]
        channels = split.repeat_interleave(parts[split].long())
        ranks = torch.cat([torch.arange(int(count)) for count in parts[split]]) if len(split) else channels
        offsets = -self._centre[channels] - (2 * ranks - (parts[channels] - 1)) * self.half
        unused = self.num_columns - len(needed) - len(channels)
        self._channels = torch.cat([channels, channels.new_zeros(unused)])
        self._offsets = torch.cat([offsets, offsets.new_zeros(unused)])
        self._share = torch.cat([1 / parts[channels], offsets.new_zeros(unused)])
        self._num_split = len(channels)
        self._bounds = torch.tensor([[-self.half, self.half]])

    def exact_inputs(self) -> Tensor:
        """Returns inputs `[8, K]` that lie on levels, within the range of one column."""
        shape = (_EXACT_ROWS, len(self._centre))
        levels = torch.randint(1, _LARGEST_LEVEL, shape, generator=torch.Generator().manual_seed(1))
        halves = torch.where(
            self._factor.reciprocal().round() % 2 == 0, 0.5, 0.0
        )  # columns of an even number meet there
        return self._centre + (levels - _LARGEST_LEVEL / 2 + halves) * self.step

    def widen(self, weight: Tensor) -> Tensor:
        """Returns weights `[out, columns]` of the columns, from `[out, K]`."""
        wide = weight.new_zeros(len(weight), self.num_columns)
        num_channels = weight.shape[1]
        wide[:, :num_channels] = weight * self._is_whole
        used = self._channels[: self._num_split]
        wide[:, num_channels : num_channels + self._num_split] = weight[:, used]
        return wide

    @property
    def centre(self) -> Tensor:
        """What is subtracted of the inputs, `[K]`."""
        return self._centre

    @property
    def tensors(self) -> list[Tensor]:
        """What `engines/layers/int8_script.py` takes: factor, shift, channels, offsets, bounds, centre and shares.

        Levels are uint8 `[T, columns + 8]`, of which the last eight mean nothing. Where a row is out of range, its
        columns get equal parts of a split channel, with a step of their own.
        """
        return [
            self._factor, self._shift, self._channels, self._offsets, self._bounds, self._centre, self._share,
        ]  # fmt: skip


def is_supported(lowest: Tensor, highest: Tensor) -> bool:
    """Whether inputs `[T, K]` can be rounded so: these are of each channel over the calibration texts."""
    widest = float((highest - lowest).max())
    return len(lowest) % _MULTIPLE == 0 and math.isfinite(widest) and widest >= _LEAST_WIDTH


def _num_parts(needed: Tensor, half: float) -> Tensor:
    """Returns the columns of each channel; with more than `EXTRA_COLUMNS` they are one too many, not infinite."""
    return (needed / half).mul_(1 - 1e-6).ceil_().clamp_(min=1, max=EXTRA_COLUMNS + 1)


def _half_width(needed: Tensor) -> float:
    """Returns the least half width of columns with which split channels need no more than `EXTRA_COLUMNS`."""
    candidates = torch.cat([needed / count for count in range(1, EXTRA_COLUMNS + 1)]).sort().values
    first, last = 0, len(candidates) - 1  # the largest splits none
    while first < last:
        middle = (first + last) // 2
        parts = _num_parts(needed, float(candidates[middle]))
        fits = int(parts[parts > 1].sum()) <= EXTRA_COLUMNS
        first, last = (first, middle) if fits else (middle + 1, last)
    return float(candidates[first])
