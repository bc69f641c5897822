"""Deaths are charged to the models that ran; three within ten minutes, and the model is kept out."""

import pytest

from engines.errors import LoadFailed
from router.backends.process.crashes import CrashCounter
from tests.testkit.clocks import FakeClock


def test_the_third_death_within_ten_minutes_quarantines_the_model() -> None:
    clock = FakeClock()
    charges = CrashCounter(clock)
    for _ in range(2):
        charges.record_crash(["bad"])
        clock.advance(100)
        charges.check("bad")
    charges.record_crash(["bad", "by chance"])

    charges.check("by chance")
    charges.check("another")
    with pytest.raises(LoadFailed, match="3 times within 10 minutes") as caught:
        charges.check("bad")
    assert (caught.value.kind, caught.value.retry_after_s) == ("kills_host", 400.0)


def test_deaths_that_are_long_ago_do_not_count() -> None:
    clock = FakeClock()
    charges = CrashCounter(clock)
    for _ in range(5):
        charges.record_crash(["unlucky"])
        clock.advance(301)

    charges.check("unlucky")


def test_a_quarantine_ends_by_itself_and_when_the_model_is_another_one() -> None:
    clock = FakeClock()
    charges = CrashCounter(clock)
    for _ in range(3):
        charges.record_crash(["a", "b"])
    charges.clear("a")

    charges.check("a")
    assert charges.left_s("b") == 600.0
    clock.advance(600)
    charges.check("b")


def test_a_model_that_ran_beside_the_one_that_kills_is_not_quarantined_with_it() -> None:
    charges = CrashCounter(FakeClock())
    for _ in range(3):
        charges.record_crash(["busy", "bad"])

    charges.check("busy")
    with pytest.raises(LoadFailed):
        charges.check("bad")


def test_a_death_is_charged_once() -> None:
    charges = CrashCounter(FakeClock())
    for _ in range(3):
        charges.record_crash(["busy", "bad"])
    for _ in range(2):
        charges.record_crash(["busy"])

    charges.check("busy")
    charges.record_crash(["busy"])
    with pytest.raises(LoadFailed):
        charges.check("busy")


def test_of_changing_company_the_one_that_was_always_there_is_the_cause() -> None:
    charges = CrashCounter(FakeClock())
    for other in ("x", "y", "z"):
        charges.record_crash(["bad", other])

    for other in ("x", "y", "z"):
        charges.check(other)
    with pytest.raises(LoadFailed):
        charges.check("bad")


def test_a_death_of_which_nothing_is_known_is_nobodys() -> None:
    charges = CrashCounter(FakeClock())
    for _ in range(3):
        charges.record_crash([])

    charges.check("any")
