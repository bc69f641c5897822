"""One model, ready: texts in, vectors out. Joins the tokenizer, the queue and the encoder.

The event loop admits jobs and resolves them; the lane's thread cuts batches and runs them; tokenising happens on a
pool of threads. What crosses between them is a `Job`, whose fields say who writes them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

from msgspec import Struct

from engines.batch import Entry, Job, Limit, Output, Queue, tell
from engines.device import Lane, Turn, post
from engines.encoder import Encoder
from engines.errors import DimensionsNotSupported, EngineError, InvalidValue, ShuttingDown
from engines.prompts import choose_frame
from engines.records import EmbedCall, Embeddings, ModelInfo, Timings
from engines.runner import Failures, Runner
from engines.spec import ModelSpec
from engines.tokenize import Encoded, Tokenizer


class EngineLimits(Struct, frozen=True, kw_only=True):
    """What an engine may take on. `target_dim`: width when a request names none and the model allows it."""

    batch: Limit
    max_queue_items: int = 8192
    batch_timeout_s: float = 0.0
    target_dim: int | None = None


class Parts(Struct, frozen=True):
    """What the loader made of a model folder."""

    encoder: Encoder
    tokenizer: Tokenizer
    spec: ModelSpec
    info: ModelInfo


class TextEngine:
    """The engine of one model on one device (`engines.protocols.Engine`).

    Args:
        parts: the model.
        lane: where its batches run.
        threads: where its texts are tokenised.
        limits: bounds of queue and batch.
        check: runs on the lane during warm-up; returns what the model turned out to be, and its workspace in bytes.
        release: frees the device's memory after the last reference has gone.
    """

    def __init__(  # noqa: PLR0913  # one constructor joins the parts; nothing else builds engines
        self,
        parts: Parts,
        lane: Lane,
        threads: Executor,
        limits: EngineLimits,
        check: Callable[[], tuple[ModelInfo, int]],
        release: Callable[[], None],
        weight_bytes: int,
    ) -> None:
        self.info = parts.info
        self.weight_bytes = weight_bytes
        self.workspace_bytes = 0
        self._runner: Runner | None = Runner(parts.encoder)
        self._tokenizer = parts.tokenizer
        self._spec = parts.spec
        self._lane = lane
        self._threads = threads
        self._limits = limits
        self._queue = Queue(limits.max_queue_items, limits.batch_timeout_s, time.monotonic)
        self._check: Callable[[], tuple[ModelInfo, int]] | None = check
        self._release = release

    @property
    def queue_items(self) -> int:
        """Texts admitted and not yet run."""
        return self._queue.num_items

    async def warm_up(self) -> None:
        """Check and measure the model on the lane, then take turns there."""
        assert self._check is not None, "warm_up is called once"
        self.info, self.workspace_bytes = await self._lane.call(self._check)
        self._check = None
        self._lane.attach(self)

    async def embed(self, call: EmbedCall) -> Embeddings:
        """See `Engine.embed`. Cancelling drops what has not been cut."""
        loop = asyncio.get_running_loop()
        output = self._output(call)
        begun = time.monotonic()
        encoded = await loop.run_in_executor(self._threads, self._encode, call)
        job = Job(encoded, output, loop, time.monotonic())
        self._queue.admit(job)
        self._lane.wake()
        try:
            await job.done
        except asyncio.CancelledError:
            self._queue.drop(job)
            raise
        return self._answer(job, encoded, begun)

    def close(self) -> None:
        """Free the model; blocks. Jobs still waiting are failed, so that nobody waits for ever."""
        self._lane.detach(self)
        for job in self._queue.clear():
            post(
                job.done.get_loop(), _fail, job, ShuttingDown("the model left while the request waited; send it again")
            )
        self._runner = None
        self._check = None
        self._release()

    # What the lane calls.

    def due_in_s(self) -> float | None:
        """See `engines.device.Source`."""
        return self._queue.due_in_s(self._limit())

    def take(self) -> Turn | None:
        """See `engines.device.Source`."""
        entries = self._queue.cut(self._limit())
        return partial(self._turn, entries) if entries else None

    def _limit(self) -> Limit:
        limit, known = self._limits.batch, self._runner.max_tokens if self._runner is not None else None
        return limit if known is None else Limit(min(limit.max_tokens, known), limit.max_items)

    def _turn(self, entries: list[Entry]) -> None:
        """Run a batch and hand its outcome to the event loop."""
        assert self._runner is not None, "a closed engine takes no turns"
        started = time.monotonic()
        for entry in entries:
            if entry.job.started_at is None:
                entry.job.started_at = started
        bad = self._runner.run(entries)
        tell(self._runner.measure(entries), entries, bad)
        for loop in {entry.job.done.get_loop() for entry in entries}:
            post(loop, _settle, [entry for entry in entries if entry.job.done.get_loop() is loop], bad)

    # What a request needs before and after.

    def _encode(self, call: EmbedCall) -> Encoded:
        truncate = call.truncate or self._spec.truncate or self._tokenizer.rules.truncate
        if call.token_ids:
            if call.input_type is not None or call.instruction is not None or call.prompt is not None:
                raise InvalidValue("token ids are taken verbatim: no prompt can be put in front of them", param="input")
            return self._tokenizer.take_ids(call.token_ids, truncate)
        default = self._spec.default_prompt
        frame = choose_frame(call, self.info.prompts, default, self._spec.instruction_template)
        try:
            return self._tokenizer.encode(call.texts, frame, truncate)
        except UnicodeEncodeError as error:
            raise InvalidValue(
                "input holds a lone surrogate, which is no text in any encoding", param="input"
            ) from error

    def _output(self, call: EmbedCall) -> Output:
        native, allowed = self.info.dimensions, self.info.matryoshka
        width = call.dimensions
        if width is None:
            target = self._limits.target_dim
            width = target if target is not None and target <= native and allowed.allows(target, native) else native
        elif not allowed.allows(width, native):
            raise DimensionsNotSupported(
                f"dimensions is {width}, but {call.model_id} gives {allowed.describe(native)}", param="dimensions"
            )
        normalized = self._spec.normalize if call.normalize is None else call.normalize
        return Output(width, normalized, allowed.layer_norm)

    def _answer(self, job: Job, encoded: Encoded, begun: float) -> Embeddings:
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
        )


def _settle(entries: Sequence[Entry], bad: Failures) -> None:
    """On the event loop: count rows down, wake whoever has all of them."""
    for entry in entries:
        job = entry.job
        job.left -= 1
        if id(job) in bad:
            _fail(job, bad[id(job)])
        elif job.left == 0 and not job.done.done():
            job.done.set_result(None)


def _fail(job: Job, error: EngineError) -> None:
    job.pending.clear()
    if not job.done.done():
        job.done.set_exception(error)
