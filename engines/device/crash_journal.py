"""Writes down which models a device runs before it runs them: a process that dies of one cannot report it afterwards.

Only hosts in worker processes pay for it, some microseconds a batch.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from engines.device.flex import FlexSource
from engines.device.scheduler import DeviceScheduler, Task, TaskSource
from engines.errors import device_loss
from engines.protocols import Engine, Loader, ModelParts, Placement, SplitLoader
from engines.spec import ModelSpec
from engines.types import ModelFiles

Write = Callable[[str], None]
"""Takes the ids of the models that run now, one a line. Called on the threads of the device and of the loader."""


class CrashJournal:
    """Records the models that run now. Threads may share it.

    The last line names the likeliest cause when the process dies: the model that has run least often so far, of two
    alike the one that began later. A model that has run a thousand batches without a crash is a less likely cause than
    one that loads, or runs its first batch.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._is_kept = False
        self._running: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def running(self, model_id: str) -> Iterator[None]:
        """Records that the model runs inside the block, on any thread."""
        self._record(model_id, 1)
        try:
            yield
        finally:
            self._record(model_id, -1)

    def keep(self) -> None:
        """Keeps what is written now: the device has failed, and the models that run now are the likeliest cause."""
        with self._lock:
            self._is_kept = True

    def _record(self, model_id: str, change: int) -> None:
        with self._lock:
            if self._is_kept:
                return
            self._running[model_id] += change
            if change > 0:
                self._begun[model_id] += 1
            if not self._running[model_id]:
                del self._running[model_id]  # a model that starts again goes to the end
            self._write("\n".join(sorted(self._running, key=lambda name: -self._begun[name])))


class JournaledScheduler(DeviceScheduler):
    """A device scheduler that records in a crash journal which engine's tasks it runs.

    Attributes:
        journal: writes nothing until it is replaced.
        names: the model ids of engines, set by the loader. Tasks of other sources are not recorded.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        self.journal = CrashJournal(lambda _: None)
        self.names: WeakKeyDictionary[object, str] = WeakKeyDictionary()
        self._journaled: dict[int, _JournaledSource] = {}
        super().__init__(*args, **more)

    def attach(self, source: TaskSource, flex: FlexSource | None = None) -> None:
        """As `DeviceScheduler.attach`."""
        name = self.names.get(source)
        if name is not None:
            self._journaled[id(source)] = _JournaledSource(source, name, self.journal)
            flex = None if flex is None else _JournaledFlexSource(flex, name, self.journal)
        super().attach(self._wrapped(source), flex)

    def detach(self, source: TaskSource) -> None:
        """As `DeviceScheduler.detach`."""
        super().detach(self._wrapped(source))
        self._journaled.pop(id(source), None)

    def seconds_of(self, source: TaskSource) -> float:
        """As `DeviceScheduler.seconds_of`."""
        return super().seconds_of(self._wrapped(source))

    def report_error(self, error: BaseException) -> None:
        """As `DeviceScheduler.report_error`. The supervisor reads the journal when it has ended the process."""
        if device_loss(error):
            self.journal.keep()
        super().report_error(error)

    def _wrapped(self, source: TaskSource) -> TaskSource:
        """Returns the source as it is attached: wrapped where it has a name."""
        return self._journaled.get(id(source), source)


class _JournaledSource:
    """A source whose tasks are recorded while they run (`engines.device.tasks.TaskSource`)."""

    def __init__(self, source: TaskSource, name: str, journal: CrashJournal) -> None:
        self._source = source
        self._name = name
        self._journal = journal

    @property
    def max_concurrent_tasks(self) -> int:
        return self._source.max_concurrent_tasks

    def ready_in_s(self) -> float | None:
        return self._source.ready_in_s()

    def next_task(self, num_free: int) -> Task | None:
        return self._recorded(self._source.next_task(num_free))

    def next_small_task(self) -> Task | None:
        return self._recorded(self._source.next_small_task())

    def _recorded(self, task: Task | None) -> Task | None:
        if task is None:
            return None

        def run() -> None:
            with self._journal.running(self._name):
                task.run()

        return replace(task, run=run)


class _JournaledFlexSource(_JournaledSource):
    """The same, of flex tasks (`engines.device.flex.FlexSource`)."""

    def __init__(self, source: FlexSource, name: str, journal: CrashJournal) -> None:
        super().__init__(source, name, journal)
        self._flex_source = source

    @property
    def is_exclusive(self) -> bool:
        return self._flex_source.is_exclusive

    @property
    def must_finish(self) -> bool:
        return self._flex_source.must_finish


class JournaledLoader:
    """A loader that records what it loads, and gives the scheduler its engines' names (`engines.protocols.Loader`)."""

    def __init__(self, loader: Loader, scheduler: JournaledScheduler) -> None:
        self._loader = loader
        self._scheduler = scheduler

    def load(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """See `Loader.load`."""
        return self._named(spec, lambda: self._loader.load(spec, files))

    def parts(self, spec: ModelSpec, files: ModelFiles) -> ModelParts | None:
        """See `SplitLoader.parts`."""
        return self._loader.parts(spec, files) if isinstance(self._loader, SplitLoader) else None

    def load_split(self, spec: ModelSpec, files: ModelFiles, placement: Placement) -> Engine:
        """See `SplitLoader.load_split`."""
        loader = self._loader
        assert isinstance(loader, SplitLoader), "it has told the parts"
        return self._named(spec, lambda: loader.load_split(spec, files, placement))

    def _named(self, spec: ModelSpec, load: Callable[[], Engine]) -> Engine:
        with self._scheduler.journal.running(spec.model_id):
            engine = load()
        self._scheduler.names[engine] = spec.model_id
        return engine
