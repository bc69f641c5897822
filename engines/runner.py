"""Runs one batch on a thread of the lane: texts in, their jobs' rows filled. Knows no queue and no event loop."""

from collections.abc import Callable, Sequence

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.batch import Key, Limit, Text
from engines.encoder import Encoder, PathLeft
from engines.errors import EngineError, EngineFailed, NonFiniteEmbedding, OutOfMemory
from engines.layout import similar_lengths
from engines.pooling import finish
from engines.records import Batch

log = structlog.get_logger(__name__)

Failures = dict[int, EngineError]
"""Errors by `id(job)`: a job that is not here got its rows."""


class Runner:
    """The encoder of one engine, and what was learnt about the room on its device.

    Args:
        encoder: what runs.
        close: called with texts whose vectors are there, before they are handed to those who want them.
        keep: called with the vectors of finite texts, `[n, D]` float32, as the encoder gives them; None keeps nothing.

    Attributes:
        max_tokens: the largest batch that the device is known to hold, None as long as nothing failed.
    """

    def __init__(
        self,
        encoder: Encoder,
        close: Callable[[Sequence[Text]], None] = lambda texts: None,
        keep: Callable[[Sequence[Key], NDArray[np.float32]], None] | None = None,
    ) -> None:
        self._encoder = encoder
        self._close = close
        self._keep = keep
        self.max_tokens: int | None = None

    @property
    def is_reentrant(self) -> bool:
        """Whether several threads may run batches at once."""
        return self._encoder.is_reentrant

    def bound(self, limit: Limit) -> Limit:
        """The same limit as far as this encoder and its device go."""
        most = limit.max_tokens if self.max_tokens is None else min(limit.max_tokens, self.max_tokens)
        return Limit(most, limit.max_items, self._encoder.part_tokens)

    def measure(self, texts: Sequence[Text]) -> Batch:
        """What a batch, sorted by length, takes on this encoder."""
        lengths = [len(text.ids) for text in texts]
        tokens = computed = sum(lengths)
        if self._encoder.attention == "padded":
            computed = sum((end - start) * max(lengths[start:end]) for start, end in similar_lengths(lengths))
        return Batch(texts=len(lengths), tokens=tokens, computed_tokens=computed)

    def run(self, texts: Sequence[Text]) -> Failures:
        """Write the rows of a batch. A failed batch fails its own callers, and only them.

        Raises:
            PathLeft: run the texts again; nobody has been told anything.
        """
        try:
            return self._run(texts)
        except PathLeft:
            raise
        except EngineError as error:
            return self._fail(texts, error)
        except Exception as error:
            log.exception("engine.forward_failed", texts=len(texts))
            failure = EngineFailed(
                f"the model's forward pass failed ({type(error).__name__}); the server's log says more"
            )
            failure.__cause__ = error
            return self._fail(texts, failure)

    def _run(self, texts: Sequence[Text]) -> Failures:
        try:
            vectors = self._forward(texts)
        except torch.OutOfMemoryError as error:
            return self._run_halves(texts, error)
        self._close(texts)
        if self._keep is not None:
            rows = vectors.cpu().numpy()
            good = np.isfinite(rows).all(axis=-1)
            self._keep([text.key for text, is_good in zip(texts, good, strict=True) if is_good], rows[good])
        return _write(texts, vectors)

    def _fail(self, texts: Sequence[Text], error: EngineError) -> Failures:
        self._close(texts)
        return {id(want.job): error for text in texts for want in text.wants}

    def _run_halves(self, texts: Sequence[Text], cause: Exception) -> Failures:
        """The device has no room for this batch: run it in two, and let smaller ones be cut from now on."""
        tokens = sum(len(text.ids) for text in texts)
        if len(texts) == 1:
            raise OutOfMemory(
                f"the device has no memory to run one text of {tokens} tokens; try again later"
            ) from cause
        self.max_tokens = max(1, tokens // 2)
        log.warning("engine.batch_halved", tokens=tokens, max_batch_tokens=self.max_tokens)
        half = len(texts) // 2
        return {**self.run(texts[:half]), **self.run(texts[half:])}

    def _forward(self, texts: Sequence[Text]) -> Tensor:
        prompts = [text.prompt_tokens for text in texts]
        return self._encoder([text.ids for text in texts], prompts if any(prompts) else None)


def _write(texts: Sequence[Text], vectors: Tensor) -> Failures:
    """Finish the vectors `[n, D]` as each job wants them, and put them into the jobs' rows."""
    bad: Failures = {}
    wants = [(row, want) for row, text in enumerate(texts) for want in text.wants]
    for output in {want.job.output for _, want in wants}:
        chosen = [(row, want) for row, want in wants if want.job.output == output]
        rows = [row for row, _ in chosen]
        finished = finish(
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
