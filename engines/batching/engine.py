"""One model, ready: texts in, vectors out. Joins the tokenizer, the queue and the encoder.

The event loop admits jobs and resolves them; the lane's thread cuts batches and runs them; tokenising happens on a
pool of threads. What crosses between them is a `Job`, whose fields say who writes them.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from msgspec import Struct

from engines.batching.autotune import Pace, Tuner
from engines.batching.batch import Limit, tell
from engines.batching.cache import VectorCache
from engines.batching.queue import Queue
from engines.batching.request import Job, Origin, Output, Text, output_of, read_call
from engines.batching.runner import Failures, Runner
from engines.device.scheduler import Lane, Turn, post
from engines.errors import EngineError, ShuttingDown
from engines.inputs.tokenizer import Encoded, IdReading, TextReading, Tokenizer
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.models.base import Encoder, PathLeft
from engines.spec import ModelSpec
from engines.types import EmbedCall, Embeddings, ModelInfo, Timings

_INLINE_CHARS = 1000
_INLINE_TEXTS = 16
"""Up to so many characters, prompts included, in so many texts are tokenised on the event loop: it takes 0.3 ms at the
most, and a hop to a thread and back costs as much beside busy cores."""

_HEAVY_CHARS = 1 << 20
"""A request of more leaves memory behind that is worth giving back."""


class EngineLimits(Struct, frozen=True, kw_only=True):
    """What an engine may take on.

    Args:
        target_dim: width when a request names none and the model allows it.
    """

    batch: Limit
    max_queue_items: int = 8192
    batch_timeout_s: float = 0.0
    target_dim: int | None = None


class Parts(Struct, frozen=True):
    """What the loader made of a model folder. `tuner`: tries out the size of batches; None where that is settled."""

    encoder: Encoder
    tokenizer: Tokenizer
    spec: ModelSpec
    info: ModelInfo
    tuner: Tuner | None = None


class TextEngine:
    """The engine of one model on one device (`engines.protocols.Engine`).

    Args:
        parts: the model.
        lane: where its batches run.
        threads: where its texts are tokenised.
        limits: bounds of queue and batch.
        check: runs on the lane during warm-up; returns what the model turned out to be, and bytes: weights, workspace.
        release: frees the device's memory after the last reference has gone.
    """

    def __init__(  # noqa: PLR0913  # one constructor joins the parts; nothing else builds engines
        self,
        parts: Parts,
        lane: Lane,
        threads: TokenizerThreads,
        limits: EngineLimits,
        check: Callable[[], tuple[ModelInfo, int, int]],
        release: Callable[[], None],
        weight_bytes: int,
    ) -> None:
        self._info = parts.info
        self.weight_bytes = weight_bytes
        self.workspace_bytes = 0
        self._cache = VectorCache(parts.spec.cache_bytes) if parts.spec.cache_bytes else None
        self._queue = Queue(limits.max_queue_items, limits.batch_timeout_s, time.monotonic)
        self._runner: Runner | None = Runner(
            parts.encoder, self._queue.close, self._cache.keep if self._cache is not None else None
        )
        self._tokenizer = parts.tokenizer
        self._tuner = parts.tuner
        self._batch = limits.batch
        self._spec = parts.spec
        self._lane = lane
        self._threads = threads
        self._limits = limits
        self._check: Callable[[], tuple[ModelInfo, int, int]] | None = check
        self._release = release

    @property
    def info(self) -> ModelInfo:
        """What the model is, with the path that it takes now."""
        runner = self._runner
        return self._info if runner is None else runner.described(self._info)

    @property
    def queue_items(self) -> int:
        """Texts admitted and not yet run."""
        return self._queue.num_items

    @property
    def is_tuning(self) -> bool:
        """Whether the size of its batches is still being tried out."""
        return self._tuner is not None and not self._tuner.is_done

    async def warm_up(self) -> None:
        """Check and measure the model on the lane, then take turns there."""
        assert self._check is not None, "warm_up is called once"
        self._info, self.weight_bytes, self.workspace_bytes = await self._lane.call(self._check)
        self._check = None
        self._lane.attach(self)

    async def embed(self, call: EmbedCall) -> Embeddings:
        """See `Engine.embed`. Cancelling drops what has not been cut."""
        output = output_of(call, self._info, normalize=self._spec.normalize, target_dim=self._limits.target_dim)
        reading = read_call(call, self._tokenizer, self._spec, self._info.prompts)
        with self._threads.heavy() if reading.num_chars > _HEAVY_CHARS else nullcontext():
            return await self._embed(reading, output, Origin(call.caller, self._spec.cache_shared))

    async def _embed(self, reading: TextReading | IdReading, output: Output, origin: Origin) -> Embeddings:
        loop = asyncio.get_running_loop()
        begun = time.monotonic()
        encoded = reading.now() if _is_inline(reading) else await self._threads.run(reading)
        job = Job(encoded, output, loop, time.monotonic(), origin)
        known = self._cache.fill(job) if self._cache is not None else ()
        missing = [index for index in range(len(job.ids)) if index not in known] if known else None
        reused = self._queue.admit(job, missing)
        self._lane.wake()
        try:
            if job.left:
                await job.done
        except asyncio.CancelledError:
            self._queue.drop(job)
            raise
        return self._answer(job, encoded, begun, reused=reused, recalled=len(known))

    def close(self) -> None:
        """Free the model; blocks. Jobs still waiting are failed, so that nobody waits for ever."""
        self._lane.detach(self)
        for job in self._queue.clear():
            reason = ShuttingDown("the model left while the request waited; send it again")
            post(job.done.get_loop(), self._fail, job, reason)
        self._runner = None
        self._cache = None
        self._tuner = None
        self._check = None
        self._release()

    # What the lane calls.

    @property
    def max_turns(self) -> int:
        """See `engines.device.tasks.Source`. A few texts wait for the batch that runs and has every core meanwhile: a second
        small batch beside it would read all weights once more, and leave nobody to share the next one with. How few
        those are, the encoder knows (`part_tokens`).
        """
        return self._lane.num_threads if self._is_reentrant and self._queue.is_worth_splitting(self._limit()) else 1

    def due_in_s(self) -> float | None:
        """See `engines.device.tasks.Source`. Trials come when nobody waits."""
        due_in_s = self._queue.due_in_s(self._limit())
        return 0.0 if due_in_s is None and self._tuner is not None and self._tuner.is_due else due_in_s

    def take(self, num_free: int) -> Turn | None:
        """See `engines.device.tasks.Source`."""
        limit = self._limit()
        texts = self._queue.cut(limit, 1 + num_free if self._is_reentrant else 1)
        if not texts:
            return self._trial()
        is_long = self._is_reentrant and not all(any(limit.is_small(w.job) for w in text.wants) for text in texts)
        return Turn(partial(self._turn, texts), is_long=is_long, is_wide=True)

    def take_small(self) -> Turn | None:
        """See `engines.device.tasks.Source`."""
        texts = self._queue.cut_small(self._limit()) if self._is_reentrant else []
        return Turn(partial(self._turn, texts)) if texts else None

    def _trial(self) -> Turn | None:
        if self._tuner is None or not self._tuner.is_due:
            return None
        self._tuner.begin()
        return Turn(partial(self._tuner.run, self._adopt), is_long=True)

    def _adopt(self, pace: Pace) -> None:
        self._batch = Limit(pace.batch_tokens, self._limits.batch.max_items)

    @property
    def _is_reentrant(self) -> bool:
        return self._runner is not None and self._runner.is_reentrant

    def _limit(self) -> Limit:
        return self._batch if self._runner is None else self._runner.bound(self._batch)

    def _turn(self, texts: list[Text]) -> None:
        """Run a batch and hand its outcome to the event loop."""
        assert self._runner is not None, "a closed engine takes no turns"
        started = time.monotonic()
        for text in texts:
            for want in text.wants:
                if want.job.started_at is None:
                    want.job.started_at = started
        try:
            bad = self._runner.run(texts)
        except PathLeft:
            self._queue.put_back(texts)
            return
        tell(self._runner.measure(texts), texts, bad)
        jobs = [want.job for text in texts for want in text.wants]
        self._queue.answered(sum(not job.pending for job in set(jobs)), self._lane.own_s())
        for loop in {job.done.get_loop() for job in jobs}:
            post(loop, self._settle, iter([job for job in jobs if job.done.get_loop() is loop]), bad)

    def _settle(self, jobs: Iterator[Job], bad: Failures) -> None:
        """On the event loop: count rows down (a job stands here once for each), wake whoever has all of them.

        One in each round of the loop: each has its answer written and often brings its next request, and everybody else
        waits for a round to end.
        """
        for job in jobs:
            job.left -= 1
            if id(job) in bad:
                self._fail(job, bad[id(job)])
            elif job.left == 0 and not job.done.done():
                job.wanted = []  # it and its texts know each other: their memory need not wait for the collector
                job.done.set_result(None)
                job.done.get_loop().call_soon(self._settle, jobs, bad)
                break

    def _fail(self, job: Job, error: EngineError) -> None:
        self._queue.drop(job)
        if not job.done.done():
            job.done.set_exception(error)

    # What a request needs before and after.

    def _answer(self, job: Job, encoded: Encoded, begun: float, *, reused: int, recalled: int) -> Embeddings:
        ended = time.monotonic()
        started = ended if job.started_at is None else job.started_at
        timings = Timings(
            tokenize_s=job.admitted_at - begun, queue_s=started - job.admitted_at, forward_s=ended - started
        )
        return Embeddings(
            vectors=job.rows.tobytes(),
            dimensions=job.output.dimensions,
            token_counts=encoded.token_counts,
            truncated=encoded.truncated,
            timings=timings,
            batches=tuple(job.batches),
            reused=reused,
            recalled=recalled,
        )


def _is_inline(reading: TextReading | IdReading) -> bool:
    return (
        isinstance(reading, TextReading) and reading.num_chars <= _INLINE_CHARS and len(reading.rows) <= _INLINE_TEXTS
    )
