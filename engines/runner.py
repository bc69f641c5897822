"""Runs one batch on the lane's thread: entries in, their jobs' rows filled. Knows no queue and no event loop."""

from collections.abc import Sequence

import structlog
import torch
from torch import Tensor

from engines.batch import Entry
from engines.encoder import Encoder
from engines.errors import EngineError, EngineFailed, NonFiniteEmbedding, OutOfMemory
from engines.layout import similar_lengths
from engines.pooling import finish
from engines.records import Batch

log = structlog.get_logger(__name__)

Failures = dict[int, EngineError]
"""Errors by `id(job)`: a job that is not here got its rows."""


class Runner:
    """The encoder of one engine, and what was learnt about the room on its device.

    Attributes:
        max_tokens: the largest batch that the device is known to hold, None as long as nothing failed.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.max_tokens: int | None = None

    def measure(self, entries: Sequence[Entry]) -> Batch:
        """What a batch, sorted by length, takes on this encoder."""
        lengths = [len(entry.ids) for entry in entries]
        tokens = computed = sum(lengths)
        if self._encoder.attention == "padded":
            computed = sum((end - start) * max(lengths[start:end]) for start, end in similar_lengths(lengths))
        return Batch(texts=len(lengths), tokens=tokens, computed_tokens=computed)

    def run(self, entries: Sequence[Entry]) -> Failures:
        """Write the rows of a batch. Never raises: a failed batch fails its own callers, and only them."""
        try:
            return self._run(entries)
        except EngineError as error:
            return {id(entry.job): error for entry in entries}
        except Exception as error:
            log.exception("engine.forward_failed", texts=len(entries))
            failure = EngineFailed(
                f"the model's forward pass failed ({type(error).__name__}); the server's log says more"
            )
            failure.__cause__ = error
            return {id(entry.job): failure for entry in entries}

    def _run(self, entries: Sequence[Entry]) -> Failures:
        try:
            vectors = self._forward(entries)
        except torch.OutOfMemoryError as error:
            return self._run_halves(entries, error)
        return _write(entries, vectors)

    def _run_halves(self, entries: Sequence[Entry], cause: Exception) -> Failures:
        """The device has no room for this batch: run it in two, and let smaller ones be cut from now on."""
        tokens = sum(len(entry.ids) for entry in entries)
        if len(entries) == 1:
            raise OutOfMemory(
                f"the device has no memory to run one text of {tokens} tokens; try again later"
            ) from cause
        self.max_tokens = max(1, tokens // 2)
        log.warning("engine.batch_halved", tokens=tokens, max_batch_tokens=self.max_tokens)
        half = len(entries) // 2
        return {**self.run(entries[:half]), **self.run(entries[half:])}

    def _forward(self, entries: Sequence[Entry]) -> Tensor:
        prompts = [entry.job.prompt_tokens for entry in entries]
        return self._encoder([entry.ids for entry in entries], prompts if any(prompts) else None)


def _write(entries: Sequence[Entry], vectors: Tensor) -> Failures:
    """Finish the vectors `[n, D]` as each job wants them, and put them into the jobs' rows."""
    bad: Failures = {}
    for output in {entry.job.output for entry in entries}:
        chosen = [row for row, entry in enumerate(entries) if entry.job.output == output]
        finished = finish(
            vectors if len(chosen) == len(entries) else vectors[chosen],
            dimensions=output.dimensions,
            normalized=output.normalized,
            pre_norm=output.pre_norm,
        )
        is_finite = torch.isfinite(finished).all(dim=-1).tolist()
        for row, vector, good in zip(chosen, finished.cpu().numpy(), is_finite, strict=True):
            entry = entries[row]
            entry.job.rows[entry.index] = vector
            if not good:
                bad[id(entry.job)] = _not_finite(entry.index)
    return bad


def _not_finite(index: int) -> NonFiniteEmbedding:
    return NonFiniteEmbedding(
        f"the vector of input[{index}] is not finite: the model's dtype overflows on this text. Serve the model with "
        "`dtype: float32` or `bfloat16`",
        index=index,
    )
