"""Carries out the trials of `engines/batching/autotune.py` on a lane, one a turn, while nobody waits for the model."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import structlog
from msgspec import Struct

from engines.inputs.tokenizer import Ids, Tokenizer
from engines.models.base import Encoder
from engines.storage import JsonStore

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


class TunedBatchSize(Struct, frozen=True):
    """What was found: tokens a batch, and tokens a second at that size on one thread of the lane."""

    batch_tokens: int
    tokens_per_s: float


class BatchSizeSearch:
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

    def pace(self) -> TunedBatchSize | None:
        """What the trials say; None without any."""
        if not self._best_s:
            return None
        speeds = {tokens: tokens / max(seconds, 1e-9) for tokens, seconds in self._best_s.items()}
        best = max(speeds.values())
        tokens = min(size for size, speed in speeds.items() if speed >= _NEAR_BEST * best)
        longest = int(LONGEST_WAIT_S * self._num_parts * speeds[tokens])
        return TunedBatchSize(max(_FEWEST_TOKENS, min(tokens, longest)), speeds[tokens])

    def _expected_s(self, tokens: int) -> float:
        return max((tokens / size * seconds for size, seconds in self._best_s.items()), default=0.0)


def trial_texts(tokens: int, vocab_size: int, max_tokens: int) -> list[Ids]:
    """Texts of equal length that make up a batch of `tokens`, of ids that every vocabulary has."""
    length = min(_TEXT_TOKENS, max_tokens)
    chance = np.random.default_rng(tokens)
    return [chance.integers(0, vocab_size, length) for _ in range(max(1, tokens // length))]


class TuningStore:
    """What was found for each model, kept between starts. Threads may share it.

    Args:
        folder: where; None keeps it as long as the process lives.
    """

    def __init__(self, folder: Path | None) -> None:
        self._kept: JsonStore[TunedBatchSize] = JsonStore(
            folder / "paces.json" if folder else None, dict[str, TunedBatchSize]
        )
        self._lock = threading.Lock()

    def get(self, key: str) -> TunedBatchSize | None:
        """What is known."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, pace: TunedBatchSize) -> None:
        """Remember; blocks on the disk."""
        with self._lock:
            self._kept.put(key, pace)


log = structlog.get_logger(__name__)


class BatchSizeTuner:
    """Finds out how large the batches of one model should be.

    Args:
        encoder: the model.
        tokenizer: what the model reads.
        trials: which sizes to try.
        own_s: seconds that the present turn has run, without what it gave to others.
        finish: waits until the device has done what it was told to.
        keep: called once, with what was found.

    Attributes:
        is_done: whether nothing is left to be tried.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        trials: BatchSizeSearch,
        *,
        own_s: Callable[[], float],
        finish: Callable[[], None],
        keep: Callable[[TunedBatchSize], None],
    ) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._trials = trials
        self._own_s = own_s
        self._finish = finish
        self._keep = keep
        self._is_running = False
        self.is_done = False

    @property
    def is_due(self) -> bool:
        """Whether there is something to try, and nobody is trying."""
        return not self._is_running and not self.is_done

    def begin(self) -> None:
        """The next trial is about to run: one at a time."""
        self._is_running = True

    def run(self, use: Callable[[TunedBatchSize], None]) -> None:
        """One trial, on the lane; the last one has its result used. What goes wrong is no caller's business, and ends
        the trials."""
        tokens = self._trials.next_tokens
        try:
            if tokens is not None:
                self._trials.record(tokens, self._time(tokens))
        except Exception as error:  # noqa: BLE001  # out of memory, or a path that fails: real texts will tell
            log.info("model.trial_failed", tokens=tokens, reason=type(error).__name__)
            self._trials.give_up()
        if self._trials.next_tokens is None:
            self._end(use)
        self._is_running = False

    def _time(self, tokens: int) -> float:
        texts = trial_texts(tokens, self._tokenizer.limits.vocab_size, self._tokenizer.max_tokens)
        begun_s = self._own_s()
        self._encoder(texts)
        self._finish()
        return self._own_s() - begun_s

    def _end(self, use: Callable[[TunedBatchSize], None]) -> None:
        self.is_done = True
        pace = self._trials.pace()
        if pace is not None:
            log.info("model.pace", batch_tokens=pace.batch_tokens, tokens_per_s=round(pace.tokens_per_s))
            use(pace)
            self._keep(pace)
