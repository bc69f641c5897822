"""What a device is running, written down before it runs: a process that dies of it cannot say so afterwards.

Only hosts in worker processes pay for it, some microseconds a batch.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from engines.device.scheduler import DeviceScheduler, Task, TaskSource
from engines.protocols import Engine, Loader
from engines.spec import ModelSpec
from engines.types import ModelFiles

Write = Callable[[str], None]
"""Takes the ids of the models that run now, one a line. Called on the lane's and the loader's threads."""


class CrashJournal:
    """The models that run now. Threads may share it.

    The last line is the one to suspect when the process dies: the model that has run least often so far, of two alike
    the one that began later. A model that has run a thousand batches and lived is not the cause as likely as one that
    loads, or runs its first.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._running: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def running(self, model_id: str) -> Iterator[None]:
        """The model runs inside the block, on whatever thread."""
        self._note(model_id, 1)
        try:
            yield
        finally:
            self._note(model_id, -1)

    def _note(self, model_id: str, change: int) -> None:
        with self._lock:
            self._running[model_id] += change
            if change > 0:
                self._begun[model_id] += 1
            if not self._running[model_id]:
                del self._running[model_id]  # the order is that in which they began
            self._write("\n".join(sorted(self._running, key=lambda name: -self._begun[name])))


class JournaledScheduler(DeviceScheduler):
    """A lane that notes whose turns it takes.

    Attributes:
        notebook: where; writes nothing until it is replaced.
        names: of engines, by the loader. The turns of others are not noted.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        self.notebook = CrashJournal(lambda _: None)
        self.names: WeakKeyDictionary[object, str] = WeakKeyDictionary()
        self._noted: dict[int, _JournaledSource] = {}
        super().__init__(*args, **more)

    def attach(self, source: TaskSource) -> None:
        """As `DeviceScheduler.attach`."""
        name = self.names.get(source)
        if name is not None:
            self._noted[id(source)] = _JournaledSource(source, name, self.notebook)
        super().attach(self._seen(source))

    def detach(self, source: TaskSource) -> None:
        """As `DeviceScheduler.detach`."""
        super().detach(self._seen(source))
        self._noted.pop(id(source), None)

    def seconds_of(self, source: TaskSource) -> float:
        """As `DeviceScheduler.seconds_of`."""
        return super().seconds_of(self._seen(source))

    def _seen(self, source: TaskSource) -> TaskSource:
        """The source as the lane knows it."""
        return self._noted.get(id(source), source)


class _JournaledSource:
    """A source whose turns are noted (`engines.device.tasks.TaskSource`)."""

    def __init__(self, source: TaskSource, name: str, notebook: CrashJournal) -> None:
        self._source = source
        self._name = name
        self._notebook = notebook

    @property
    def max_concurrent_tasks(self) -> int:
        return self._source.max_concurrent_tasks

    def ready_in_s(self) -> float | None:
        return self._source.ready_in_s()

    def next_task(self, num_free: int) -> Task | None:
        return self._with_note(self._source.next_task(num_free))

    def next_small_task(self) -> Task | None:
        return self._with_note(self._source.next_small_task())

    def _with_note(self, turn: Task | None) -> Task | None:
        if turn is None:
            return None

        def run() -> None:
            with self._notebook.running(self._name):
                turn.run()

        return replace(turn, run=run)


class JournaledLoader:
    """A loader that notes what it loads, and names its engines to the lane (`engines.protocols.Loader`)."""

    def __init__(self, loader: Loader, lane: JournaledScheduler) -> None:
        self._loader = loader
        self._lane = lane

    def load(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """See `Loader.load`."""
        with self._lane.notebook.running(spec.model_id):
            engine = self._loader.load(spec, files)
        self._lane.names[engine] = spec.model_id
        return engine
