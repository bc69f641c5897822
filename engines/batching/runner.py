"""Runs one batch on a thread of the lane: texts in, their jobs' rows filled. Knows no queue and no event loop."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import structlog
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from engines.batching.batch import BatchLimits
from engines.batching.request import Entry, Key
from engines.errors import EngineError, EngineFailed, NonFiniteEmbedding, OutOfMemory, is_out_of_memory
from engines.layers.packing import bucket_by_length
from engines.layers.pooling import truncate_and_normalize
from engines.models.base import Encoder, ForwardPathFailed
from engines.protocols import Clock
from engines.types import Batch, ModelInfo

log = structlog.get_logger(__name__)

Failures = dict[int, EngineError]
"""Errors by `id(job)`: a job that is not here got its rows."""


_FIRST_WAIT_S, _LONGEST_WAIT_S = 30.0, 1800.0
"""A limit that an out-of-memory has set is doubled after the first wait; one that it sets again soon lasts longer."""


class Room:
    """The largest batch that a device is known to hold: halved when its memory does not suffice, grown back with time.

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
        """So many tokens, or fewer where the device does not hold them now."""
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
        """A batch of so many tokens did not fit; returns the new limit."""
        now_s = self._clock()
        is_soon = now_s - self._grown_at_s < self._wait_s  # it has just been tried whether there is more room again
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S) if is_soon else _FIRST_WAIT_S
        self._changed_at_s, self._grown_at_s = now_s, -_LONGEST_WAIT_S
        self._max_tokens = max(1, tokens // 2)
        return self._max_tokens


class Runner:
    """The encoder of one engine, and what was learnt about the room on its device.

    Args:
        encoder: what runs.
        close: called with texts whose vectors are there, before they are handed to those who want them.
        keep: called with the vectors of finite texts, `[n, D]` float32, as the encoder gives them; None keeps nothing.
        clock: seconds.
    """

    def __init__(
        self,
        encoder: Encoder,
        close: Callable[[Sequence[Entry]], None] = lambda texts: None,
        keep: Callable[[Sequence[Key], NDArray[np.float32]], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._encoder = encoder
        self._close = close
        self._keep = keep
        self._room = Room(clock)

    @property
    def is_reentrant(self) -> bool:
        """Whether several threads may run batches at once."""
        return self._encoder.is_reentrant

    def bound(self, limit: BatchLimits) -> BatchLimits:
        """The same limit as far as this encoder and its device go."""
        return BatchLimits(self._room.within(limit.max_tokens), limit.max_items, self._encoder.part_tokens)

    def described(self, info: ModelInfo) -> ModelInfo:
        """What the model is, with the path that it takes now."""
        path, fallback = self._encoder.path, self._encoder.fallback
        if path == info.path and not fallback:
            return info
        notes = (*info.notes, fallback) if fallback else info.notes
        attention = self._encoder.attention
        return structs.replace(info, attention=attention, path=path, is_fallback=bool(fallback), notes=notes)

    def measure(self, texts: Sequence[Entry]) -> Batch:
        """What a batch, sorted by length, takes on this encoder."""
        lengths = [len(text.ids) for text in texts]
        tokens = computed = sum(lengths)
        if self._encoder.attention == "padded":
            computed = sum((end - start) * max(lengths[start:end]) for start, end in bucket_by_length(lengths))
        return Batch(texts=len(lengths), tokens=tokens, computed_tokens=computed)

    def run(self, texts: Sequence[Entry]) -> Failures:
        """Write the rows of a batch. A failed batch fails its own callers, and only them.

        Raises:
            ForwardPathFailed: run the texts again; nobody has been told anything.
        """
        try:
            return self._run(texts)
        except ForwardPathFailed:
            raise
        except EngineError as error:
            return self._fail(texts, error)
        except Exception as error:
            # Not as its cause: the error holds the frames of the pass, thus its tensors, until the caller is answered.
            log.exception("engine.forward_failed", texts=len(texts))
            message = f"the model's forward pass failed ({type(error).__name__}); the server's log says more"
        return self._fail(texts, EngineFailed(message))

    def _run(self, texts: Sequence[Entry]) -> Failures:
        vectors = self._forward_if_room(texts)
        if vectors is None:
            return self._run_halves(texts)
        self._close(texts)
        if self._keep is not None:
            rows = vectors.cpu().numpy()
            good = np.isfinite(rows).all(axis=-1)
            self._keep([text.key for text, is_good in zip(texts, good, strict=True) if is_good], rows[good])
        return _write(texts, vectors)

    def _fail(self, texts: Sequence[Entry], error: EngineError) -> Failures:
        self._close(texts)
        return {id(want.job): error for text in texts for want in text.targets}

    def _run_halves(self, texts: Sequence[Entry]) -> Failures:
        """The device has no room for this batch: run it in two, and let smaller ones be cut for a while."""
        tokens = sum(len(text.ids) for text in texts)
        if len(texts) == 1:
            raise OutOfMemory(f"the device has no memory to run one text of {tokens} tokens; try again later")
        log.warning("engine.batch_halved", tokens=tokens, max_batch_tokens=self._room.halve(tokens))
        half = len(texts) // 2
        return {**self.run(texts[:half]), **self.run(texts[half:])}

    def _forward_if_room(self, texts: Sequence[Entry]) -> Tensor | None:
        """The vectors, or None where memory did not suffice. It returns before anything else is tried: as long as the
        error is handled, its traceback holds the frames of the pass, and they the tensors that fill the memory."""
        try:
            return self._forward(texts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("engine.no_room", texts=len(texts), reason=type(error).__name__)
            return None

    def _forward(self, texts: Sequence[Entry]) -> Tensor:
        prompts = [text.prompt_tokens for text in texts]
        return self._encoder([text.ids for text in texts], prompts if any(prompts) else None)


def _write(texts: Sequence[Entry], vectors: Tensor) -> Failures:
    """Finish the vectors `[n, D]` as each job wants them, and put them into the jobs' rows."""
    bad: Failures = {}
    wants = [(row, want) for row, text in enumerate(texts) for want in text.targets]
    for output in {want.job.output for _, want in wants}:
        chosen = [(row, want) for row, want in wants if want.job.output == output]
        rows = [row for row, _ in chosen]
        finished = truncate_and_normalize(
            vectors if rows == list(range(len(texts))) else vectors[rows],
            dimensions=output.dimensions,
            normalized=output.normalized,
            pre_norm=output.pre_norm,
        )
        host = finished.cpu().numpy()  # the one moment at which a GPU is waited for
        is_finite = np.isfinite(host).all(axis=-1)
        for (_, want), vector, good in zip(chosen, host, is_finite, strict=True):
            want.job.rows[want.index] = vector
            if not good:
                bad[id(want.job)] = _not_finite(want.index)
    return bad


def _not_finite(index: int) -> NonFiniteEmbedding:
    return NonFiniteEmbedding(
        f"the vector of input[{index}] is not finite: the model's dtype overflows on this text. Serve the model with "
        "`dtype: float32` or `bfloat16`",
        index=index,
    )
