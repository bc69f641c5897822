"""What a device runs is written down before it runs."""

import threading

from engines.device import Turn
from engines.fake import FakeFiles, FakeLoader, fake_specs
from engines.noted import NotedLane, NotedLoader

SPEC = fake_specs("a")["a"]


class Once:
    """A source with one turn."""

    def __init__(self, turn: Turn) -> None:
        self._turns = [turn]

    def due_in_s(self) -> float | None:
        return 0.0 if self._turns else None

    def take(self) -> Turn | None:
        return self._turns.pop() if self._turns else None


def test_the_turn_of_an_engine_is_noted_while_it_runs() -> None:
    notes: list[str] = []
    seen: list[list[str]] = []
    done = threading.Event()
    lane = NotedLane("test", lambda: None, notes.append)

    def turn() -> None:
        seen.append(list(notes))
        done.set()

    source = Once(turn)
    lane.names[source] = "a"

    lane.attach(source)
    lane.wake()
    assert done.wait(5)
    lane.detach(source)
    lane.close()

    assert seen == [["a"]]
    assert notes == ["a", ""]


def test_a_load_is_noted_while_it_runs_and_its_engine_is_named_to_the_lane() -> None:
    notes: list[str] = []
    during: list[list[str]] = []
    lane = NotedLane("test", lambda: None, notes.append)
    loader = NotedLoader(FakeLoader(pause=lambda _: during.append(list(notes))), lane)

    engine = loader.load(SPEC, FakeFiles().fetch(SPEC, lambda done, total: None))
    lane.close()

    assert during == [["a"]]
    assert notes == ["a", ""]
    assert lane.names[engine] == "a"
