"""The steps of a recording run while no text waits, and one by one under traffic that never ends."""

from engines.batching.rest_of_check import CHECK_AFTER_S, LATEST_S
from engines.batching.rest_of_recording import PAUSE_S, RestOfRecording
from tests.testkit.clocks import FakeClock


def begun(clock: FakeClock, steps: list[int]) -> RestOfRecording:
    rest = RestOfRecording(lambda: steps.append(1), lambda: len(steps) < 3, clock)
    rest.started()
    return rest


def run_step(rest: RestOfRecording) -> None:
    task = rest.next_task()
    assert task is not None
    assert rest.next_task() is None, "one step at a time"
    task.run()


def test_without_texts_a_step_follows_the_other_at_once() -> None:
    clock, steps = FakeClock(), list[int]()
    rest = begun(clock, steps)
    assert rest.due_in_s == CHECK_AFTER_S
    clock.advance(CHECK_AFTER_S)

    for _ in range(3):
        assert (rest.due_in_s, rest.is_overdue) == (0.0, False)
        run_step(rest)

    assert len(steps) == 3
    assert not rest.next_task()


def test_between_two_steps_for_which_texts_wait_there_is_a_pause() -> None:
    clock, steps = FakeClock(), list[int]()
    rest = begun(clock, steps)
    clock.advance(CHECK_AFTER_S + LATEST_S)
    assert rest.is_overdue

    run_step(rest)

    assert (rest.due_in_s, rest.is_overdue) == (0.0, False), "it may run when no text waits"
    clock.advance(PAUSE_S)
    assert rest.is_overdue
