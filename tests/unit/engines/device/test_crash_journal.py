"""What a device runs is written down before it runs."""

import threading
from collections.abc import Callable

from engines.device.crash_journal import CrashJournal, JournaledLoader, JournaledScheduler
from engines.device.scheduler import Task
from engines.testing.fakes import FakeFiles, FakeLoader, fake_specs

SPEC = fake_specs("a")["a"]


class Once:
    """A source with one turn."""

    max_concurrent_tasks = 1

    def __init__(self, run: Callable[[], None]) -> None:
        self._turns = [Task(run)]

    def ready_in_s(self) -> float | None:
        return 0.0 if self._turns else None

    def next_task(self, num_free: int) -> Task | None:
        return self._turns.pop() if self._turns else None

    def next_small_task(self) -> Task | None:
        return None


def test_the_turn_of_an_engine_is_noted_while_it_runs() -> None:
    notes: list[str] = []
    during: list[list[str]] = []
    done = threading.Event()

    def run() -> None:
        during.append(list(notes))
        done.set()

    lane = JournaledScheduler("test")
    lane.notebook = CrashJournal(notes.append)
    source = Once(run)
    lane.names[source] = "a"
    lane.attach(source)
    assert done.wait(5)
    lane.detach(source)
    seconds = lane.seconds_of(source)
    lane.close()

    assert during == [["a"]]
    assert notes == ["a", ""]
    assert seconds == 0.0


def test_models_that_run_at_once_are_noted_together() -> None:
    notes: list[str] = []
    notebook = CrashJournal(notes.append)
    with notebook.running("a"), notebook.running("b"), notebook.running("a"):
        pass

    assert notes == ["a", "a\nb", "a\nb", "a\nb", "a", ""]


def test_the_model_that_has_run_least_often_is_noted_last() -> None:
    notes: list[str] = []
    notebook = CrashJournal(notes.append)
    for model_id in ("loads", "hot", "hot", "hot"):
        with notebook.running(model_id):
            pass
    with notebook.running("loads"), notebook.running("hot"):
        during = notes[-1]

    assert during == "hot\nloads"


def test_a_load_is_noted_while_it_runs_and_its_engine_is_named_to_the_lane() -> None:
    notes: list[str] = []
    during: list[list[str]] = []
    lane = JournaledScheduler("test")
    lane.notebook = CrashJournal(notes.append)
    loader = JournaledLoader(FakeLoader(pause=lambda _: during.append(list(notes))), lane)

    engine = loader.load(SPEC, FakeFiles().fetch(SPEC, lambda done, total: None))
    lane.close()

    assert during == [["a"]]
    assert notes == ["a", ""]
    assert lane.names[engine] == "a"
