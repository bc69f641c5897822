"""The crash journal: the models that a device runs are written down before they run."""

import threading
from collections.abc import Callable

import torch

from engines.device.crash_journal import CrashJournal, JournaledLoader, JournaledScheduler
from engines.device.scheduler import Task
from engines.testing.fakes import FakeFiles, FakeLoader, fake_specs

SPEC = fake_specs("a")["a"]


class SingleTaskSource:
    """A source with one task."""

    max_concurrent_tasks = 1

    def __init__(self, run: Callable[[], None]) -> None:
        self._tasks = [Task(run)]

    def ready_in_s(self) -> float | None:
        return 0.0 if self._tasks else None

    def next_task(self, num_free: int) -> Task | None:
        return self._tasks.pop() if self._tasks else None

    def next_small_task(self) -> Task | None:
        return None


def test_the_task_of_an_engine_is_recorded_while_it_runs() -> None:
    notes: list[str] = []
    during: list[list[str]] = []
    done = threading.Event()

    def run() -> None:
        during.append(list(notes))
        done.set()

    scheduler = JournaledScheduler("test")
    scheduler.journal = CrashJournal(notes.append)
    source = SingleTaskSource(run)
    scheduler.names[source] = "a"
    scheduler.attach(source)
    assert done.wait(5)
    scheduler.detach(source)
    seconds = scheduler.seconds_of(source)
    scheduler.close()

    assert during == [["a"]]
    assert notes == ["a", ""]
    assert seconds == 0.0


def test_models_that_run_at_once_are_recorded_together() -> None:
    notes: list[str] = []
    journal = CrashJournal(notes.append)
    with journal.running("a"), journal.running("b"), journal.running("a"):
        pass

    assert notes == ["a", "a\nb", "a\nb", "a\nb", "a", ""]


def test_the_model_that_has_run_least_often_is_recorded_last() -> None:
    notes: list[str] = []
    journal = CrashJournal(notes.append)
    for model_id in ("loads", "hot", "hot", "hot"):
        with journal.running(model_id):
            pass
    with journal.running("loads"), journal.running("hot"):
        during = notes[-1]

    assert during == "hot\nloads"


def test_the_models_that_run_when_the_device_fails_stay_recorded() -> None:
    notes: list[str] = []
    scheduler = JournaledScheduler("test")
    scheduler.journal = CrashJournal(notes.append)
    with scheduler.journal.running("harmless"):
        scheduler.report_error(ValueError("an error of the model"))
    with scheduler.journal.running("a"):
        scheduler.report_error(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    with scheduler.journal.running("later"):
        pass
    health = scheduler.health()
    scheduler.close()

    assert notes == ["harmless", "", "a"]
    assert health.loss == "device-side assert"


def test_a_load_is_recorded_while_it_runs_and_the_scheduler_gets_the_name_of_its_engine() -> None:
    notes: list[str] = []
    during: list[list[str]] = []
    scheduler = JournaledScheduler("test")
    scheduler.journal = CrashJournal(notes.append)
    loader = JournaledLoader(FakeLoader(pause=lambda _: during.append(list(notes))), scheduler)

    engine = loader.load(SPEC, FakeFiles().fetch(SPEC, lambda done, total: None))
    scheduler.close()

    assert during == [["a"]]
    assert notes == ["a", ""]
    assert scheduler.names[engine] == "a"
