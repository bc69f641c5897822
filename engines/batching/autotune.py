"""Finds out how large the batches of a model should be, by trials that run while no request waits for the model."""

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
"""A batch should delay requests that arrive meanwhile by no more than this."""

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
    """The result: tokens a batch, and tokens a second at that size on one thread of the scheduler."""

    batch_tokens: int
    tokens_per_s: float


class BatchSizeSearch:
    """Decides which sizes to try next, and which is best by the seconds that they took. Knows no model.

    Args:
        candidates: tokens of a batch, the smallest first.
        num_parts: of about equal length, between which a batch can be preempted.
    """

    def __init__(self, candidates: Sequence[int], num_parts: int) -> None:
        self._left = [tokens for _ in range(_ROUNDS) for tokens in candidates]
        self._num_parts = max(1, num_parts)
        self._best_s: dict[int, float] = {}

    @property
    def next_tokens(self) -> int | None:
        """Returns the size to be tried next; None when enough is known. Skips sizes that would take too long."""
        while self._left and self._expected_s(self._left[0]) > _LONGEST_TRIAL_S:
            self._left.pop(0)
        return self._left[0] if self._left else None

    def record(self, tokens: int, seconds: float) -> None:
        """Records a trial of the size that was next. The first of a size warms up memory, so the faster one counts."""
        self._left.remove(tokens)
        self._best_s[tokens] = min(seconds, self._best_s.get(tokens, seconds))

    def give_up(self) -> None:
        """Ends the trials: the device has no memory for this size, or it fails."""
        self._left.clear()

    def result(self) -> TunedBatchSize | None:
        """Returns the best size by the trials; None without any."""
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
    """Returns texts of equal length that make up a batch of `tokens`, of ids that the vocabulary has."""
    length = min(_TEXT_TOKENS, max_tokens)
    random = np.random.default_rng(tokens)
    return [random.integers(0, vocab_size, length) for _ in range(max(1, tokens // length))]


class TuningStore:
    """Keeps what was found for each model between starts. Thread-safe.

    Args:
        folder: where; None keeps it in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._kept: JsonStore[TunedBatchSize] = JsonStore(
            folder / "paces.json" if folder else None, dict[str, TunedBatchSize]
        )
        self._lock = threading.Lock()

    def get(self, key: str) -> TunedBatchSize | None:
        """Returns what was found; None when nothing was."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, tuned: TunedBatchSize) -> None:
        """Keeps what was found; blocks on the disk."""
        with self._lock:
            self._kept.put(key, tuned)


log = structlog.get_logger(__name__)


class BatchSizeTuner:
    """Runs the trials of one model on its scheduler, one a task.

    Args:
        encoder: the model.
        tokenizer: what the model reads.
        trials: which sizes to try.
        own_s: seconds that the present task has run, without the tasks that preempted it.
        finish: waits until the device has finished its work.
        keep: called once, with the result.

    Attributes:
        is_done: whether no trial is left.
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
        """Tells whether a trial is left and none runs."""
        return not self._is_running and not self.is_done

    def begin(self) -> None:
        """Marks the next trial as running; one runs at a time."""
        self._is_running = True

    def run(self, use: Callable[[TunedBatchSize], None]) -> None:
        """Runs one trial, on a thread of the scheduler; after the last, calls `use` with the result. An error ends the
        trials and fails no request."""
        tokens = self._trials.next_tokens
        try:
            if tokens is not None:
                self._trials.record(tokens, self._time(tokens))
        except Exception as error:  # noqa: BLE001  # no memory, a failed path or device: real texts will show
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
        tuned = self._trials.result()
        if tuned is not None:
            log.info("model.pace", batch_tokens=tuned.batch_tokens, tokens_per_s=round(tuned.tokens_per_s))
            use(tuned)
            self._keep(tuned)
