"""Runs one batch on a thread of the scheduler and stores the requests' rows. Knows no queue and no event loop."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog
from msgspec import structs

from engines.batching.batch import BatchLimits
from engines.batching.output import Row
from engines.batching.request import Entry, Key
from engines.errors import DeviceDown, EngineError, EngineFailed, OutOfMemory, device_loss, is_out_of_memory
from engines.layers.packing import bucket_by_length
from engines.models.base import Encoder, ForwardPathFailed
from engines.protocols import Clock
from engines.types import Batch, ModelInfo

log = structlog.get_logger(__name__)

Failures = dict[int, EngineError]
"""Errors by `id(request)`: a request that is not here got its rows."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 30.0, 1800.0
"""A limit that an out-of-memory has set is doubled after the first wait; one that is set again soon lasts longer."""


class LearnedLimit:
    """The largest batch that a device is known to hold: halved when memory does not suffice, doubled again with time.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._max_tokens: int | None = None
        self._wait_s = _FIRST_WAIT_S
        self._changed_at_s = -_LONGEST_WAIT_S
        self._grown_at_s = -_LONGEST_WAIT_S

    def within(self, max_tokens: int) -> int:
        """Returns `max_tokens`, or fewer where the device does not hold them now."""
        if self._max_tokens is None:
            return max_tokens
        if self._clock() - self._changed_at_s >= self._wait_s:
            self._changed_at_s = self._grown_at_s = self._clock()
            self._max_tokens *= 2
        if self._max_tokens >= max_tokens:
            self._max_tokens = None
            return max_tokens
        return self._max_tokens

    def halve(self, tokens: int) -> int:
        """Lowers the limit because a batch of `tokens` did not fit; returns the new limit."""
        now_s = self._clock()
        is_soon = now_s - self._grown_at_s < self._wait_s  # the limit has just been raised, which was too early
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S) if is_soon else _FIRST_WAIT_S
        self._changed_at_s, self._grown_at_s = now_s, -_LONGEST_WAIT_S
        self._max_tokens = max(1, tokens // 2)
        return self._max_tokens


class Runner:
    """Runs batches on the encoder of one engine, and remembers how large a batch its device holds.

    Args:
        encoder: what runs.
        close: called with entries whose outputs exist, before these are handed to the requests.
        keep: called with what the cache keeps of entries whose outputs are finite; None keeps nothing.
        clock: seconds.
        report_error: called with what a forward pass raises unexpectedly, on the device's thread.
    """

    def __init__(
        self,
        encoder: Encoder,
        close: Callable[[Sequence[Entry]], None] = lambda texts: None,
        keep: Callable[[Sequence[Key], Iterable[Row]], None] | None = None,
        clock: Clock = time.monotonic,
        *,
        report_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._encoder = encoder
        self._report_error = report_error
        self._close = close
        self._keep = keep
        self._learned = LearnedLimit(clock)

    @property
    def is_reentrant(self) -> bool:
        """Tells whether several threads may run batches at once."""
        return self._encoder.is_reentrant

    def bound(self, limit: BatchLimits) -> BatchLimits:
        """Returns the same limits, as far as this encoder and the memory of its device allow."""
        return BatchLimits(self._learned.within(limit.max_tokens), limit.max_items, self._encoder.part_tokens)

    def described(self, info: ModelInfo) -> ModelInfo:
        """Returns the model's description, with the forward path in use now."""
        path, fallback = self._encoder.path, self._encoder.fallback
        if path == info.path and not fallback:
            return info
        notes = (*info.notes, fallback) if fallback else info.notes
        attention = self._encoder.attention
        return structs.replace(info, attention=attention, path=path, is_fallback=bool(fallback), notes=notes)

    def measure(self, texts: Sequence[Entry]) -> Batch:
        """Returns what a batch, sorted by length, takes on this encoder."""
        lengths = [len(text.ids) for text in texts]
        tokens = computed = sum(lengths)
        if self._encoder.attention == "padded":
            computed = sum((end - start) * max(lengths[start:end]) for start, end in bucket_by_length(lengths))
        return Batch(texts=len(lengths), tokens=tokens, computed_tokens=computed)

    def run(self, texts: Sequence[Entry]) -> Failures:
        """Stores the rows of a batch. A failed batch fails its own requests, and only them.

        Raises:
            ForwardPathFailed: run the texts again; no request has been answered.
        """
        if len(texts) > 1 and len(kinds := {text.kind for text in texts}) > 1:  # each kind has a head of its own
            batches = ([text for text in texts if text.kind is kind] for kind in kinds)
            return {job: error for batch in batches for job, error in self.run(batch).items()}
        try:
            return self._run(texts)
        except ForwardPathFailed:
            raise
        except EngineError as error:
            return self._fail(texts, error)
        except Exception as error:
            # Not as its cause: the error holds the frames of the pass, thus its tensors, until the caller is answered.
            log.exception("engine.forward_failed", texts=len(texts))
            self._report_error(error)
            failure = _failure_of(error)
        return self._fail(texts, failure)

    def _run(self, texts: Sequence[Entry]) -> Failures:
        raw = self._forward_within_memory(texts)
        if raw is None:
            return self._run_halves(texts)
        self._close(texts)
        if self._keep is not None and texts[0].kind.is_cached:
            rows, is_finite = texts[0].kind.cache_rows(raw)
            kept = [index for index, is_good in enumerate(is_finite) if is_good]
            self._keep([texts[index].key for index in kept], [rows[index] for index in kept])
        return _store(texts, raw)

    def _fail(self, texts: Sequence[Entry], error: EngineError) -> Failures:
        self._close(texts)
        return {id(target.job): error for text in texts for target in text.targets}

    def _run_halves(self, texts: Sequence[Entry]) -> Failures:
        """Runs a batch that the device's memory does not hold in two, and has smaller ones formed for a while."""
        tokens = sum(len(text.ids) for text in texts)
        if len(texts) == 1:
            raise OutOfMemory(f"the device has no memory to run one text of {tokens} tokens; try again later")
        log.warning("engine.batch_halved", tokens=tokens, max_batch_tokens=self._learned.halve(tokens))
        half = len(texts) // 2
        return {**self.run(texts[:half]), **self.run(texts[half:])}

    def _forward_within_memory(self, texts: Sequence[Entry]) -> Any | None:
        """Returns the raw outputs, or None where memory did not suffice. It returns before anything else is tried: as
        long as the error is handled, its traceback holds the frames of the pass, and they the tensors that fill the
        memory."""
        try:
            return self._forward(texts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("engine.no_room", texts=len(texts), reason=type(error).__name__)
            return None

    def _forward(self, texts: Sequence[Entry]) -> Any:
        prompts = [text.prompt_tokens for text in texts]
        return texts[0].kind.encode(self._encoder, [text.ids for text in texts], prompts if any(prompts) else None)


def _failure_of(error: Exception) -> EngineError:
    """Returns what callers are told of an unexpected error of a forward pass."""
    loss = device_loss(error)
    if loss:
        return DeviceDown(
            f"the device failed during the forward pass ({loss}); send the request again", retry_after_s=10.0
        )
    return EngineFailed(f"the model's forward pass failed ({type(error).__name__}); the server's log says more")


def _store(texts: Sequence[Entry], raw: Any) -> Failures:
    """Finishes a batch's raw outputs as each request wants them, and stores them in the requests' rows."""
    failures: Failures = {}
    targets = [(index, target) for index, text in enumerate(texts) for target in text.targets]
    outputs = {target.job.output for _, target in targets}
    for output in outputs:
        chosen = targets if len(outputs) == 1 else [each for each in targets if each[1].job.output == output]
        indexes = [index for index, _ in chosen]
        all_of_them = indexes == list(range(len(texts)))
        finished = output.finish_inputs(raw, None if all_of_them else indexes, [target.index for _, target in chosen])
        for (_, target), row, is_finite in zip(chosen, finished.rows, finished.is_finite, strict=True):
            target.job.rows[target.index] = row
            if not is_finite:
                failures[id(target.job)] = output.not_finite(target.index)
    return failures
