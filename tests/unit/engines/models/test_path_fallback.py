"""A failed path is replaced when no pass runs on it, and tried again after a wait."""

import pytest

from engines.models.base import FIRST_WAIT_S, LONGEST_WAIT_S, ForwardPathFailed, PathFallback
from tests.testkit.clocks import FakeClock


class Model:
    """A model with a fast path, which a test can make wrong, and a plain one."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.path = "fast"
        self.is_right = True
        self.num_checks = 0
        self.passes = PathFallback(self._fall_back, self._resume, self.clock)

    def _fall_back(self) -> None:
        self.path = "plain"

    def _resume(self) -> bool:
        self.num_checks += 1
        self.path = "fast" if self.is_right else "plain"
        return self.is_right

    def run(self) -> str:
        """Runs a pass and returns its path."""
        with self.passes.running_pass():
            return self.path

    def fail(self) -> None:
        """Runs a pass that fails."""
        with self.passes.running_pass():
            self.passes.report_failure()

    def wait_for_retry(self) -> None:
        self.clock.advance(self.passes.retry_in_s)


def test_a_failed_path_is_replaced_before_the_next_pass_and_back_after_the_wait() -> None:
    model = Model()

    model.fail()
    during = model.run(), model.passes.is_active
    model.clock.advance(FIRST_WAIT_S - 1)
    before = model.run()
    model.clock.advance(1)

    assert during == ("plain", True)
    assert before == "plain"
    assert (model.run(), model.passes.is_active, model.num_checks) == ("fast", False, 1)


def test_the_path_is_not_switched_while_a_pass_runs() -> None:
    model = Model()

    with model.passes.running_pass():
        model.passes.report_failure()
        with pytest.raises(ForwardPathFailed), model.passes.running_pass():
            pass
        path_of_the_first = model.path

    assert path_of_the_first == "fast"
    assert model.run() == "plain"


def test_a_retry_that_is_due_waits_for_passes_on_the_plain_path() -> None:
    model = Model()
    model.fail()
    with model.passes.running_pass():
        model.wait_for_retry()
        with model.passes.running_pass():
            beside = model.path

    assert beside == "plain"
    assert model.run() == "fast"


def test_no_pass_runs_beside_a_check() -> None:
    model = Model()
    model.fail()
    model.run()
    model.wait_for_retry()
    seen: list[bool] = []

    def resume() -> bool:
        seen.append(model.passes.is_switch_due)
        with pytest.raises(ForwardPathFailed), model.passes.running_pass():
            pass
        return True

    model.passes._resume = resume
    model.run()

    assert seen == [True]
    assert not model.passes.is_switch_due


def test_a_switch_that_raises_leaves_no_pass_behind() -> None:
    model = Model()
    model.fail()

    def fall_back() -> None:
        raise RuntimeError("no memory")

    model.passes._fall_back = fall_back
    with pytest.raises(RuntimeError, match="no memory"):
        model.run()
    model.passes._fall_back = model._fall_back

    assert model.run() == "plain"


def test_each_failure_soon_after_doubles_the_wait_up_to_an_hour() -> None:
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
def test_a_path_that_was_right_for_long_is_retried_after_the_first_wait(good_s: float, wait_s: float) -> None:
    model = Model()
    model.fail()
    model.run()
    model.wait_for_retry()
    model.run()

    model.clock.advance(good_s)
    model.fail()

    assert model.passes.retry_in_s == wait_s


def test_a_text_that_fails_on_the_plain_path_too_makes_the_retry_due_at_once() -> None:
    model = Model()
    model.fail()
    with model.passes.running_pass():
        model.passes.retry_now()

    assert model.run() == "fast"


def test_a_switch_that_fails_is_repeated_before_the_next_pass() -> None:
    model = Model()
    fall_back = model._fall_back

    def fail() -> None:
        model.passes._fall_back = fall_back
        raise MemoryError

    model.passes._fall_back = fail
    model.fail()

    with pytest.raises(MemoryError):
        model.run()
    assert model.run() == "plain"


def test_no_pass_begins_while_one_is_alone() -> None:
    model = Model()

    with model.passes.alone():
        assert model.passes.is_switch_due
        with pytest.raises(ForwardPathFailed):
            model.run()
        with pytest.raises(ForwardPathFailed), model.passes.alone():
            pass

    assert (model.run(), model.passes.is_switch_due) == ("fast", False)


def test_nothing_is_alone_beside_a_pass_or_on_the_fallback_path() -> None:
    model = Model()

    with model.passes.running_pass(), pytest.raises(ForwardPathFailed), model.passes.alone():
        pass
    model.fail()
    model.run()
    with pytest.raises(ForwardPathFailed), model.passes.alone():
        pass
    assert model.run() == "plain"
