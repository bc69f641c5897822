"""Crashes count against the models that ran; after three within ten minutes a model is quarantined."""

import pytest

from engines.errors import LoadFailed
from router.backends.process.crashes import CrashCounter
from tests.testkit.clocks import FakeClock


def test_the_third_death_within_ten_minutes_quarantines_the_model() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(2):
        crashes.record_crash(["bad"])
        clock.advance(100)
        crashes.check("bad")
    crashes.record_crash(["bad", "by chance"])

    crashes.check("by chance")
    crashes.check("another")
    with pytest.raises(LoadFailed, match="3 crashes of a worker process within 10 minutes") as caught:
        crashes.check("bad")
    assert (caught.value.kind, caught.value.retry_after_s) == ("kills_host", 400.0)


def test_deaths_that_are_long_ago_do_not_count() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(5):
        crashes.record_crash(["unlucky"])
        clock.advance(301)

    crashes.check("unlucky")


def test_a_quarantine_ends_by_itself_and_when_the_model_is_another_one() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(3):
        crashes.record_crash(["a", "b"])
    crashes.clear("a")

    crashes.check("a")
    assert crashes.left_s("b") == 600.0
    clock.advance(600)
    crashes.check("b")


def test_a_model_that_ran_beside_the_one_that_kills_is_not_quarantined_with_it() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash(["busy", "bad"])

    crashes.check("busy")
    with pytest.raises(LoadFailed):
        crashes.check("bad")


def test_a_death_is_charged_once() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash(["busy", "bad"])
    for _ in range(2):
        crashes.record_crash(["busy"])

    crashes.check("busy")
    crashes.record_crash(["busy"])
    with pytest.raises(LoadFailed):
        crashes.check("busy")


def test_the_model_that_ran_at_every_crash_is_the_cause() -> None:
    crashes = CrashCounter(FakeClock())
    for other in ("x", "y", "z"):
        crashes.record_crash(["bad", other])

    for other in ("x", "y", "z"):
        crashes.check(other)
    with pytest.raises(LoadFailed):
        crashes.check("bad")


def test_a_death_of_which_nothing_is_known_is_nobodys() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash([])

    crashes.check("any")
