"""Answers the calls of one loaded model; joins the tokenizer, the queue and the encoder.

The event loop admits requests and resolves them; the scheduler's threads form batches and run them; tokenization runs
on a pool of threads. What crosses between them is a `PendingRequest`, whose attributes say which of them writes each.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypedDict

from msgspec import structs

from engines.batching.autotune import TunedBatchSize
from engines.batching.batch import BatchLimits, attribute_batch
from engines.batching.cache import VectorCache
from engines.batching.contextual import read_documents
from engines.batching.flex import FlexTasks
from engines.batching.maxsim import MaxSimScorer
from engines.batching.output import OutputDefaults, OutputSpec, output_spec
from engines.batching.parts import EngineLimits as EngineLimits
from engines.batching.parts import Parts as Parts
from engines.batching.queue import Queue
from engines.batching.request import Entry, Origin, PendingRequest, prepare_inputs
from engines.batching.rest_of_recording import rest_after_waking
from engines.batching.runner import Failures, Runner
from engines.batching.scores import read_scored
from engines.batching.spaces import FIRST_ANSWER_S
from engines.device.scheduler import DeviceScheduler, Task, post
from engines.errors import EngineError, EngineFailed, ShuttingDown, SpaceMismatch
from engines.inputs.documents import DocumentReading
from engines.inputs.pairs import PairReading
from engines.inputs.token_listing import list_tokens, name_terms
from engines.inputs.tokenizer import IdReading, TextReading, TokenizedRequest
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.models.base import ForwardPathFailed
from engines.types import (
    Call,
    ContextualCall,
    ModelCall,
    ModelInfo,
    Outputs,
    OutputsCall,
    Result,
    ScoreCall,
    TextCall,
    Timings,
    TokenizeCall,
    Tokens,
)

_INLINE_CHARS = 1000
_INLINE_TEXTS = 16
"""Up to so many characters, prompts included, in so many texts are tokenized on the event loop: it takes 0.3 ms at the
most, and a thread and back costs as much beside busy cores."""

_HEAVY_CHARS = 1 << 20
"""A request of more leaves memory allocated that is worth returning."""

_MAX_NAMED_SPACES = 256
"""Forms of requests whose spaces are held; prompts of requests may be of any number."""


class Counted(TypedDict):
    """What is known of a result before its rows are; see `ResultDetails`."""

    deduplicated: int
    cache_hits: int
    space: str


Reading = TextReading | IdReading | PairReading | DocumentReading
"""The inputs of a request, to be tokenised."""


class EmbeddingEngine:
    """The engine of one model on one device (`engines.protocols.Engine`).

    Args:
        parts: the model.
        scheduler: runs its batches.
        threads: tokenize its texts.
        limits: bounds of queue and batch.
        check: runs on the scheduler during warm-up; returns the measured description of the model, and bytes: weights,
            workspace.
        release: frees the device's memory after the last reference is gone.
    """

    def __init__(  # noqa: PLR0913  # one constructor joins the parts; nothing else builds engines
        self,
        parts: Parts,
        scheduler: DeviceScheduler,
        threads: TokenizerThreads,
        limits: EngineLimits,
        check: Callable[[], tuple[ModelInfo, int, int]],
        release: Callable[[], None],
        weight_bytes: int,
    ) -> None:
        self._info = parts.info
        self.weight_bytes, self.workspace_bytes = weight_bytes, 0
        self._cache = VectorCache(parts.spec.cache_bytes, parts.rest_of_check) if parts.spec.cache_bytes else None
        self._queue = Queue(limits.max_queue_items, limits.batch_timeout_s, time.monotonic, limits.max_queue_requests)
        keep = self._cache.keep if self._cache is not None else None
        self._runner: Runner | None = Runner(parts.encoder, self._queue.seal, keep, report_error=scheduler.report_error)
        self._tokenizer, self._tuner = parts.tokenizer, parts.tuner
        self._batch, self._spec, self._scheduler = limits.batch, parts.spec, scheduler
        self._flex = FlexTasks(self._queue, self._limit, self._run_task, lambda: self._is_reentrant)
        self._threads = threads
        self._limits, self._scoring, self._spaces = limits, parts.scoring, parts.spaces
        self._named_spaces: dict[object, str] = {}
        activation = "Identity" if parts.scoring is None else parts.scoring.activation
        self._facts = facts = parts.facts
        self._has_sides = facts.has_sides
        self._defaults = OutputDefaults(
            parts.spec.normalize, limits.target_dim, activation, facts.states_width, facts.default_side, facts.pooling,
            facts.pooled_on, facts.has_term_names,
        )  # fmt: skip
        documents = facts.document_tokenizer or parts.tokenizer
        self._maxsim = MaxSimScorer(facts, documents, parts.spec, parts.info.prompts) if facts.similarity else None
        self._check: Callable[[], tuple[ModelInfo, int, int]] | None = check
        self._parkable, self._rest, self._release = parts.parkable, parts.rest_of_check, release

    @property
    def info(self) -> ModelInfo:
        """Returns the model's description, with the forward path in use now."""
        if self._info.ingredients is None and self._spaces is not None:
            self._info = structs.replace(self._info, ingredients=self._spaces.ingredients)
        if self._rest is not None:
            self._info = self._rest.described(self._info)
        return self._info if (runner := self._runner) is None else runner.described(self._info)

    @property
    def queue_items(self) -> int:
        """Returns the number of texts admitted and not yet run."""
        return self._queue.num_items

    @property
    def is_tuning(self) -> bool:
        """Tells whether the size of its batches is still being tried out."""
        return self._tuner is not None and not self._tuner.is_done

    async def warm_up(self) -> None:
        """Checks and measures the model on the scheduler, which from then on asks it for batches."""
        assert self._check is not None, "warm_up is called once"
        self._info, self.weight_bytes, self.workspace_bytes = await self._scheduler.call(self._check)
        self._check = None
        if self._spaces is not None:
            await self._spaces.settled_within(FIRST_ANSWER_S)
        self._rest = self._rest.started() if self._rest is not None else None
        self._scheduler.attach(self, self._flex)

    async def run(self, call: Call) -> Result:
        """See `Engine.run`. Cancelling drops what is in no batch yet."""
        if isinstance(call, TokenizeCall):
            return await self._tokenize(call)
        if isinstance(call, ScoreCall) and self._maxsim is not None:
            return await self._maxsim.score(call, self._answer)
        output = output_spec(call, self._info, self._defaults)
        return await self._answer(call, output, "" if isinstance(call, ScoreCall) else await self._space(call, output))

    async def _answer(self, call: ModelCall, output: OutputSpec, space: str = "") -> Result:
        reading, origin = self._reading(call), Origin(call.caller, self._spec.cache_shared, call.is_flex)
        if reading.num_chars > _HEAVY_CHARS:
            with self._threads.trim_heap_after():
                result = await self._run(reading, output, origin, space)
        else:
            result = await self._run(reading, output, origin, space)
        if isinstance(result, Outputs) and isinstance(call, OutputsCall) and call.names_terms:
            return await self._threads.call(partial(name_terms, result, self._tokenizer))
        return result

    async def _space(self, call: TextCall, output: OutputSpec) -> str:
        """Returns the space of the call's vectors; empty while it is unknown.

        Raises:
            SpaceMismatch: the call expects another one.
        """
        is_long = len(call.prompt or call.instruction or "") > _INLINE_CHARS
        frame = () if is_long else (call.input_type, call.instruction, call.prompt)
        key = (frame, not call.texts, call.truncate, call.max_tokens, output)
        space = "" if is_long else self._named_spaces.get(key, "")
        if space and call.expect_space in (None, space):
            return space
        if self._spaces is None:
            if call.expect_space is not None:
                raise SpaceMismatch(f"the vectors of {call.model_id} have no space here: omit expect_space")
            return ""
        if call.expect_space is not None:
            space = await self._spaces.check(call, output)
        elif is_long:
            return await asyncio.to_thread(self._spaces.name, call, output)
        else:
            space = self._spaces.name(call, output)
        if space and not is_long:
            if len(self._named_spaces) >= _MAX_NAMED_SPACES:
                self._named_spaces.clear()
            self._named_spaces[key] = space
        return space

    def _reading(self, call: ModelCall) -> Reading:
        if isinstance(call, ScoreCall):
            assert self._scoring is not None, "`output_spec` has checked the task"
            return read_scored(call, self._scoring.pairs, self._spec)
        if isinstance(call, ContextualCall):
            return read_documents(call, self._tokenizer, self._spec, self._info.prompts)
        tokenizer = self._tokenizer
        if self._has_sides:
            tokenizer = self._facts.tokenizer_of(call) or tokenizer
        return prepare_inputs(call, tokenizer, self._spec, self._info.prompts)

    async def _tokenize(self, call: TokenizeCall) -> Tokens:
        begun = time.monotonic()
        tokens = await self._threads.call(partial(list_tokens, call, self._tokenizer, self._spec, self._info.prompts))
        return structs.replace(tokens, timings=Timings(tokenize_s=time.monotonic() - begun))

    async def _run(self, reading: Reading, output: OutputSpec, origin: Origin, space: str) -> Result:
        loop = asyncio.get_running_loop()
        begun = time.monotonic()
        encoded = reading.run_all() if _is_inline(reading) else await self._threads.run(reading)
        output.check_size(encoded.token_counts)
        job = PendingRequest(encoded, output, loop, time.monotonic(), origin)
        known = self._cache.fill(job) if self._cache is not None and output.is_cached else ()
        missing = [index for index in range(len(job.ids)) if index not in known] if known else None
        deduplicated = self._queue.admit(job, missing)
        if job.needs_thread:
            self._scheduler.notify(is_flex=job.is_flex)
        try:
            if job.rows_missing:
                await job.done
        except asyncio.CancelledError:
            self._queue.drop(job)
            raise
        for step in job.output.remaining_steps(job.rows):
            await self._threads.call(step)
        details = Counted(deduplicated=deduplicated, cache_hits=len(known), space=space)
        pack = partial(self._result, job, encoded, begun, details)
        return await self._threads.call(pack) if output.is_large(job.rows) else pack()

    def park(self) -> int:
        """See `Engine.park`. Everything but the weights stays: modules, tokenizer, batch size, cache, check."""
        if self._parkable is None:
            raise EngineFailed("this model cannot be parked; it is loaded again when it is asked for")
        self._leave_device()
        moved_bytes = self._parkable.park()
        return self.weight_bytes if self._parkable.is_on_cpu else moved_bytes

    @property
    def moved_bytes(self) -> int:
        """Returns the bytes that `park` has freed on the device; 0 while the engine is not parked."""
        return 0 if self._parkable is None else self._parkable.moved_bytes

    def wake(self) -> None:
        """See `Engine.wake`."""
        assert self._parkable is not None, "it was parked"
        self._parkable.wake()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        assert self._parkable is not None, "it was parked"
        await self._scheduler.call(self._parkable.check)
        self._rest = rest_after_waking(self._parkable, self._rest)
        self._scheduler.attach(self, self._flex)

    def _leave_device(self) -> None:
        """Takes no more batches, waits for those that run, and fails what still waits."""
        self._scheduler.detach(self)
        for job in self._queue.clear():
            reason = ShuttingDown("the model left while the request waited; send it again")
            post(job.done.get_loop(), self._fail, job, reason)

    def close(self) -> None:
        """Frees the model; blocks. Requests that still wait are failed."""
        self._leave_device()
        if self._parkable is not None:
            self._parkable.close()
        self._parkable = self._runner = self._cache = self._tuner = self._check = self._rest = None
        if self._spaces is not None:
            self._spaces.close()
        self._release()

    # Called by the scheduler (`engines.device.tasks.TaskSource`).

    @property
    def max_concurrent_tasks(self) -> int:
        """Returns how many batches may run at once; see `engines.device.tasks.TaskSource`.

        A few texts (fewer tokens than the encoder's `part_tokens`) wait for the batch that runs, which has every core:
        a second small one beside it would read all weights again, and leave no texts to share the next one with.
        """
        if not self._is_reentrant:
            return 0 if self._flex.num_running else 1
        return self._scheduler.num_threads if self._queue.is_worth_splitting(self._limit()) else 1

    def ready_in_s(self) -> float | None:
        """See `engines.device.tasks.TaskSource`. Texts come before trials of batch sizes and the rest of the check."""
        due_in_s = self._queue.ready_in_s(self._limit())
        if due_in_s is not None or (self._tuner is not None and self._tuner.is_due):
            return due_in_s or 0.0
        return None if self._rest is None else self._rest.due_in_s

    def next_task(self, num_free: int) -> Task | None:
        """See `engines.device.tasks.TaskSource`."""
        limit, is_reentrant = self._limit(), self._is_reentrant
        is_overdue = self._rest is not None and self._rest.is_overdue
        texts = [] if is_overdue else self._queue.next_batch(limit, 1 + num_free if is_reentrant else 1)
        if not texts:
            return self._idle_task()
        is_long = is_reentrant and not limit.are_small(texts)
        begins_wide = len(texts) == 1 or is_long or not is_reentrant
        return Task(partial(self._run_task, texts), is_long, not self._limits.even_batches, begins_wide)

    def next_small_task(self) -> Task | None:
        """See `engines.device.tasks.TaskSource`."""
        texts = self._queue.next_small_batch(self._limit()) if self._is_reentrant else []
        return Task(partial(self._run_task, texts)) if texts else None

    def _idle_task(self) -> Task | None:
        if self._rest is not None and (task := self._rest.next_task()) is not None:
            return task
        if self._tuner is None or not self._tuner.is_due:
            return None
        self._tuner.begin()
        return Task(partial(self._tuner.run, self._use_tuned), is_long=True)

    def _use_tuned(self, tuned: TunedBatchSize) -> None:
        self._batch = BatchLimits(tuned.batch_tokens, self._limits.batch.max_items)

    @property
    def _is_reentrant(self) -> bool:
        return self._runner is not None and self._runner.is_reentrant

    def _limit(self) -> BatchLimits:
        limit = self._batch if self._runner is None else self._runner.bound(self._batch)
        return limit.unsplit() if self._limits.even_batches else limit

    def _run_task(self, texts: list[Entry]) -> None:
        """Runs a batch and hands its outcome to the event loop."""
        assert self._runner is not None, "a closed engine gets no tasks"
        started = time.monotonic()
        for text in texts:
            for target in text.targets:
                if target.job.started_at is None:
                    target.job.started_at = started
        try:
            bad = self._runner.run(texts)
        except ForwardPathFailed:
            self._queue.requeue(texts)
            return
        attribute_batch(self._runner.measure(texts), texts, bad)
        jobs = [target.job for text in texts for target in text.targets]
        if not texts[0].is_flex:
            done = {job for job in jobs if not job.unscheduled}
            self._queue.on_batch_done(len(done), self._scheduler.task_elapsed_s())
        for loop in {job.done.get_loop() for job in jobs}:
            self._scheduler.post(loop, self._settle, iter([job for job in jobs if job.done.get_loop() is loop]), bad)

    def _settle(self, jobs: Iterator[PendingRequest], bad: Failures) -> None:
        """Counts rows down (a request is in `jobs` once for each) and resolves requests that have all of them; on the
        event loop.

        One in each iteration of the loop: each has its answer written and often brings its client's next request, and
        all other requests wait for an iteration to end.
        """
        for job in jobs:
            job.rows_missing -= 1
            if id(job) in bad:
                self._fail(job, bad[id(job)])
            elif job.rows_missing == 0 and not job.done.done():
                job.entries = []  # ends a reference cycle, so that memory need not wait for the collector
                job.done.set_result(None)
                job.done.get_loop().call_soon(self._settle, jobs, bad)
                break

    def _fail(self, job: PendingRequest, error: EngineError) -> None:
        self._queue.drop(job)
        if not job.done.done():
            job.done.set_exception(error)

    def _result(self, job: PendingRequest, encoded: TokenizedRequest, begun: float, counted: Counted) -> Result:
        ended = time.monotonic()
        started = ended if job.started_at is None else job.started_at
        timings = Timings(
            tokenize_s=job.admitted_at - begun, queue_s=started - job.admitted_at, forward_s=ended - started
        )
        return job.output.pack(
            job.rows,
            token_counts=encoded.token_counts,
            truncated=encoded.truncated,
            timings=timings,
            batches=tuple(job.batches),
            **counted,
        )


def _is_inline(reading: Reading) -> bool:
    return (
        not isinstance(reading, IdReading) and reading.num_chars <= _INLINE_CHARS and len(reading.rows) <= _INLINE_TEXTS
    )
