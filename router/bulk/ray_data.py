"""Runs a bulk job on a Ray cluster by Ray Data: `embedyard embed --ray`. Needs `embedyard[ray]`.

A task on this machine reads the windows, one actor for each device of the cluster computes them, and this process
commits them in the order of the input, in the same files as without a cluster. Which window runs where, what is run
again when an actor or a node is lost, and how far reading runs ahead is up to Ray Data.
"""

import asyncio
import logging
import pickle
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, structs

from engines.errors import EngineError, InvalidValue
from router.backends.ray import environment
from router.bulk.job import BulkJob, Embedder, TextWindow, read_windows
from router.bulk.journal import journaled_cursor
from router.bulk.records import BulkError, BulkStopped, Cursor, VectorWidths, WindowAnswer

environment.prepare_job_environment()

try:
    import pyarrow as pa
    import ray
    import ray.data
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    from router.backends.ray.connection import connect
except ImportError as error:
    raise BulkError("--ray needs Ray Data, which is not installed: pip install 'embedyard[ray]'") from error

LOCAL = "local"
"""The address of a cluster that is started for the job, on this machine."""

_CELL = "window"
_MAX_RETRIES = 3
"""How often a window is run again whose actor was lost: it may be the cause."""

_WINDOWS_AHEAD = 2
"""Windows that an actor has at once: one runs, one waits."""

_NOTICE_S = 30.0
_STOP_S = 60.0
_PIPELINE_THREADS = ("StreamingExecutor-", "iter_threaded", "map_tp_", "ray-data-")
"""Name prefixes of Ray Data's threads that call Ray."""

_STORE_BYTES = 512 * 2**20
"""Of the object store of a cluster that is started for a job: about 20 windows of 1,024 floats for 2,048 texts."""


class DevicePlan(Struct, frozen=True, kw_only=True):
    """The actors of a job, and what each of them takes of its node."""

    actors: int
    gpus: float = 0.0
    cpus: int = 1


class _Failure(Struct, frozen=True):
    """Ends the job: as it is described ("error"), or for now ("stopped")."""

    kind: Literal["error", "stopped"]
    message: str


class _Done(Struct, frozen=True, kw_only=True):
    """A window as it comes back.

    Args:
        window: its records, without their texts.
        answer: None if no text could be embedded.
        widths, model: see `Embedder.open`; the same of every actor.
    """

    window: TextWindow
    answer: WindowAnswer | None
    widths: VectorWidths
    model: Mapping[str, Any]


class _WindowSource(ray.data.Datasource):  # type: ignore[misc]  # Ray's types are not read
    """The windows behind a place, each a block of its own, and before them an empty one: its answer tells the model."""

    def __init__(self, job: BulkJob, start: Cursor) -> None:
        self._job, self._start = job, start

    def estimate_inmemory_data_size(self) -> None:
        """Return that the size is unknown."""

    def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
        """Return one task: where a window begins is known when the one before it was read."""
        job, start = self._job, self._start
        unknown = ray.data.block.BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(lambda: window_blocks(job, start), unknown)]


def window_blocks(job: BulkJob, start: Cursor) -> Iterator[Any]:
    """Yield an empty window and those behind a place, each as a block; reading ends with the failure it meets."""
    yield _pack(TextWindow([]))
    try:
        yield from map(_pack, read_windows(job, start))
    except BulkError as error:
        yield _pack(_Failure("error", str(error)))
    except OSError as error:
        yield _pack(_Failure("stopped", error.strerror or str(error)))


class WindowWorker:
    """Computes windows on one device. Ray Data creates one in each actor, and another where an actor was lost.

    The errors of a job are returned, as Ray Data puts its own traceback around what is raised.

    Args:
        open_embedder: creates what computes them.
    """

    def __init__(self, open_embedder: Callable[[], Embedder]) -> None:
        self._runner = asyncio.Runner()
        self._failure: _Failure | None = None
        try:
            self._embedder = open_embedder()
            self._widths, self._model = self._runner.run(self._embedder.open())
        except (BulkError, BulkStopped, EngineError) as error:
            self._failure = _failure_of(error)

    def __call__(self, block: Any) -> Any:
        """Return the block of an answer for the block of a window."""
        (cell,) = block.column(_CELL)
        window = pickle.loads(cell.as_py())
        failure = window if isinstance(window, _Failure) else self._failure
        return _pack(failure or self._embed(window))

    def _embed(self, window: TextWindow) -> _Done | _Failure:
        texts = [record.text for record in window.good]
        try:
            answer = self._runner.run(self._embedder.embed(texts)) if texts else None
        except (BulkError, BulkStopped) as error:
            return _failure_of(error)
        bare = TextWindow([structs.replace(record, text="") for record in window.records])
        return _Done(window=bare, answer=answer, widths=self._widths, model=self._model)


def _failure_of(error: BulkError | BulkStopped | EngineError) -> _Failure:
    return _Failure("stopped" if isinstance(error, BulkStopped) else "error", str(error))


def _pack(content: TextWindow | _Done | _Failure) -> Any:
    """Return a block of one row. Pickled, because a kept column of Parquet may be of any type."""
    return pa.table({_CELL: pa.array([pickle.dumps(content, protocol=5)], pa.large_binary())})


class RayRunner:
    """Has the windows of a job computed by a cluster that this process is connected to (`WindowRunner`).

    Args:
        job: what is read; the files need to be on this machine only.
        open_embedder: creates what computes windows, in each actor; it is pickled.
        plan: the actors.
        notify: shows a line.
    """

    def __init__(
        self, job: BulkJob, open_embedder: Callable[[], Embedder], plan: DevicePlan, notify: Callable[[str], None]
    ) -> None:
        sources = tuple(structs.replace(one, path=str(Path(one.path).absolute())) for one in job.sources)
        self._job = structs.replace(job, sources=sources)  # a task of Ray runs in a folder of its own
        self._open_embedder, self._plan, self._notify = open_embedder, plan, notify
        self._answers: Generator[Any] = _no_blocks()
        self._start = Cursor()
        self._known: tuple[VectorWidths, Mapping[str, Any]] | None = None

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """See `WindowRunner`; computing begins where the journal says, before it is known to be of this job."""
        await self._begin(journaled_cursor(self._job.out))
        assert self._known is not None, "an answer has come"
        return self._known

    async def run(self, start: Cursor) -> AsyncGenerator[tuple[TextWindow, WindowAnswer | None]]:
        """See `WindowRunner`."""
        if start != self._start:
            await self._begin(start)
        expected = start
        while (done := await self._next()) is not None:
            if done.window.records[0].number <= expected.number:
                raise BulkStopped("the cluster sent a window twice")
            expected = done.window.records[-1].after
            yield done.window, done.answer

    async def close(self) -> None:
        """See `WindowRunner`; leaves the cluster, which ends the actors, or ends it if it was started for this job."""
        await asyncio.to_thread(self._leave)

    def _leave(self) -> None:
        try:
            _stop_pipeline(self._answers)
        finally:
            ray.shutdown()

    async def _begin(self, start: Cursor) -> None:
        """Start the pipeline, and wait for the model's facts."""
        self._start = start
        self._answers.close()
        self._answers = _answers(self._job, start, self._open_embedder, self._plan)
        first = asyncio.create_task(self._next())
        try:
            while not (await asyncio.wait({first}, timeout=_NOTICE_S))[0]:
                self._notify("no device of the cluster has the model yet: it is loading, or all devices are in use")
            await first
        finally:
            first.cancel()

    async def _next(self) -> _Done | None:
        try:
            block = await asyncio.to_thread(next, self._answers, None)
        except Exception as error:  # of Ray's: what is ours comes back as an answer
            raise BulkStopped(f"the cluster has lost a window: {_first_line(error)}") from error
        if block is None:
            return None
        (cell,) = block.column(_CELL)
        found = pickle.loads(cell.as_py())
        if isinstance(found, _Failure):
            raise BulkError(found.message) if found.kind == "error" else BulkStopped(found.message)
        assert isinstance(found, _Done), "a worker returns one of both"
        self._check_facts(found)
        return found

    def _check_facts(self, done: _Done) -> None:
        known = self._known or (done.widths, done.model)
        if known != (done.widths, done.model):
            names = [name for name, value in done.model.items() if known[1].get(name) != value]
            raise BulkError(
                f"the devices of the cluster differ in {', '.join(names) or 'the width of vectors'} of the model: run "
                "the job on devices of one kind, or set the model's dtype in the registry"
            )
        self._known = known


def _no_blocks() -> Generator[Any]:
    yield from ()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _answers(job: BulkJob, start: Cursor, open_embedder: Callable[[], Embedder], plan: DevicePlan) -> Generator[Any]:
    """Yield the blocks of answers, in the order of the windows; the pipeline runs as long as this."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a window is a block: nothing is joined or cut
    context.execution_options.preserve_order = True
    windows = ray.data.read_datasource(
        _WindowSource(job, start),
        override_num_blocks=1,
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},  # the files are here
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # retries have no parameter of their own in this version
        computed = windows.map_batches(
            WindowWorker,
            fn_constructor_args=(open_embedder,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=plan.actors, max_tasks_in_flight_per_actor=_WINDOWS_AHEAD),
            num_gpus=plan.gpus,
            num_cpus=plan.cpus,
            max_restarts=_MAX_RETRIES,
            max_task_retries=_MAX_RETRIES,
        )
    yield from computed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _stop_pipeline(answers: Generator[Any]) -> None:
    """Stop Ray Data, and wait for its threads.

    One that calls Ray once the cluster is left ends this process with status 1, before the error is printed. Ray Data
    itself waits 2 s for its scheduling, which on a busy machine takes longer.
    """
    until = time.monotonic() + _STOP_S
    while time.monotonic() < until:
        for thread in threading.enumerate():
            if isinstance(thread, StreamingExecutor):
                thread.shutdown(force=True)
        with suppress(ValueError):  # a thread waits for the next block; it gets none now
            answers.close()
            break
        time.sleep(0.01)
    for thread in threading.enumerate():
        if thread.name.startswith(_PIPELINE_THREADS):
            thread.join(max(0.0, until - time.monotonic()))


def join_cluster(address: str) -> None:
    """Connect to a cluster, or start one on this machine. Must be called on the main thread, before any signal handler.

    Raises:
        BulkError: no cluster answers, or this process cannot be a part of it.
    """
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if address.startswith("ray://"):
        raise BulkError("--ray ray://… (Ray Client) is not supported: run the command on a machine of the cluster")
    if address == LOCAL:
        _start_cluster()
        return
    try:
        connect(None if address == "auto" else address)
    except InvalidValue as error:
        raise BulkError(f"{error}; or let the command start one: --ray {LOCAL}") from error


def _start_cluster() -> None:
    try:
        ray.init(
            address=LOCAL, include_dashboard=False, log_to_driver=False, logging_level="error",
            object_store_memory=_STORE_BYTES, namespace=environment.APP,
        )  # fmt: skip
    except Exception as error:  # Ray has no type for it
        raise BulkStopped(f"Ray did not start on this machine: {_first_line(error)}") from error


def plan_devices(devices: tuple[str, ...]) -> DevicePlan:
    """Plan one actor for each GPU of the cluster; without GPUs, one for each node, with the cores that are free there.

    Args:
        devices: the setting `DEVICE`; `cpu` leaves GPUs alone.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and devices != ("cpu",):
        return DevicePlan(actors=gpus, gpus=1.0)
    from ray._private.state import available_resources_per_node  # no public function tells what is free on which node

    free: list[float] = []
    with suppress(RuntimeError):
        free = [found.get("CPU", 0.0) for found in available_resources_per_node().values()]
    usable = [int(cores) for cores in free if cores >= 1]
    return DevicePlan(actors=max(1, len(usable)), cpus=min(usable, default=1))
