"""How large batches should be: tried out once for each model and kind of device, in idle time, and remembered.

Two things bound a batch. It should be large enough that the model runs at its best; and the time for which it keeps a
small request waiting should be short: on a CPU that is one layer (between layers a batch gives way), on a GPU the
whole batch.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from engines.kept import Kept
from engines.tokenize import Ids

LONGEST_WAIT_S = 0.05
"""For so long, at the most, a batch should hold up whoever comes."""

CANDIDATES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192, 16384)}
"""Tokens of a batch, by kind of device."""

_ROUNDS = 2
_NEAR_BEST = 0.97
"""A smaller batch that reaches this part of the best speed is preferred."""

_LONGEST_TRIAL_S = 2.0
_TEXT_TOKENS = 64
_FEWEST_TOKENS = 128
"""Below, even large models lose speed, and a longer wait is the lesser evil."""


class Pace(Struct, frozen=True):
    """What was found: tokens a batch, and tokens a second at that size on one thread of the lane."""

    batch_tokens: int
    tokens_per_s: float


class Trials:
    """Which sizes to try next, and what follows from the seconds that they took. Knows no model.

    Args:
        candidates: tokens of a batch, the smallest first.
        num_parts: into how many parts, in equal measure, a batch gives way to others.
    """

    def __init__(self, candidates: Sequence[int], num_parts: int) -> None:
        self._left = [tokens for _ in range(_ROUNDS) for tokens in candidates]
        self._num_parts = max(1, num_parts)
        self._best_s: dict[int, float] = {}

    @property
    def next_tokens(self) -> int | None:
        """The size to be tried now; None when enough is known. Sizes that would take too long are passed over."""
        while self._left and self._expected_s(self._left[0]) > _LONGEST_TRIAL_S:
            self._left.pop(0)
        return self._left[0] if self._left else None

    def record(self, tokens: int, seconds: float) -> None:
        """A trial of the size that was next; the first of a size warms up memory, and the better one counts."""
        self._left.remove(tokens)
        self._best_s[tokens] = min(seconds, self._best_s.get(tokens, seconds))

    def give_up(self) -> None:
        """No more trials: the device has no room for this size, or something is wrong with it."""
        self._left.clear()

    def pace(self) -> Pace | None:
        """What the trials say; None without any."""
        if not self._best_s:
            return None
        speeds = {tokens: tokens / max(seconds, 1e-9) for tokens, seconds in self._best_s.items()}
        best = max(speeds.values())
        tokens = min(size for size, speed in speeds.items() if speed >= _NEAR_BEST * best)
        longest = int(LONGEST_WAIT_S * self._num_parts * speeds[tokens])
        return Pace(max(_FEWEST_TOKENS, min(tokens, longest)), speeds[tokens])

    def _expected_s(self, tokens: int) -> float:
        return max((tokens / size * seconds for size, seconds in self._best_s.items()), default=0.0)


def trial_texts(tokens: int, vocab_size: int, max_tokens: int) -> list[Ids]:
    """Texts of equal length that make up a batch of `tokens`, of ids that every vocabulary has."""
    length = min(_TEXT_TOKENS, max_tokens)
    chance = np.random.default_rng(tokens)
    return [chance.integers(0, vocab_size, length) for _ in range(max(1, tokens // length))]


class Paces:
    """What was found for each model, kept between starts. Threads may share it.

    Args:
        folder: where; None keeps it as long as the process lives.
    """

    def __init__(self, folder: Path | None) -> None:
        self._kept: Kept[Pace] = Kept(folder / "paces.json" if folder else None, dict[str, Pace])
        self._lock = threading.Lock()

    def get(self, key: str) -> Pace | None:
        """What is known."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, pace: Pace) -> None:
        """Remember; blocks on the disk."""
        with self._lock:
            self._kept.put(key, pace)
