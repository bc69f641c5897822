"""A path that fails is left when nobody runs on it, and tried again when it is time."""

import pytest

from engines.models.base import ForwardPathFailed
from engines.models.transformer import FIRST_WAIT_S, LONGEST_WAIT_S, PathFallback
from tests.testkit.clocks import HandClock


class Model:
    """The switches of a model, and whether its fast path is right."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.path = "fast"
        self.is_right = True
        self.num_checks = 0
        self.passes = PathFallback(self._leave, self._resume, self.clock)

    def _leave(self) -> None:
        self.path = "plain"

    def _resume(self) -> bool:
        self.num_checks += 1
        self.path = "fast" if self.is_right else "plain"
        return self.is_right

    def run(self) -> str:
        """The path that a pass takes."""
        with self.passes.inside():
            return self.path

    def fail(self) -> None:
        """A pass fails on its path."""
        with self.passes.inside():
            self.passes.give_up()

    def wait_for_retry(self) -> None:
        self.clock.advance(self.passes.retry_in_s)


def test_a_failed_path_is_left_by_the_next_pass_and_back_after_the_wait() -> None:
    model = Model()

    model.fail()
    during = model.run(), model.passes.is_left
    model.clock.advance(FIRST_WAIT_S - 1)
    before = model.run()
    model.clock.advance(1)

    assert during == ("plain", True)
    assert before == "plain"
    assert (model.run(), model.passes.is_left, model.num_checks) == ("fast", False, 1)


def test_the_path_is_not_switched_under_a_pass_that_runs() -> None:
    model = Model()

    with model.passes.inside():
        model.passes.give_up()
        with pytest.raises(ForwardPathFailed), model.passes.inside():
            pass
        path_of_the_first = model.path

    assert path_of_the_first == "fast"
    assert model.run() == "plain"


def test_a_path_that_is_due_again_waits_for_those_who_run_on_the_plain_one() -> None:
    model = Model()
    model.fail()
    with model.passes.inside():
        model.wait_for_retry()
        with model.passes.inside():
            beside = model.path

    assert beside == "plain"
    assert model.run() == "fast"


def test_nobody_runs_beside_a_check() -> None:
    model = Model()
    model.fail()
    model.run()
    model.wait_for_retry()
    seen: list[bool] = []

    def resume() -> bool:
        seen.append(model.passes.is_alone)
        with pytest.raises(ForwardPathFailed), model.passes.inside():
            pass
        return True

    model.passes._resume = resume
    model.run()

    assert seen == [True]
    assert not model.passes.is_alone


def test_each_failure_that_follows_soon_doubles_the_wait_up_to_an_hour() -> None:
    model = Model()
    model.is_right = False
    model.fail()
    model.run()
    waits = []
    for _ in range(9):
        waits.append(model.passes.retry_in_s)
        model.wait_for_retry()
        model.run()

    assert waits == [30, 60, 120, 240, 480, 960, 1920, LONGEST_WAIT_S, LONGEST_WAIT_S]


@pytest.mark.parametrize(("good_s", "wait_s"), [(1.0, 2 * FIRST_WAIT_S), (FIRST_WAIT_S, FIRST_WAIT_S)])
def test_a_path_that_was_good_for_long_is_back_as_soon_as_the_first_time(good_s: float, wait_s: float) -> None:
    model = Model()
    model.fail()
    model.run()
    model.wait_for_retry()
    model.run()

    model.clock.advance(good_s)
    model.fail()

    assert model.passes.retry_in_s == wait_s


def test_a_text_that_fails_on_the_plain_path_too_is_not_the_fast_ones_fault() -> None:
    model = Model()
    model.fail()
    with model.passes.inside():
        model.passes.acquit()

    assert model.run() == "fast"


def test_a_switch_that_fails_is_made_by_the_next_pass() -> None:
    model = Model()
    leave = model._leave

    def fail() -> None:
        model.passes._leave = leave
        raise MemoryError

    model.passes._leave = fail
    model.fail()

    with pytest.raises(MemoryError):
        model.run()
    assert model.run() == "plain"
