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

from engines.device.scheduler import Lane, Source, Turn
from engines.protocols import Engine, Loader
from engines.spec import ModelSpec
from engines.types import ModelFiles

Write = Callable[[str], None]
"""Takes the ids of the models that run now, one a line. Called on the lane's and the loader's threads."""


class Notebook:
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
    def noted(self, model_id: str) -> Iterator[None]:
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


class NotedLane(Lane):
    """A lane that notes whose turns it takes.

    Attributes:
        notebook: where; writes nothing until it is replaced.
        names: of engines, by the loader. The turns of others are not noted.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        self.notebook = Notebook(lambda _: None)
        self.names: WeakKeyDictionary[object, str] = WeakKeyDictionary()
        self._noted: dict[int, _Noted] = {}
        super().__init__(*args, **more)

    def attach(self, source: Source) -> None:
        """As `Lane.attach`."""
        name = self.names.get(source)
        if name is not None:
            self._noted[id(source)] = _Noted(source, name, self.notebook)
        super().attach(self._seen(source))

    def detach(self, source: Source) -> None:
        """As `Lane.detach`."""
        super().detach(self._seen(source))
        self._noted.pop(id(source), None)

    def seconds_of(self, source: Source) -> float:
        """As `Lane.seconds_of`."""
        return super().seconds_of(self._seen(source))

    def _seen(self, source: Source) -> Source:
        """The source as the lane knows it."""
        return self._noted.get(id(source), source)


class _Noted:
    """A source whose turns are noted (`engines.device.tasks.Source`)."""

    def __init__(self, source: Source, name: str, notebook: Notebook) -> None:
        self._source = source
        self._name = name
        self._notebook = notebook

    @property
    def max_turns(self) -> int:
        return self._source.max_turns

    def due_in_s(self) -> float | None:
        return self._source.due_in_s()

    def take(self, num_free: int) -> Turn | None:
        return self._with_note(self._source.take(num_free))

    def take_small(self) -> Turn | None:
        return self._with_note(self._source.take_small())

    def _with_note(self, turn: Turn | None) -> Turn | None:
        if turn is None:
            return None

        def run() -> None:
            with self._notebook.noted(self._name):
                turn.run()

        return replace(turn, run=run)


class NotedLoader:
    """A loader that notes what it loads, and names its engines to the lane (`engines.protocols.Loader`)."""

    def __init__(self, loader: Loader, lane: NotedLane) -> None:
        self._loader = loader
        self._lane = lane

    def load(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """See `Loader.load`."""
        with self._lane.notebook.noted(spec.model_id):
            engine = self._loader.load(spec, files)
        self._lane.names[engine] = spec.model_id
        return engine
