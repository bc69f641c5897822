"""Whether a small batch should wait a moment for those who were answered just now: clients come back.

A batch of a dozen tokens takes nearly as long as one of fifty, because both read all weights. Clients who ask again as
soon as they are answered would be split by it for good: half of them run while the others wait, in turn. Whoever waits
when a batch ends therefore lets those whom it has answered come back first; for no longer than a part of what the batch
took, and not where nobody does come back in that time.
"""

_SHARE = 0.35
"""Of the seconds that a batch took, the next may wait so much."""

_ENOUGH_TOKENS = 128
"""A batch of so many loses nothing without company."""

_PASSES = 16
"""So many batches do not wait after one that has waited in vain."""


class Company:
    """Who is expected. Knows no thread and no clock: the caller has both."""

    def __init__(self) -> None:
        self._num_expected = 0
        self._num_back = 0
        self._until_s = 0.0
        self._passes = 0

    def leave(self, num_jobs: int, took_s: float, now_s: float) -> None:
        """A batch has answered so many jobs."""
        if self._passes:
            self._passes -= 1
            return
        self._num_expected, self._num_back, self._until_s = num_jobs, 0, now_s + _SHARE * took_s

    def come(self) -> None:
        """A job is admitted: one of those, as far as anybody knows."""
        self._num_back += 1

    def wait_s(self, num_tokens: int, now_s: float) -> float:
        """Seconds for which `num_tokens` that wait should go on waiting; 0 when they need not."""
        if self._num_back >= self._num_expected or num_tokens >= _ENOUGH_TOKENS:
            return 0.0
        if now_s < self._until_s:
            return self._until_s - now_s
        if not self._num_back:
            self._passes = _PASSES
        self._num_expected = 0
        return 0.0
